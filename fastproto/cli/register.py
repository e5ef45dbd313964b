# SPDX-License-Identifier: Apache-2.0
"""``fastproto register``: one annotated scan becomes a reusable task file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fastproto.cli.options import (
    Subparsers,
    add_label_options,
    add_runtime_options,
    add_series_option,
    choose_classes,
    new_parser,
    positive,
    read_labels,
    runtime,
)
from fastproto.errors import LabelError

if TYPE_CHECKING:
    from fastproto.data.volume import Volume
    from fastproto.nn.base import FewShotModel
    from fastproto.segmentation import Task

EXAMPLE = """\
  fastproto register --model run --image phantom-ct/images/ct_000.nii.gz \\
      --label phantom-ct/labels/ct_000.nii.gz --labels spleen=2 gallbladder=9 -o organs.task
  fastproto segment --model run --task organs.task -i phantom-ct/images/ct_007.nii.gz -o results"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = new_parser(
        subparsers,
        "register",
        run,
        help="turn one annotated scan into a small, reusable task file",
        description="Learn the organs drawn in one scan. Nothing is trained: the model encodes a "
        "few annotated slices, and what it found is kept in a file of a few megabytes that "
        "`fastproto segment` uses for any number of scans. The file holds no image, no path and "
        "no patient data. It works with the model it was made with and no other.",
        example=EXAMPLE,
    )
    add_model_option(parser)
    parser.add_argument(
        "--image", type=Path, required=True, metavar="SCAN", help="image file or DICOM folder"
    )
    parser.add_argument(
        "--label", type=Path, required=True, metavar="MASK", help="label map on the scan's grid"
    )
    add_support_options(parser)
    add_series_option(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="TASK", help="task file to write"
    )
    add_runtime_options(parser)


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """``--model`` and ``--backend``."""
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="RUN",
        help="run folder of `fastproto train`, or its model.safetensors",
    )
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help="force a backend of the fused operation; `fastproto info` lists them",
    )


def add_support_options(parser: argparse._ActionsContainer) -> None:
    """What to take from the annotated scan: ``--labels``, ``--classes``, ``--slices``."""
    add_label_options(parser)
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="ORGAN",
        help="register only these names or values; what else is drawn counts as background. "
        "Default: the NAME=VALUE pairs of --labels, or else everything drawn",
    )
    parser.add_argument(
        "--slices",
        type=positive,
        default=10,
        metavar="N",
        help="slices to learn from, spread evenly over every organ, of which each gets at least "
        "one; as many slices without organs show what else there is (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Register the scan and write the task."""
    from fastproto.data.volume import read_volume
    from fastproto.segmentation import load_model

    with runtime(args) as device:
        model = load_model(args.model, backend=args.backend).to(device)
        image = read_volume(args.image, series=args.series)
        task = register_support(model, image, args.label, args)
    task.save(args.output)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
    names = {0: "background", **task.labels}
    for (value, name), count in zip(names.items(), task.prototypes.counts()[0], strict=True):
        print(f"  {value:3d}  {name:<24} {count:5d} prototypes")
    return 0


def register_support(
    model: FewShotModel, image: Volume, label_path: Path, args: argparse.Namespace
) -> Task:
    """Register one annotated scan as ``args`` of `add_support_options` say."""
    from fastproto.data.volume import read_label
    from fastproto.segmentation import register

    labels = read_labels(args.labels) if args.labels else None
    classes = None
    if args.classes:
        classes = _chosen(args.classes, labels)
    elif labels and "=" in args.labels[0]:
        classes = list(labels)
    return register(
        model,
        image,
        read_label(label_path),
        labels=labels,
        classes=classes,
        slices=args.slices,
    )


def _chosen(items: list[str], labels: dict[int, str] | None) -> list[int]:
    """Label values of ``--classes``; without a table of names they must be values."""
    if labels is not None:
        return choose_classes(items, labels, "--classes")
    if names := [item for item in items if not item.isdigit()]:
        raise LabelError(
            "--classes",
            found=", ".join(names),
            allowed="label values, or names that --labels explains",
        )
    return [int(item) for item in items]
