# SPDX-License-Identifier: Apache-2.0
"""``fastproto phantom``: a data set of synthetic patients."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastproto.cli import options

HELP = "write a data set of synthetic patients"
DESCRIPTION = """\
Write a data set of synthetic abdominal patients as NIfTI: images/, labels/ and dataset.json.
Anatomy, contrast and noise vary from patient to patient; the same seed always gives the same
patients, and the same anatomy in CT and MR. Good for trying the program out, not for judging how
it does on real scans."""
EXAMPLE = """\
  fastproto phantom --out phantom-ct --patients 8
  fastproto phantom --out phantom-mr --patients 8 --modality mr --seed 7"""


def add_options(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--patients", type=options.positive, default=8, metavar="N",
        help="default: %(default)s")
    parser.add_argument("--modality", choices=("ct", "mr"), default="ct",
        help="grey values in HU, or T2-like with a bias field (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    # fmt: on


def run(args: argparse.Namespace) -> int:
    """Write the data set."""
    from fastproto.data.phantom import write_phantom

    folder = write_phantom(args.out, patients=args.patients, modality=args.modality, seed=args.seed)
    print(f"{folder}: {args.patients} {args.modality.upper()} patients")
    return 0
