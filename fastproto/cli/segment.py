# SPDX-License-Identifier: Apache-2.0
"""``fastproto segment``: find the organs of an annotated scan in new scans."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastproto._files import check_writable
from fastproto._memory import enough_memory
from fastproto.cli import options
from fastproto.cli.learn import add_example_options, add_model_option, learn_example
from fastproto.errors import FastprotoError, FastprotoWarning, VolumeError, require

if TYPE_CHECKING:
    from fastproto.segmentation import Segmentation, Task

HELP = "find the organs of an annotated scan in new scans"
DESCRIPTION = """\
Segment one scan, a DICOM series, or every scan of a folder, as an annotated scan shows. The
result has the grid of its scan (size, spacing, origin, direction) and the label values of the
annotated scan. Where one scan of a folder fails, the others still go on."""
EXAMPLE = """\
  fastproto phantom --out phantom-ct --patients 8
  fastproto segment --example phantom-ct/images/ct_000.nii.gz phantom-ct/labels/ct_000.nii.gz \\
      --classes spleen "left kidney" -i phantom-ct/images -o results
  fastproto segment --task organs.task -i phantom-ct/images/ct_007.nii.gz -o ct_007.nii.gz"""

EXIT_SOME_FAILED = 2

_EXAMPLE_OPTIONS = ("labels", "classes", "slices", "adapt")  # which a task file has decided on


def add_options(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    add_model_option(parser)
    source = parser.add_argument_group("what to find (one of the two)")
    source.add_argument("--example", nargs=2, action="append", type=Path, metavar=("SCAN", "MASK"),
        help="annotated scan and its label map, learned on the spot; given more than once, all "
        "examples count alike")
    source.add_argument("--task", action="append", type=Path, metavar="TASK",
        help="task file of `fastproto learn`; can be given more than once as well")
    add_example_options(parser.add_argument_group("how to learn an example"))
    parser.add_argument("-i", "--input", type=Path, required=True, metavar="SCAN",
        help="image file, DICOM series folder, or folder of these")
    options.add_series_option(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT",
        help="label map to write (.nii.gz, .nii, .nrrd, .mha) or, for several scans, the folder "
        "for SCAN.nii.gz; an older result is replaced only by a complete new one")
    parser.add_argument("--probabilities", action="store_true",
        help="also write OUT-probabilities/VALUE-ORGAN.nii.gz, one float32 volume per organ: "
        "3-D files open in every viewer, and only one organ at a time needs to be loaded")
    parser.add_argument("--uncertainty", action="store_true",
        help="also write OUT-uncertainty.nii.gz: how undecided every voxel is, in bits")
    parser.add_argument("--overlay", action=argparse.BooleanOptionalAction, default=True,
        help="write OUT.png as well: slices with coloured organs")
    parser.add_argument("--batch-size", type=options.positive, metavar="N",
        help="slices at once (default: 8)")
    options.add_runtime_options(parser)
    # fmt: on


def run(args: argparse.Namespace) -> int:
    """Segment all scans; report those that fail and go on with the next."""
    from fastproto.segmentation import Task, load_model, segment_volume

    _check_source(args)
    jobs = plan_outputs(args.input, find_scans(args.input), args.output)
    check_writable(jobs[0][1])
    with options.runtime(args) as device:
        model = load_model(args.model, backend=args.backend).to(device)
        fingerprint = model.fingerprint()  # nothing below changes the weights
        if args.task:
            tasks = [Task.load(path) for path in args.task]
            for task, path in zip(tasks, args.task, strict=True):
                task.check_model(model, name=path, fingerprint=fingerprint)
        else:
            tasks = []
            for image, label in args.example:
                with enough_memory(image):
                    task = learn_example(model, image, label, args, fingerprint=fingerprint)
                tasks.append(task)
        segment = partial(
            segment_volume,
            model,
            tasks,
            batch_size=args.batch_size,
            probabilities=args.probabilities or args.uncertainty,
            prior=args.prior,
            fingerprint=fingerprint,
        )
        failed = 0
        for scan, output in jobs:
            try:
                with enough_memory(scan):
                    _segment_scan(segment, tasks, scan, output, args)
            except FastprotoError as error:
                if len(jobs) == 1:
                    raise
                failed += 1
                print(f"fastproto: error: {error}", file=sys.stderr)
    if failed:
        print(f"fastproto: {failed} of {len(jobs)} scans failed", file=sys.stderr)
        return EXIT_SOME_FAILED
    return 0


def find_scans(path: Path) -> list[Path]:
    """Scans that ``path`` stands for: itself, or the image files and DICOM series in the folder.

    Raises:
        VolumeError: There is no scan.
    """
    from fastproto.data.volume import READABLE, volume_suffix

    if not path.is_dir():
        return [path]
    try:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        scans = [
            entry
            for entry in entries
            if (entry.is_file() and volume_suffix(entry))
            or (entry.is_dir() and _holds_dicom(entry))
        ]
    except OSError as error:
        raise VolumeError(
            path, found=f"what cannot be read ({error})", allowed="files and folders you may read"
        ) from error
    require(
        scans or any(entry.is_file() for entry in entries),
        path,
        found="no image file and no DICOM series",
        allowed=f"files ending in {', '.join(READABLE)}, or folders of DICOM slices",
        error=VolumeError,
    )
    return scans or [path]  # `read_volume` says whether it is a series, and what is wrong with it


def _holds_dicom(folder: Path) -> bool:
    """Whether a folder has a DICOM file: 128 bytes of preamble, then ``DICM``."""
    for entry in filter(Path.is_file, folder.iterdir()):
        with entry.open("rb") as file:
            if file.read(132)[128:] == b"DICM":
                return True
    return False


def plan_outputs(source: Path, scans: Sequence[Path], output: Path) -> list[tuple[Path, Path]]:
    """Pair every scan found at ``source`` with the label map to write for it.

    Where ``source`` is the one scan, ``output`` may be a file.

    Raises:
        ArgumentError: Several scans for one file, two scans of one name, a result that would
            overwrite a scan, or a format that is not written.
    """
    from fastproto.data.volume import WRITABLE, volume_suffix

    if suffix := volume_suffix(output):
        writable = suffix in WRITABLE and output.name.endswith(suffix)
        require(writable, "--output", found=str(output), allowed=", ".join(WRITABLE))
        found = f"the file {output} for the {len(scans)} scans of a folder"
        require(list(scans) == [source], "--output", found=found, allowed="a folder")
        jobs = [(source, output)]
    else:
        names = [stem(scan) for scan in scans]
        if all(name.endswith("_0000") for name in names):  # nnU-Net's mark of a single channel
            names = [name.removesuffix("_0000") for name in names]
        jobs = [(scan, output / f"{name}.nii.gz") for scan, name in zip(scans, names, strict=True)]
    inputs = {scan.resolve() for scan in scans}
    taken: set[Path] = set()
    for scan, target in jobs:
        require(
            target.resolve() not in inputs and target not in taken,
            "--output",
            found=f"that the result of {scan} would overwrite another file of this command",
            allowed="a name of its own for each result",
            fix="Choose another output folder, or rename one of the scans.",
        )
        taken.add(target)
    return jobs


def stem(path: Path) -> str:
    """A file's name without its image suffix, of a link its own; a folder's whole name."""
    from fastproto.data.volume import without_suffix

    return path.resolve().name if path.name in ("", "..") else without_suffix(path.name)


def _segment_scan(
    segment: Callable[..., Segmentation],
    tasks: Sequence[Task],
    scan: Path,
    output: Path,
    args: argparse.Namespace,
) -> None:
    """Segment one scan, write what was asked for and report on it."""
    from fastproto.data.volume import read_volume, write_volume
    from fastproto.segmentation import write_overlay
    from fastproto.segmentation.postprocess import uncertainty

    started = time.perf_counter()
    names = {value: name for task in tasks for value, name in task.labels.items()}
    volume = read_volume(scan, series=args.series)
    with options.progress_bar(stem(scan), "slice") as advance:
        result = segment(volume, progress=advance)
    write_volume(output, result.labels, like=volume)
    base = output.parent / stem(output)
    probabilities = result.probabilities or {}
    if args.probabilities:
        for value, probability in probabilities.items():
            name = re.sub(r"[^\w-]+", "_", names[value])
            write_volume(f"{base}-probabilities/{value}-{name}.nii.gz", probability, like=volume)
    if args.uncertainty:
        entropy = uncertainty(probabilities.values())
        write_volume(f"{base}-uncertainty.nii.gz", entropy, like=volume)
    if args.overlay:
        label = dataclasses.replace(volume, array=result.labels, path=output)
        write_overlay(f"{base}.png", volume, label, tasks[0].preprocessing, names)
    millilitres = math.prod(volume.spacing) / 1000
    sizes = ", ".join(
        f"{name} {(result.labels == value).sum() * millilitres:.1f} ml"
        for value, name in names.items()
    )
    print(f"{scan} -> {output} ({sizes}; {time.perf_counter() - started:.1f} s)")
    doubts = [f"{names[value]} is probably not in this scan" for value in result.absent()]
    if result.prior.fallback:
        doubts.append(f"not registered, only body boxes were compared ({result.prior.fallback})")
    for doubt in doubts:
        warnings.warn(f"{scan}: {doubt}", FastprotoWarning, stacklevel=2)


def _check_source(args: argparse.Namespace) -> None:
    """Either task files or annotated scans with their label maps."""
    require(
        bool(args.task) != bool(args.example),
        "--example",
        found="task files and annotated scans" if args.task else "nothing to find",
        allowed="--example SCAN MASK, or --task TASK",
    )
    given = [f"--{name}" for name in _EXAMPLE_OPTIONS if getattr(args, name) is not None]
    require(
        not (args.task and given),
        ", ".join(given),
        found="that it is given with --task",
        allowed="it with --example; a task file has learned already",
    )
