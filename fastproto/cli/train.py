# SPDX-License-Identifier: Apache-2.0
"""``fastproto train``: a thin front of `fastproto.training.train`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fastproto.cli.options import Subparsers, add_runtime_options, new_parser, runtime
from fastproto.errors import ArgumentError
from fastproto.training.config import AUTO, TrainConfig

EXAMPLE = """\
  fastproto train --data scans-ct more/scans-mr --model base --minutes 60 --out run
  fastproto phantom --out phantom-ct --patients 8
  fastproto train --data phantom-ct --holdout-classes spleen gallbladder \\
      --holdout-cases ct_006 ct_007 --minutes 5 --out run
  fastproto train --out run --resume"""

_UNLIMITED = 10**9  # steps, where minutes decide
# Options that only steer the command; all others are fields of `TrainConfig`.
_NOT_CONFIGURATION = ("run", "verbose", "device", "threads", "settings", "resume")


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand. Absent options keep the defaults of `TrainConfig`, written once there."""
    parser = new_parser(
        subparsers,
        "train",
        run,
        help="train a model on scans of your own, without labels or with some",
        description="Train a model that segments from examples. It needs no label: it learns to "
        "find pieces of tissue (supervoxels) again, in the same slice under random changes or in a "
        "neighbouring one. Where a data set has labels, a share of the training is on them; "
        "held-out classes are never a foreground and "
        "held-out cases are never read, so that both can measure it afterwards. The run folder "
        "gets model.safetensors, the training state, log.jsonl and config.json. Ctrl-C is safe: "
        "--resume goes on from the last checkpoint.",
        example=EXAMPLE,
        argument_default=argparse.SUPPRESS,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        nargs="+",
        metavar="DIR",
        help="folders of scans, or data sets: dataset.json with images, and labels or not; CT and "
        "MR may be mixed",
    )
    data.add_argument(
        "--label-fraction",
        type=float,
        metavar="SHARE",
        help="share of the episodes that is drawn from labels, where there are some; 0 never looks "
        f"at a label {_default('label_fraction')}",
    )
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
        "--image-size",
        type=int,
        metavar="PIXELS",
        help=f"side of the network's images; auto: {AUTO['image_size'][0]} on a GPU, "
        f"{AUTO['image_size'][1]} on a CPU {_default('image_size')}",
    )
    data.add_argument(
        "--plane",
        choices=("axial", "coronal", "sagittal"),
        help="slices to learn from; with axial ones, those of the other planes as well "
        f"{_default('plane')}",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--out", dest="output", required=True, metavar="RUN", help="run folder to write"
    )
    training.add_argument(
        "--model",
        dest="start",
        metavar="RUN",
        help="model to go on from: base, a run folder or a model.safetensors; it decides on the "
        "network (default: from scratch)",
    )
    training.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="end after so many minutes instead of after a number of steps; with --steps as well, "
        "whichever comes first",
    )
    training.add_argument(
        "--steps", type=int, metavar="N", help=f"optimiser steps {_default('steps')}"
    )
    training.add_argument(
        "--batch", type=int, metavar="N", help=f"episodes in a step {_default('batch')}"
    )
    training.add_argument(
        "--learning-rate",
        type=float,
        metavar="RATE",
        help=f"peak of the schedule {_default('learning_rate')}",
    )
    training.add_argument(
        "--shots", type=int, metavar="N", help=f"support slices per class {_default('shots')}"
    )
    training.add_argument(
        "--encoder",
        metavar="NAME",
        help=f"resnet18, 34, 50, 101 or auto: {AUTO['encoder'][0]} on a GPU, "
        f"{AUTO['encoder'][1]} on a CPU {_default('encoder')}",
    )
    training.add_argument(
        "--weights",
        metavar="FILE",
        help="encoder weights to start from: a safetensors or torchvision file, or imagenet to "
        "download them (default: from scratch)",
    )
    training.add_argument(
        "--seed", type=int, metavar="N", help=f"of weights and episodes {_default('seed')}"
    )
    training.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="any other field of fastproto.training.TrainConfig, such as absent_fraction=0.1",
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
    from fastproto.training import train

    values: dict[str, Any] = {}
    if args.resume:
        values = TrainConfig.load(Path(args.output, "config.json")).to_dict()
    given = {name: value for name, value in vars(args).items() if name not in _NOT_CONFIGURATION}
    if "minutes" in given and not args.resume:
        given.setdefault("steps", _UNLIMITED)
    values |= given
    values |= read_settings(args.settings)
    if args.device != "auto":
        values["device"] = args.device
    if "data" not in values:
        raise ArgumentError("--data", found="nothing", allowed="folders of scans")
    with runtime(args):
        folder = train(TrainConfig.from_dict(values), resume=args.resume)
    print(f"{folder}: model.safetensors, log.jsonl")
    return 0


def _default(name: str) -> str:
    """What ``TrainConfig`` takes where the option is absent, for its help."""
    return f"(default: {TrainConfig.__dataclass_fields__[name].default})"


def _class(text: str) -> str | int:
    """A class given by its label value or its name."""
    return int(text) if text.isdigit() else text


def read_settings(pairs: list[str]) -> dict[str, Any]:
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
