# SPDX-License-Identifier: Apache-2.0
"""``fastproto crossval``: measure by the field's protocols, beside what a user would do instead."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from fastproto.cli.options import (
    Subparsers,
    add_runtime_options,
    new_parser,
    positive,
    runtime,
    steps,
)
from fastproto.evaluation.settings import METHODS, PROTOCOLS, USUAL, VIEWS, CrossValidation

EXAMPLE = """\
  fastproto phantom --out phantom-ct --patients 6
  fastproto crossval --data phantom-ct --out crossval --folds 3 --classes liver spleen \\
      --set steps=200 image_size=96
  fastproto crossval --data phantom-ct --out crossval-2 --test-cases ct_004 ct_005 --setting 2 \\
      --groups liver "left kidney,right kidney" --protocols ep1 ep2 --set minutes=5
  fastproto crossval --data phantom-ct --out registration --model none --methods registration"""

# Arguments that are fields of the same name, and those that are options of the methods.
LISTS = ("test_cases", "classes", "more_data", "methods", "protocols")
OPTIONS = ("prior", "slices", "adapt_steps", "one_scan_steps", "view")


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = new_parser(
        subparsers,
        "crossval",
        run,
        help="cross-validation: the field's protocols, compared with other methods",
        description="Train on some patients, learn the organs from one of the others, segment the "
        "rest, and measure; every test patient is the annotated one in turn. EP1 and EP2 are the "
        "protocols of the literature (some annotated slices, only the organ's slices count, no "
        "prior); whole volumes are what a user gets. Each finished measurement is a line of "
        "OUT/results.jsonl: the same command goes on after an interruption. OUT/summary.json holds "
        "the tables.",
        example=EXAMPLE,
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="data set with labels")
    parser.add_argument("--out", required=True, metavar="OUT", help="folder for all results")
    cases = parser.add_mutually_exclusive_group()
    cases.add_argument(
        "--folds",
        type=positive,
        default=CrossValidation.folds,
        metavar="N",
        help="folds, consecutive in the data set's order; the scan after a fold is tested with it "
        "(default: %(default)s)",
    )
    cases.add_argument(
        "--test-cases", nargs="+", default=[], metavar="CASE", help="one fold of these cases"
    )
    parser.add_argument(
        "--annotated",
        nargs="+",
        default=["all"],
        metavar="CASE",
        help="cases to learn from, each in turn (default: all, every test case)",
    )
    parser.add_argument(
        "--classes", nargs="+", default=[], metavar="ORGAN", help="organs, by name or label value"
    )
    parser.add_argument(
        "--setting",
        type=int,
        choices=(1, 2),
        default=CrossValidation.setting,
        help="1: training slices may show the organs, unnamed; 2: training slices with any organ "
        "of the group are dropped (default: %(default)s)",
    )
    parser.add_argument(
        "--groups",
        nargs="+",
        default=[],
        metavar="ORGAN,ORGAN",
        help="setting 2: organs held out together; one training each",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=USUAL,
        metavar="METHOD",
        help="; ".join(f"{name}: {meaning}" for name, meaning in METHODS.items())
        + f" (default: all but {', '.join(METHODS.keys() - USUAL)})",
    )
    parser.add_argument(
        "--protocols",
        nargs="+",
        choices=PROTOCOLS,
        default=PROTOCOLS,
        metavar="PROTOCOL",
        help="ep1: an annotated slice for each third of the organ; ep2: one slice for all of it; "
        "whole: whole volumes (default: all)",
    )
    parser.add_argument(
        "--z-margin",
        default="0",
        metavar="N",
        help="EP1 and EP2: slices beyond the organ that count as well, or all (default: 0)",
    )
    parser.add_argument(
        "--view",
        choices=VIEWS,
        default="organ",
        help="EP1 and EP2: field of view, around the organ's expected place or the whole body "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--prior",
        choices=("box", "affine", "deformable"),
        default="deformable",
        help="what network and prior use; all are measured alone (default: %(default)s)",
    )
    parser.add_argument(
        "--slices",
        type=positive,
        default=12,
        metavar="N",
        help="annotated slices of an organ, for whole volumes (default: %(default)s)",
    )
    parser.add_argument(
        "--adapt-steps",
        type=steps,
        default="auto",
        metavar="N",
        help="of the method adapted (default: %(default)s)",
    )
    parser.add_argument(
        "--one-scan-steps",
        type=positive,
        default=300,
        metavar="N",
        help="of the method one-scan (default: %(default)s)",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--model",
        metavar="RUN",
        help="run folder, model file or base: train nothing; none: only registration",
    )
    training.add_argument(
        "--more-data", nargs="+", default=[], metavar="DIR", help="further data to train on"
    )
    training.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="fields of fastproto.training.TrainConfig, such as minutes=30; without more, training "
        "sees no label",
    )
    add_runtime_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, and print the tables."""
    from fastproto.cli.train import read_settings
    from fastproto.errors import ArgumentError
    from fastproto.evaluation.crossval import crossval
    from fastproto.evaluation.report import summary_text

    if args.z_margin != "all" and not args.z_margin.isdigit():
        raise ArgumentError("--z-margin", found=args.z_margin, allowed="a whole number, or all")
    with runtime(args) as device:
        lists: dict[str, Any] = {name: tuple(getattr(args, name)) for name in LISTS}
        config = CrossValidation(
            **lists,
            data=args.data,
            output=args.out,
            folds=args.folds,
            setting=args.setting,
            model=args.model,
            groups=tuple(tuple(map(str.strip, group.split(","))) for group in args.groups),
            annotated=() if args.annotated == ["all"] else tuple(args.annotated),
            training=read_settings(args.settings),
            z_margin=None if args.z_margin == "all" else int(args.z_margin),
            options={name: getattr(args, name) for name in OPTIONS},
            device=str(device),
        )
        print(summary_text(crossval(config, _command(args))))
    print(f"{args.out}: results.jsonl, summary.json")
    return 0


def _command(args: argparse.Namespace) -> str:
    """The command line, with the names of folders instead of their places on this machine."""
    places = [args.data, args.out, *args.more_data, *([args.model] if args.model else [])]
    words = [Path(word).name if word in places else word for word in sys.argv[1:]]
    return shlex.join(["fastproto", *words])
