# SPDX-License-Identifier: Apache-2.0
"""Ablation of the training recipe: one change at a time, at equal steps and at equal time.

Training patients alone: four of the twelve patients of CHAOS that are not in any result table are
held out here, and two of the seven of IXI. Each variant trains on the others without a label, then
segments those held out from one annotated scan: EP1, and whole volumes without a prior. Variants
run in processes of their own, several at a time; those that a file holds already are not run again.

    python scripts/ablation.py --data SCANS --output RUNS --results FILE.json --workers 4
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import records
import torch

from fastproto.evaluation import measure
from fastproto.evaluation.crossval import CrossValidation, crossval
from fastproto.evaluation.metrics import METRICS, dice
from fastproto.evaluation.report import versions
from fastproto.nn.baseline import upsample_scores
from fastproto.nn.decoder import UNetDecoder
from fastproto.nn.few_shot_unet import FewShotUNet
from fastproto.nn.prototypes import prototype_scores
from fastproto.training import sources
from fastproto.training.supervoxels import Supervoxels, supervoxels

STEPS = 500
MINUTES = 0.75
SCALES = 3  # of superpixels
BASE = {
    "encoder": "resnet18",
    "output_stride": 8,
    "image_size": 128,
    "same_slice_fraction": 0.0,
    "steps": STEPS,
    "validation_episodes": 0,
    "checkpoint_every": 10**6,
}
SETS: dict[str, dict[str, Any]] = {
    "chaos": {
        "data": "chaos_t2_mr",
        "test_cases": ("chaos_19", "chaos_20", "chaos_21", "chaos_22"),
        "annotated": ("chaos_19", "chaos_21"),
        "classes": (),
        "holdout_cases": ("chaos_08", "chaos_10", "chaos_13", "chaos_15"),
    },
    "ixi": {
        "data": "ixi_brain_mr",
        "test_cases": ("IXI012-HH-1211", "IXI013-HH-1212"),
        "annotated": (),
        "classes": (4, 6, 7, 8),
        "holdout_cases": ("IXI034-HH-1260", "IXI039-HH-1261"),
    },
}
# name -> changes of the training; "code" names a change of the code below
VARIANTS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "alignment loss too": {"align": 1.0},
    "cycle loss too": {"cycle": 1.0},
    "all three losses": {"align": 1.0, "cycle": 1.0},
    "batch 4": {"batch": 4},
    "batch 1": {"batch": 1},
    "2-D superpixels": {"code": "superpixels"},
    "half the queries from the support slice": {"same_slice_fraction": 0.5},
    "all queries from the support slice": {"same_slice_fraction": 1.0},
    "no skip connections": {"code": "no-skips"},
    "no decoder": {"code": "no-decoder"},
    "three support slices": {"shots": 3},
    "output stride 16": {"output_stride": 16},
    "every query shows the class": {"absent_fraction": 0.0},
    "background weight 0.1": {"background_weight": 0.1},
    "background weight 0.5": {"background_weight": 0.5},
    "background weight 1": {"background_weight": 1.0},
    "temperature 0.02": {"temperature": 0.02},
    "temperature 0.1": {"temperature": 0.1},
    "tau 0.1": {"mask_threshold": 0.1},
    "tau 0.9": {"mask_threshold": 0.9},
    "the recipe, seed 1": {"seed": 1},
    "the recipe, seed 2": {"seed": 2},
    "whole slices": {"code": "whole-slices"},
    "192 pixels": {"image_size": 192},
    "ResNet-34": {"encoder": "resnet34"},
    "batch 16": {"batch": 16},
    "rate 5e-4": {"learning_rate": 5e-4},
    "no augmentation": {"augment": False},
}
# Those that cost more or less a step than the recipe.
TIMED = (
    *("the recipe", "all three losses", "batch 4", "batch 1", "three support slices"),
    *("output stride 16", "192 pixels", "ResNet-34", "no decoder", "batch 16"),
)
SMALL = ("the recipe", "output stride 16", "whole slices", "192 pixels")  # on IXI too


def main() -> None:
    """Run what is not measured yet, or one variant in this process."""
    parser = records.arguments(__doc__, data=None, output=None, results=None)
    parser.add_argument("--workers", type=int, default=1, help="variants at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="of a variant")
    parser.add_argument("--until", type=float, default=1e9, help="begin none after so many minutes")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--one", help="internal: the variant to run in this process, as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(args, **json.loads(args.one))))
        return
    plan = [{"name": name, "data": "chaos", "timed": False} for name in VARIANTS]
    plan += [{"name": name, "data": "chaos", "timed": True} for name in TIMED]
    plan += [{"name": name, "data": "ixi", "timed": False} for name in SMALL]
    # The most telling first, should the time run out.
    plan.sort(key=lambda v: place(v) + 8 * v["timed"] + 4 * (v["data"] == "ixi"))
    done = []
    if args.results.exists():
        old, now = json.loads(args.results.read_text()), record(args, [])
        for name in ("machine", "versions", "steps", "minutes", "training", "tests"):
            if old[name] != json.loads(json.dumps(now[name])):
                raise SystemExit(
                    f"{args.results}: found {name} {old[name]}; allowed: {now[name]}, as this run. "
                    "Choose another file: rows of one table are of one machine and one setting."
                )
        done = old["rows"]
    left = [v for v in plan if not any(v.items() <= row.items() for row in done)]
    began = time.monotonic()

    def start(variant: dict[str, Any]) -> dict[str, Any] | None:
        if time.monotonic() - began > args.until * 60:
            return None
        command = [sys.executable, *sys.orig_argv[1:], "--one", json.dumps(variant)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            print(f"{variant}: {found.stderr[-2000:]}", file=sys.stderr)
            return None
        row: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
        return row

    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        for future in concurrent.futures.as_completed([pool.submit(start, v) for v in left]):
            if row := future.result():
                done.append(row)
                print(row, flush=True)
                records.write(args.results, **record(args, done))


def place(row: dict[str, Any]) -> int:
    """Of a variant among all."""
    return list(VARIANTS).index(row["name"])


def record(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the file holds, whole after every variant."""
    gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else None
    return {
        "machine": f"{gpu or platform.machine()}, {os.cpu_count()} cores",
        "versions": versions("torch", "python"),
        "command": f"python scripts/ablation.py --data SCANS --workers {args.workers}",
        "workers": args.workers,
        "steps": args.steps,
        "minutes": args.minutes,
        "training": BASE,
        "tests": SETS,
        "rows": sorted(rows, key=lambda row: (row["data"], row["timed"], place(row))),
    }


