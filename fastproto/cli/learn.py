# SPDX-License-Identifier: Apache-2.0
"""``fastproto learn``: one annotated scan becomes a reusable task file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fastproto._files import check_writable
from fastproto._memory import enough_memory
from fastproto.cli import options
from fastproto.defaults import POOR_DICE
from fastproto.errors import LabelError, require, warn

if TYPE_CHECKING:
    from fastproto.nn.base import FewShotModel
    from fastproto.segmentation import Task

HELP = "turn one annotated scan into a small, reusable task file"
DESCRIPTION = """\
Learn the organs drawn in one scan: the model encodes a few annotated slices and is adapted to
them in a short training. What comes of it is kept in a file that `fastproto segment` uses for any
number of scans, and that works with the model it was made with and no other. Slices left out of
it say how well it will do. The file holds no path and no name, but a picture of the scan at low
resolution unless --prior is box."""
EXAMPLE = """\
  fastproto learn --image phantom-ct/images/ct_000.nii.gz \\
      --label phantom-ct/labels/ct_000.nii.gz --classes spleen "left kidney" -o organs.task
  fastproto segment --task organs.task -i phantom-ct/images/ct_007.nii.gz -o results"""

_ROW = "{:>7}  {:<24} {:>6} {:>10} {:>13} {:>14}"  # of the report on what was learned


# fmt: off
def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_option(parser)
    parser.add_argument("--image", **options.ONE_FILE, metavar="SCAN",
        help="image file, DICOM folder or multi-frame DICOM file")
    parser.add_argument("--label", **options.ONE_FILE, metavar="MASK",
        help="label map on the scan's grid, or its DICOM segmentation")
    add_example_options(parser)
    options.add_series_option(parser)
    options.add_force_option(parser)
    parser.add_argument("-o", "--output", **options.ONE_FILE, metavar="TASK",
        help="task file to write")
    options.add_runtime_options(parser)


def add_model_option(parser: options.Options, *, backend: bool = True) -> None:
    """``--model`` and, where it computes with it, ``--backend``."""
    parser.add_argument("--model", default="base", metavar="RUN",
        help="run folder of `fastproto train`, or its model.safetensors "
        "(default: %(default)s, the model that comes with the package)")
    if backend:
        parser.add_argument("--backend", metavar="NAME",
            help="force a backend of the fused operation; `fastproto info` lists them")


def add_example_options(parser: options.Options) -> None:
    """What to take from an annotated scan, and how. What is left out is None."""
    options.add_label_options(parser)
    parser.add_argument("--classes", nargs="+", action="extend", metavar="ORGAN",
        help="learn only these names or values; what else is drawn counts as background "
        "(default: the NAME=VALUE pairs of --labels, or else everything drawn)")
    parser.add_argument("--slices", type=options.positive, metavar="N",
        help="slices of every organ to learn from, spread evenly over it; a few beyond its ends "
        "come on top (default: 12)")
    parser.add_argument("--adapt", type=options.steps, metavar="STEPS",
        help="training steps on the annotated scan, 0 for none; auto: as many as a few minutes "
        "allow (default: auto)")
    parser.add_argument("--prior", choices=("box", "affine", "deformable"),
        help="how an organ's place is carried over to another scan: by the box of the body, or by "
        "registration of the two scans (default: deformable)")
# fmt: on


def run(args: argparse.Namespace) -> int:
    """Learn the scan's organs and write the task."""
    from fastproto.segmentation import load_model

    check_writable(args.output)
    with options.runtime(args) as device, enough_memory(args.image):
        model = load_model(args.model, backend=args.backend).to(device)
        task = learn_example(model, args.image, args.label, args, series=args.series)
    task.save(args.output)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
    return 0


def learn_example(
    model: FewShotModel,
    image: Path,
    label: Path,
    args: argparse.Namespace,
    *,
    series: str | None = None,
    fingerprint: str | None = None,
) -> Task:
    """Learn one annotated scan as ``args`` of `add_example_options` say, and report on it."""
    from fastproto.data.dataset import labels_of
    from fastproto.data.label_table import find_labels
    from fastproto.data.volume import check_labels, read_label, read_volume
    from fastproto.segmentation import register

    scan = read_volume(image, series=series)
    mask = read_label(label, like=scan)
    table = options.read_labels(args.labels) if args.labels else labels_of(label)
    labels = table.names if table else None
    ignore = table.ignore if table else None
    if table and not args.labels:
        drawn = (value for value in check_labels(mask) if value != ignore)
        labels = {value: table.names.get(value, f"label {value}") for value in drawn}
    classes = None
    if args.classes and labels is not None:
        classes = find_labels(args.classes, labels, "--classes")
    elif args.classes:
        names = ", ".join(repr(item) for item in args.classes if not item.isdecimal())
        allowed = "label values, or names that --labels or a dataset.json explains"
        require(not names, "--classes", found=names, allowed=allowed, error=LabelError)
        classes = [int(item) for item in args.classes]
    elif labels and args.labels and "=" in args.labels[0]:
        classes = list(labels)
    chosen = {name: getattr(args, name) for name in ("slices", "adapt", "prior")}
    given = {"adapt": "auto"} | {k: v for k, v in chosen.items() if v is not None}
    print(f"learning from {image}: minutes on a CPU")  # the next words of a log come after them
    with options.progress_bar("adapting", "step") as advance:
        task = register(
            model,
            scan,
            mask,
            labels=labels,
            classes=classes,
            ignore=ignore,
            progress=advance,
            fingerprint=fingerprint,
            force=args.force,
            **given,
        )
    how = f"adapted in {task.adapted_steps} steps" if task.adapted_steps else "without adaptation"
    print(f"{how}; predicted: what the network alone reaches in slices left out")
    print(_ROW.format("label", "organ", "slices", "prototypes", "field of view", "predicted Dice"))
    for organ in task.organs:
        prototypes = sum(map(sum, organ.prototypes.counts()))
        expected = "-" if organ.expected_dice is None else f"{organ.expected_dice:.2f}"
        side = f"{organ.side:.0f} mm"
        row = (organ.value, organ.name, len(organ.slices), prototypes, side, expected)
        print(_ROW.format(*row))
    for organ in task.organs:
        if organ.expected_dice is not None and organ.expected_dice < POOR_DICE:
            warn(
                organ.name,
                "the network could not learn this organ from this scan (Dice "
                f"{organ.expected_dice:.2f} in slices left out); expect poor results",
            )
    return task
