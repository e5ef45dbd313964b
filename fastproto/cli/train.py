# SPDX-License-Identifier: Apache-2.0
"""``fastproto train``: a thin front of `fastproto.training.train`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fastproto.cli.options import Subparsers, add_runtime_options, new_parser, runtime
from fastproto.errors import ArgumentError

EXAMPLE = """\
  fastproto phantom --out phantom-ct --patients 8
  fastproto train --data phantom-ct --holdout-classes spleen gallbladder \\
      --holdout-cases ct_006 ct_007 --steps 400 --image-size 128 --out run
  fastproto train --data phantom-ct --superpixel-fraction 1 --steps 400 --out run-without-labels
  fastproto train --out run --resume"""

# Options that only steer the command; all others are fields of `TrainConfig`.
_NOT_CONFIGURATION = ("run", "verbose", "device", "threads", "settings", "resume")


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand. Absent options keep the defaults of `TrainConfig`, written once there."""
    parser = new_parser(
        subparsers,
        "train",
        run,
        help="train a model on labelled organs, or without labels",
        description="Train a model that segments from examples. It learns on the base classes; "
        "held-out classes are never a foreground and held-out cases are never read, so that both "
        "can measure it afterwards. The run folder gets model.safetensors, the training state, "
        "log.jsonl and config.json. Ctrl-C is safe: --resume goes on from the last checkpoint.",
        example=EXAMPLE,
        argument_default=argparse.SUPPRESS,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DIR", help="data set: dataset.json with images and labels")
    data.add_argument(
        "--holdout-classes",
        dest="holdout",
        nargs="+",
        type=_class,
        metavar="ORGAN",
        help="names or label values never trained on",
    )
    data.add_argument(
        "--classes",
        nargs="+",
        type=_class,
        metavar="ORGAN",
        help="names or label values to train on (default: all that are not held out)",
    )
    data.add_argument(
        "--holdout-cases", nargs="+", metavar="CASE", help="case ids that training never reads"
    )
    data.add_argument(
        "--validation-cases",
        nargs="+",
        metavar="CASE",
        help="case ids for the validation Dice, not trained on",
    )
    data.add_argument(
        "--superpixel-fraction",
        type=float,
        metavar="SHARE",
        help="share of episodes made of superpixels instead of labels; 1 needs no label at all "
        "(default: 0)",
    )
    data.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the slices the network sees (default: 256)",
    )
    data.add_argument(
        "--plane", choices=("axial", "coronal", "sagittal"), help="slices (default: axial)"
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--out", dest="output", required=True, metavar="RUN", help="run folder to write"
    )
    training.add_argument("--steps", type=int, metavar="N", help="optimiser steps (default: 10000)")
    training.add_argument(
        "--learning-rate", type=float, metavar="RATE", help="peak of the schedule (default: 3e-4)"
    )
    training.add_argument(
        "--shots", type=int, metavar="N", help="support slices per class (default: 1)"
    )
    training.add_argument(
        "--encoder", metavar="NAME", help="resnet18, 34, 50 or 101 (default: resnet34)"
    )
    training.add_argument(
        "--weights",
        metavar="FILE",
        help="encoder weights to start from: a safetensors or torchvision file, or imagenet to "
        "download them (default: from scratch)",
    )
    training.add_argument("--seed", type=int, metavar="N", help="of weights and episodes")
    training.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="any other field of fastproto.training.TrainConfig, such as cycle=0.5",
    )
    training.add_argument(
        "--resume",
        action="store_true",
        default=False,
        help="continue the run in RUN from its last checkpoint, bit for bit; options that are "
        "left out are those of the run",
    )
    training.add_argument(
        "--tensorboard", action="store_true", help="also log for TensorBoard, if it is installed"
    )
    add_runtime_options(parser)


def run(args: argparse.Namespace) -> int:
    """Train, and say where the model is."""
    from fastproto.training import TrainConfig, train

    values: dict[str, Any] = {}
    if args.resume:
        values = TrainConfig.load(Path(args.output, "config.json")).to_dict()
    values |= {name: value for name, value in vars(args).items() if name not in _NOT_CONFIGURATION}
    values |= _settings(args.settings)
    if args.device != "auto":
        values["device"] = args.device
    if "data" not in values:
        raise ArgumentError("--data", found="nothing", allowed="a data set folder")
    with runtime(args):
        folder = train(TrainConfig.from_dict(values), resume=args.resume)
    print(f"{folder}: model.safetensors, log.jsonl")
    return 0


def _class(text: str) -> str | int:
    """A class given by its label value or its name."""
    return int(text) if text.isdigit() else text


def _settings(pairs: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs; a value is JSON where it can be, else text."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ArgumentError("--set", found=pair, allowed="NAME=VALUE")
        try:
            settings[name] = json.loads(text)
        except ValueError:
            settings[name] = text
    return settings
