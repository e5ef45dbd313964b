# SPDX-License-Identifier: Apache-2.0
"""``fastproto train``: a thin front of `fastproto.training.train`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fastproto.cli import options
from fastproto.errors import require
from fastproto.training.config import TrainConfig

HELP = "train a model on scans of your own, without labels or with some"
DESCRIPTION = """\
Train a model that segments from examples. It needs no label: it learns to find pieces of tissue
(supervoxels) again, in the same slice under random changes or in a neighbouring one. Where a data
set has labels, a share of the training is on them; held-out classes are never a foreground and
held-out cases are never read, so that both can measure it afterwards. The run folder gets
model.safetensors, the training state, log.jsonl and config.json. Ctrl-C is safe: --resume goes on
from the last checkpoint. On N GPUs: torchrun --nproc-per-node N -m fastproto train ..."""
EXAMPLE = """\
  fastproto train --data scans-ct more/scans-mr --model base --minutes 60 --out run
  fastproto phantom --out phantom-ct --patients 8
  fastproto train --data phantom-ct --holdout-classes spleen gallbladder \\
      --holdout-cases ct_006 ct_007 --minutes 5 --out run
  fastproto train --out run --resume"""

_UNLIMITED = 10**9  # steps, where minutes decide


def add_options(parser: argparse.ArgumentParser) -> None:
    """Absent options keep the defaults of `TrainConfig`, written once there."""
    parser.argument_default = argparse.SUPPRESS
    groups = {name: parser.add_argument_group(name) for name in ("data", "training")}
    options.add_fields(TrainConfig, groups)
    # fmt: off
    groups["training"].add_argument("--set", dest="settings", nargs="+", action="extend",
        default=[], metavar="NAME=VALUE",
        help="any other field of fastproto.training.TrainConfig, such as absent_fraction=0.1")
    groups["training"].add_argument("--resume", action="store_true", default=False,
        help="continue the run in RUN from its last checkpoint, bit for bit; options that are "
        "left out are those of the run. More steps or minutes than it had lengthen it, and the "
        "learning rate rises and falls anew from there")
    # fmt: on
    options.add_runtime_options(parser)


def run(args: argparse.Namespace) -> int:
    """Train, and say where the model is."""
    from fastproto.training import train

    values: dict[str, Any] = {}
    if args.resume:
        values = TrainConfig.load(Path(args.output, "config.json")).to_dict()
    chosen = options.given(TrainConfig, args)
    if "minutes" in chosen and not args.resume:
        chosen.setdefault("steps", _UNLIMITED)
    values |= chosen | options.read_settings(args.settings)
    if args.device != "auto":
        values["device"] = args.device
    require("data" in values, "--data", found="nothing", allowed="folders of scans")
    with options.runtime(args):
        folder = train(TrainConfig.from_dict(values), resume=args.resume)
    if os.environ.get("RANK", "0") == "0":  # of several processes the first one speaks
        print(f"{folder}: model.safetensors, log.jsonl")
    return 0
