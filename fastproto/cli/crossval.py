# SPDX-License-Identifier: Apache-2.0
"""``fastproto crossval``: measure by the field's protocols, beside what a user would do instead."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from fastproto.cli.options import (
    Subparsers,
    add_fields,
    add_runtime_options,
    given,
    new_parser,
    positive,
    read_settings,
    runtime,
    steps,
    whole_number,
)
from fastproto.evaluation.settings import CrossValidation, MethodOptions

EXAMPLE = """\
  fastproto phantom --out phantom-ct --patients 6
  fastproto crossval --data phantom-ct --out crossval --folds 3 --classes liver spleen \\
      --set steps=200 image_size=96
  fastproto crossval --data phantom-ct --out crossval-2 --test-cases ct_004 ct_005 --setting 2 \\
      --groups liver "left kidney,right kidney" --protocols ep1 ep2 --set minutes=5
  fastproto crossval --data phantom-ct --out registration --model none --methods registration"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand; the fields of `CrossValidation` and `MethodOptions` are its options."""
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
        argument_default=argparse.SUPPRESS,
    )
    margin = whole_number("a whole number, or all", all=None)
    groups = {"": parser, "cases": parser.add_mutually_exclusive_group()}
    add_fields(CrossValidation, groups, folds=positive, groups=_group, z_margin=margin)
    add_fields(MethodOptions, groups, slices=positive, adapt_steps=steps, one_scan_steps=positive)
    add_fields(CrossValidation, {"training": parser.add_argument_group("training")})
    add_runtime_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, and print the tables."""
    from fastproto.evaluation.crossval import crossval
    from fastproto.evaluation.report import summary_text

    chosen = given(CrossValidation, args)
    if chosen.get("annotated") == ("all",):
        del chosen["annotated"]
    options = asdict(MethodOptions(**given(MethodOptions, args)))
    options["view"] = options.pop("view")  # the last in results.jsonl
    with runtime(args) as device:
        chosen["training"] = read_settings(chosen.get("training", ()))
        config = CrossValidation(**chosen, options=options, device=str(device))
        print(summary_text(crossval(config, _command(config))))
    print(f"{config.output}: results.jsonl, summary.json")
    return 0


def _group(text: str) -> tuple[str, ...]:
    return tuple(map(str.strip, text.split(",")))


def _command(config: CrossValidation) -> str:
    """The command line, with the names of folders instead of their places on this machine."""
    places = [config.data, config.output, *config.more_data, config.model]
    words = [Path(word).name if word in places else word for word in sys.argv[1:]]
    return shlex.join(["fastproto", *words])
