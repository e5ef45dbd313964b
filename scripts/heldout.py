# SPDX-License-Identifier: Apache-2.0
"""Segment organs and patients that training never saw, and measure it: the tables in README.

Trains on the base classes of a data set, learns the held-out classes from one annotated patient
whose annotation of them training did not use, segments them in the held-out patients, and does the
same with the training-free baseline (prototype scores and bilinear upsampling, same encoder).

    python scripts/heldout.py --data ../shared/data/ixi_brain_mr --holdout-classes 4 6 7 8 \
        --holdout-cases IXI034-HH-1260 IXI039-HH-1261 --steps 1500 --image-size 160
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fastproto
from fastproto import _library
from fastproto.data import open_dataset, read_label, read_volume, write_volume
from fastproto.evaluation import Report, evaluate_folder
from fastproto.nn import PrototypeNet
from fastproto.segmentation import load_model, register, segment_volume
from fastproto.training import TrainConfig, train

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def main() -> None:
    """Train (unless the run is there already), segment, evaluate, write the result."""
    args = parse()
    run = Path(args.run or tempfile.mkdtemp(prefix="heldout-"))
    dataset = open_dataset(args.data)
    classes = dataset.label_ids([int(c) if c.isdigit() else c for c in args.holdout_classes])
    held_out = {case.id for case in dataset.select(args.holdout_cases)}
    annotated = next(c for c in dataset.cases if c.id not in held_out)
    config = TrainConfig.from_dict(
        {
            "data": str(args.data),
            "output": str(run),
            "holdout": classes,
            "holdout_cases": args.holdout_cases,
            "image_size": args.image_size,
            "steps": args.steps,
            "seed": args.seed,
            **dict(setting(pair) for pair in args.set),
        }
    )
    started = time.perf_counter()
    if not (run / "model.safetensors").is_file():
        train(config)
    minutes = (time.perf_counter() - started) / 60

    model = load_model(run)
    organs = {value: dataset.labels[value] for value in classes}
    image, label = read_volume(annotated.image), read_label(annotated.label)
    methods = {"fastproto": model, "baseline": PrototypeNet.from_unet(model).eval()}
    reports: dict[str, dict[str, Report]] = {}
    for name, network in methods.items():
        task = register(
            network,
            image,
            label,
            labels=organs,
            classes=classes,
            slices=args.slices,
            preprocessing=None if network is model else task.preprocessing,  # noqa: F821
        )
        for case in dataset.select(args.holdout_cases):
            volume = read_volume(case.image)
            found = segment_volume(network, task, volume).labels
            write_volume(run / name / f"{case.id}.nii.gz", found, like=volume)
        reports[name] = {
            "organ_slices": evaluate_folder(run / name, dataset.root, labels=organs, z_margin=0),
            "all_slices": evaluate_folder(run / name, dataset.root, labels=organs),
        }
        for counted, report in reports[name].items():
            print(f"\n{name}, {counted}\n{report.to_text()}")

    today = datetime.date.today().isoformat()
    record = {
        "date": today,
        "command": shlex.join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "fastproto": fastproto.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cpu_level": _library.cpu_level(),
        },
        "data": dataset.name,
        "annotated": annotated.id,
        "queries": list(args.holdout_cases),
        "base_classes": [name for value, name in dataset.labels.items() if value not in classes],
        "training": config.to_dict() | {"data": Path(args.data).name, "output": "-"},
        "training_minutes": round(minutes, 1),
        "methods": {
            name: {counted: json.loads(report.to_json()) for counted, report in both.items()}
            for name, both in reports.items()
        },
    }
    if args.out is not None:
        target = RESULTS / f"{today}-{args.out}.json"
        target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"Result: {target}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--holdout-classes", nargs="+", required=True)
    parser.add_argument("--holdout-cases", nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slices", type=int, default=10, help="support slices of the annotation")
    parser.add_argument("--set", nargs="*", default=[], help="other fields of TrainConfig")
    parser.add_argument("--run", type=Path, help="run folder; an existing model is used again")
    parser.add_argument("--out", help="name of the result file in benchmarks/results")
    return parser.parse_args()


def setting(pair: str) -> tuple[str, Any]:
    """``NAME=VALUE``, VALUE as JSON where it can be."""
    name, _, text = pair.partition("=")
    try:
        return name, json.loads(text)
    except ValueError:
        return name, text


if __name__ == "__main__":
    main()
