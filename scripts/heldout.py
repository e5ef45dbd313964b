# SPDX-License-Identifier: Apache-2.0
"""Segment organs and patients that training never saw, and measure it: the tables in README.

Trains on the base classes of a data set, learns each held-out class from one annotated patient
(whose annotation of it training did not use), segments it in the held-out patients, and does the
same with the training-free baseline: prototype scores and bilinear upsampling, same encoder. One
organ at a time, as the literature does; measured in the slices of the organ and in all slices.

    python scripts/heldout.py --data DATASET --holdout-classes 4 6 7 8 \
        --holdout-cases IXI034-HH-1260 IXI039-HH-1261 --steps 1500 --out heldout-ixi
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import fastproto
from fastproto import _library
from fastproto.data import Preprocessing, open_dataset, read_label, read_volume, write_volume
from fastproto.evaluation import evaluate_folder
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
    train(config, resume=(run / "state.safetensors").is_file())  # nothing is left of a finished run
    log = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    minutes = sum(json.loads(line).get("seconds", 0) for line in log) / 60

    model = load_model(run)
    organs = {value: dataset.labels[value] for value in classes}
    image, label = read_volume(annotated.image), read_label(annotated.label)
    methods = {"fastproto": model, "baseline": PrototypeNet.from_unet(model).eval()}
    results: dict[str, dict[str, list[Any]]] = {}
    for name, network in methods.items():
        results[name] = {"organ_slices": [], "all_slices": []}
        for value, organ in organs.items():  # one organ at a time: 1-way, as in training
            task = register(
                network,
                image,
                label,
                labels=organs,
                classes=[value],
                slices=args.slices,
                preprocessing=Preprocessing.from_dict(model.extra["preprocessing"]),
            )
            found = run / name / organ
            for case in dataset.select(args.holdout_cases):
                volume = read_volume(case.image)
                labels = segment_volume(network, task, volume).labels
                write_volume(found / f"{case.id}.nii.gz", labels, like=volume)
            for counted, margin in (("organ_slices", 0), ("all_slices", None)):
                report = evaluate_folder(
                    found, dataset.root, labels={value: organ}, z_margin=margin
                )
                results[name][counted] += json.loads(report.to_json())["organs"]
            dice = [results[name][counted][-1]["dice"]["mean"] for counted in results[name]]
            print(f"{name:<10} {organ:<24} Dice {dice[0]:.3f}, in all slices {dice[1]:.3f}")

    today = datetime.date.today().isoformat()
    record = {
        "date": today,
        "command": command(),
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
        "methods": results,
    }
    if args.out is not None:
        target = RESULTS / f"{today}-{args.out}.json"
        target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"Result: {target}")


def command() -> str:
    """The command line without the places of this machine."""
    words = ["python", "scripts/heldout.py", *sys.argv[1:]]
    for option, value in (("--data", "DATASET"), ("--run", "RUN")):
        if option in words:
            words[words.index(option) + 1] = value
    return shlex.join(words)


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
