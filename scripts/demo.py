# SPDX-License-Identifier: Apache-2.0
"""The whole path on synthetic patients: train, register one annotated scan, segment, evaluate.

`make demo` runs it. Three organs and four patients are held out of training. Of these patients one
is annotated: from that scan alone the organs are found in the other three. Beside it stands the
training-free baseline, prototype scores and bilinear upsampling with the same encoder.

Every step is a subcommand that you could type; the baseline, which has none, uses the library.
"""

from __future__ import annotations

import argparse
import math
import shlex
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from fastproto.cli import main as fastproto
from fastproto.data import Volume, read_label, read_volume, write_volume
from fastproto.evaluation import Report, evaluate_folder
from fastproto.nn import PrototypeNet
from fastproto.segmentation import Task, load_model, register, segment_volume, write_overlay

PATIENTS = 10
ANNOTATED = "ct_006"
QUERIES = ("ct_007", "ct_008", "ct_009")
ORGANS = {2: "spleen", 4: "left kidney", 7: "stomach"}
METRICS = {"dice": "Dice", "hd95": "HD95 [mm]", "assd": "ASSD [mm]", "nsd": "NSD"}
# A small encoder, slices fine enough for organs of a few centimetres, and only the cross-entropy:
# what a few minutes on two processor cores are best spent on.
TRAINING = (
    "--encoder resnet18 --image-size 224 --learning-rate 5e-4 --superpixel-fraction 0.3 "
    "--set align=0 cycle=0"
)


def main() -> None:
    """Run all steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="result folder")
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    args = parser.parse_args()
    started = time.perf_counter()
    out = args.out
    data, run, task = out / "phantom", out / "run", out / "organs.task"
    images, labels = data / "images", data / "labels"
    for folder in (data, run, out / "fastproto", out / "baseline"):
        shutil.rmtree(folder, ignore_errors=True)

    step(f"phantom --out {data} --patients {PATIENTS}")
    step(
        f"train --data {data} --holdout-classes {names()} "
        f"--holdout-cases {ANNOTATED} {' '.join(QUERIES)} "
        f"{TRAINING} --steps {args.steps} --out {run}"
    )
    step(
        f"register --model {run} --image {images / ANNOTATED}.nii.gz "
        f"--label {labels / ANNOTATED}.nii.gz --labels {pairs()} -o {task}"
    )
    for case in QUERIES:
        step(
            f"segment --model {run} --task {task} -i {images / case}.nii.gz "
            f"-o {out / 'fastproto'} --overlay"
        )
    segment_with_baseline(run, task, data, out / "baseline")

    columns = {}
    for method in ("fastproto", "baseline"):
        within = evaluate_folder(out / method, labels, labels=ORGANS, z_margin=0)
        everywhere = evaluate_folder(out / method, labels, labels=ORGANS)
        within.write_json(out / f"{method}-organ-slices.json")
        everywhere.write_json(out / f"{method}-all-slices.json")
        columns[method] = means(within, METRICS), means(everywhere, ["dice"])
    table = to_text(columns)
    (out / "table.txt").write_text(table, encoding="utf-8")
    print(f"\nOrgans and patients that training never saw, from one annotated scan:\n\n{table}")
    print("Mean over three patients, in the slices of each organ; the last column in all slices.")
    print(f"The whole demo took {(time.perf_counter() - started) / 60:.1f} minutes.")
    print(f"Overlay pictures: {out / 'fastproto'}/*.png, beside them the label maps")
    print(f"Results: {out.resolve()}")


def step(command: str) -> None:
    """Run one subcommand of the program ``fastproto`` and stop the demo if it fails."""
    print(f"\n$ fastproto {command}", flush=True)
    if status := fastproto(shlex.split(command)):
        sys.exit(status)


def segment_with_baseline(run: Path, task: Path, data: Path, out: Path) -> None:
    """Segment the same patients from the same annotated scan without a decoder."""
    print("\nThe same with prototype scores and bilinear upsampling alone", flush=True)
    trained = Task.load(task)
    baseline = PrototypeNet.from_unet(load_model(run))
    support = read_case(data, ANNOTATED)
    baseline_task = register(
        baseline,
        *support,
        labels=ORGANS,
        classes=list(ORGANS),
        preprocessing=trained.preprocessing,
    )
    for case in QUERIES:
        image, _ = read_case(data, case)
        labels = segment_volume(baseline, baseline_task, image).labels
        write_volume(out / f"{case}.nii.gz", labels, like=image)
        write_overlay(
            out / f"{case}.png",
            image,
            read_label(out / f"{case}.nii.gz"),
            trained.preprocessing,
            ORGANS,
        )


def read_case(data: Path, case: str) -> tuple[Volume, Volume]:
    """The scan and the label map of one patient."""
    name = f"{case}.nii.gz"
    return read_volume(data / "images" / name), read_label(data / "labels" / name)


def means(report: Report, metrics: Iterable[str]) -> dict[str, list[float]]:
    """Mean over the patients of each metric, per organ, and over all organs."""
    rows = {
        entry["organ"]: [entry[metric]["mean"] for metric in metrics]
        for entry in report.per_organ()
    }
    return {**rows, "mean": [report.overall()[metric] for metric in metrics]}


def to_text(columns: dict[str, tuple[dict[str, list[float]], ...]]) -> str:
    """A table with a row per organ and method; a dash where nothing could be measured."""
    titles = [*METRICS.values(), "Dice, all"]
    lines = [f"{'organ':<12}  {'method':<9}" + "".join(f"{title:>11}" for title in titles)]
    for organ in [*ORGANS.values(), "mean"]:
        for method, parts in columns.items():
            values = [value for part in parts for value in part[organ]]
            cells = ["-" if math.isnan(value) else f"{value:.2f}" for value in values]
            lines.append(f"{organ:<12}  {method:<9}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines) + "\n"


def names() -> str:
    """The held-out organs as arguments."""
    return shlex.join(ORGANS.values())


def pairs() -> str:
    """The held-out organs as NAME=VALUE arguments."""
    return shlex.join(f"{name}={value}" for value, name in ORGANS.items())


if __name__ == "__main__":
    main()
