# SPDX-License-Identifier: Apache-2.0
"""``fastproto crossval``: measure by the field's protocols, beside what a user would do instead."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from fastproto.cli import options
from fastproto.evaluation.settings import CrossValidation, MethodOptions

HELP = "cross-validation: the field's protocols, compared with other methods"
DESCRIPTION = """\
Train on some patients, learn the organs from one of the others, segment the rest, and measure;
every test patient is the annotated one in turn. EP1 and EP2 are the protocols of the literature
(some annotated slices, only the organ's slices count, no prior); whole volumes are what a user
gets. Each finished measurement is a line of OUT/results.jsonl: the same command goes on after an
interruption. OUT/summary.json holds the tables."""
EXAMPLE = """\
  fastproto phantom --out phantom-ct --patients 6
  fastproto crossval --data phantom-ct --out crossval --folds 3 --classes liver spleen \\
      --set steps=200 image_size=96
  fastproto crossval --data phantom-ct --out crossval-2 --test-cases ct_004 ct_005 --setting 2 \\
      --groups liver "left kidney,right kidney" --protocols ep1 ep2 --set minutes=5
  fastproto crossval --data phantom-ct --out registration --model none --methods registration"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The fields of `CrossValidation` and `MethodOptions` are its options."""
    parser.argument_default = argparse.SUPPRESS
    margin = options.whole_number("a whole number, or all", all=None)
    groups = {"": parser, "cases": parser.add_mutually_exclusive_group()}
    positive, steps = options.positive, options.steps
    options.add_fields(CrossValidation, groups, folds=positive, groups=_group, z_margin=margin)
    options.add_fields(
        MethodOptions, groups, slices=positive, adapt_steps=steps, one_scan_steps=positive
    )
    options.add_fields(CrossValidation, {"training": parser.add_argument_group("training")})
    options.add_runtime_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, and print the tables."""
    from fastproto.evaluation.crossval import crossval
    from fastproto.evaluation.report import summary_text

    chosen = options.given(CrossValidation, args)
    if chosen.get("annotated") == ("all",):
        del chosen["annotated"]
    chosen["options"] = asdict(MethodOptions(**options.given(MethodOptions, args)))
    chosen["options"]["view"] = chosen["options"].pop("view")  # the last in results.jsonl
    with options.runtime(args) as device:
        chosen["training"] = options.read_settings(chosen.get("training", ()))
        config = CrossValidation(**chosen, device=str(device))
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
