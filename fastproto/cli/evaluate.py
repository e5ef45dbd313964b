# SPDX-License-Identifier: Apache-2.0
"""``fastproto evaluate``: compare label maps with the truth."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastproto.cli import options
from fastproto.evaluation.metrics import METRICS, NSD_TOLERANCE_MM

HELP = f"compare label maps with the truth: {', '.join(m.title for m in METRICS)}"
DESCRIPTION = """\
Compare label maps with the truth, per organ and per patient. Distances are in mm between
surfaces; the report says how each metric is defined, and how organs count that only one of the
two shows. The status is 0 where every case of the truth was measured, and 2 where the report names
one without a prediction or with a file that cannot be used, or could not be written as JSON."""
EXAMPLE = """\
  fastproto evaluate --prediction results --truth phantom-ct \\
      --labels spleen=2 gallbladder=9 --json scores.json"""


def add_options(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.add_argument("--prediction", **options.ONE_FILE, metavar="MASK",
        help="label map, or a folder of them named as the cases")
    parser.add_argument("--truth", **options.ONE_FILE, metavar="MASK",
        help="label map, folder of them, or data set")
    options.add_label_options(parser)
    parser.add_argument("--tolerance", type=float, default=NSD_TOLERANCE_MM, metavar="MM",
        help=f"distance at which {', '.join(m.title for m in METRICS if m.at_tolerance)} still "
        "counts a surface as right (default: %(default)s)")
    parser.add_argument("--z-margin", type=int, metavar="N",
        help="count only the slices of the organ's extent in the truth and N beyond it "
        "(default: every slice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report as JSON")
    # fmt: on


def run(args: argparse.Namespace) -> int:
    """Print the report.

    Returns:
        0, or 2 where cases of the truth were not measured.
    """
    from fastproto.evaluation import evaluate_folder

    table = options.read_labels(args.labels) if args.labels else None
    report = evaluate_folder(
        args.prediction,
        args.truth,
        labels=table.names if table else None,
        ignore=table.ignore if table else None,
        nsd_tolerance=args.tolerance,
        z_margin=args.z_margin,
    )
    print(report.to_text(), flush=True)  # first: it would be lost if the file cannot be written
    if args.json:
        report.write_json(args.json)
    if left := len(report.failed) + len(report.not_predicted):
        print(f"fastproto: {left} case(s) not measured, as the report says", file=sys.stderr)
        return options.EXIT_SOME_FAILED
    return 0