def run(args: argparse.Namespace, name: str, data: str, timed: bool) -> dict[str, Any]:
    """Train and measure one variant."""
    torch.set_num_threads(args.threads)
    measure.METRICS = tuple(  # the first alone, which is quick
        metric if metric is dice else dataclasses.replace(metric, function=lambda _: math.nan)
        for metric in METRICS
    )
    training = {**BASE, "steps": args.steps, **VARIANTS[name]}
    CODE[training.pop("code", "")]()
    if timed:
        training |= {"minutes": args.minutes, "steps": 10**6}
    tests = dict(SETS[data])
    tests["data"] = str(args.data / tests["data"])
    known = json.loads(Path(tests["data"], "dataset.json").read_text())["cases"]
    training["holdout_cases"] = [id_ for id_ in tests.pop("holdout_cases") if id_ in known]
    folder = args.output / f"{data}-{name}{'-timed' if timed else ''}".replace(" ", "-")
    kept = folder / "training" / "supervoxels"
    if not kept.exists():  # the same for all variants
        kept.parent.mkdir(parents=True)
        (args.output / "supervoxels").mkdir(exist_ok=True)
        kept.symlink_to((args.output / "supervoxels").resolve())
    began = time.monotonic()
    config = CrossValidation(
        **tests,
        output=str(folder),
        training=training,
        methods=("fastproto",),
        protocols=("ep1", "whole"),
        options={"prior": "box"},
        device=args.device,
        progress=False,
    )
    summary = crossval(config)
    log = (folder / "training" / "test" / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in log if "seconds" in line]
    row: dict[str, Any] = {"name": name, "data": data, "timed": timed, "steps": len(steps)}
    row["seconds_a_step"] = float(np.median([step["seconds"] for step in steps]))
    row["training_seconds"] = round(sum(step["seconds"] for step in steps), 1)
    row["seconds"] = round(time.monotonic() - began, 1)
    for result in summary["results"]:
        if result["variant"] == "network":
            row[result["protocol"]] = round(result["mean"][dice.name]["mean"], 4)
            row[result["protocol"] + "_organs"] = {
                organ["organ"]: round(organ[dice.name]["mean"], 4) for organ in result["organs"]
            }
    return row


def without_skips() -> None:
    """The decoder sees nothing of the query but the bottleneck."""
    forward = UNetDecoder.forward
    UNetDecoder.forward = lambda self, feat, enhanced, skips: forward(  # type: ignore[method-assign]
        self, feat, enhanced, [torch.zeros_like(skip) for skip in skips]
    )


def without_decoder() -> None:
    """Prototype scores and bilinear upsampling, trained like that."""

    def decode(self: FewShotUNet, features: Any, prototypes: Any) -> torch.Tensor:
        scores = prototype_scores(features.bottleneck, prototypes, temperature=self.temperature)
        return upsample_scores(scores, self.encoder.output_stride, features.size)

    FewShotUNet.decode = decode  # type: ignore[method-assign]


def superpixels() -> None:
    """Support and query are one slice, changed twice, and a superpixel of it."""

    def by_slices(volumes: Any, **_: Any) -> dict[str, Supervoxels]:
        found = {}
        for case, (image, spacing) in volumes.items():
            finest, parents = [], [np.zeros((SCALES, 1), np.int32)]
            count, numbers = 0, np.zeros((SCALES, 1), np.int32)
            for picture in image:
                part = supervoxels(picture[None], spacing)
                rows = [min(scale, len(part.parents) - 1) for scale in range(SCALES)]
                table = part.parents[rows].astype(np.int32)
                finest.append(np.where(part.finest > 0, part.finest.astype(np.int32) + count, 0))
                parents.append(table[:, 1:] + numbers)
                count += table.shape[1] - 1
                numbers += table.max(axis=1, keepdims=True)
            joined = np.concatenate(parents, axis=1)
            found[case] = Supervoxels(np.concatenate(finest), joined, part.min_volumes)
        return found

    sources.all_supervoxels = by_slices  # type: ignore[attr-defined]


def whole_slices() -> None:
    """No field of view follows the foreground, in training or at inference."""
    from fastproto.segmentation import learn
    from fastproto.training.episodes import labels
    from fastproto.training.episodes import supervoxels as drawn

    def field(case: Any, label: Any, generator: Any) -> tuple[tuple[float, float], float]:
        return (case.extent[0] / 2, case.extent[1] / 2), max(case.extent)

    labels.field_of_view = drawn.field_of_view = field
    learn.DIAMETERS = learn.MARGIN_MM = 1e6


CODE = {
    "": lambda: None,
    "no-skips": without_skips,
    "no-decoder": without_decoder,
    "superpixels": superpixels,
    "whole-slices": whole_slices,
}

if __name__ == "__main__":
    main()
