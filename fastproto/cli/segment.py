# SPDX-License-Identifier: Apache-2.0
"""``fastproto segment``: find the organs of an annotated scan in new scans."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastproto._files import check_writable
from fastproto._memory import enough_memory
from fastproto.cli import options
from fastproto.cli.learn import add_example_options, add_model_option, learn_example
from fastproto.cli.report import check_report, what_tasks_say, write_report
from fastproto.errors import FastprotoError, require, warn

if TYPE_CHECKING:
    from fastproto.report import Results
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

FORMATS = ("nii.gz", "nii", "nrrd", "mha", "seg.nrrd", "dcm")

UNUSUAL = 3.0  # times larger or smaller than annotated: then a warning
# Which a task file has decided on.
_EXAMPLE_OPTIONS = ("example-series", "labels", "classes", "slices", "adapt")


def add_options(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    add_model_option(parser)
    source = parser.add_argument_group("what to find (one of the two)")
    source.add_argument("--example", nargs=2, action="append", type=Path, metavar=("SCAN", "MASK"),
        help="annotated scan and its label map, learned on the spot; given more than once, all "
        "examples count alike")
    source.add_argument("--task", action="append", type=Path, metavar="TASK",
        help="task file of `fastproto learn`; can be given more than once as well")
    learning = parser.add_argument_group("how to learn an example")
    learning.add_argument("--example-series", metavar="UID",
        help="SeriesInstanceUID, where the annotated DICOM folder holds several series")
    add_example_options(learning)
    parser.add_argument("-i", "--input", **options.ONE_FILE, metavar="SCAN",
        help="image file, DICOM series folder, multi-frame DICOM file, or folder of these, also "
        "with a subfolder for each patient; what is called mask, label or seg beside scans is "
        "left out")
    options.add_series_option(parser)
    options.add_force_option(parser)
    parser.add_argument("-o", "--output", **options.ONE_FILE, metavar="OUT",
        help="label map to write (.nii.gz, .nii, .nrrd, .mha; with names and colours .seg.nrrd, "
        "for 3D Slicer, and .dcm, a DICOM segmentation of a DICOM scan) or, for one scan or many, "
        "a folder for SCAN.nii.gz, or PATIENT.nii.gz of a scan in a subfolder; an older result is "
        "replaced only by a complete new one")
    parser.add_argument("--format", choices=FORMATS, metavar="ENDING",
        help=f"how the files in a folder OUT end: {', '.join(FORMATS)} (default: nii.gz)")
    parser.add_argument("--shard", type=options.shard, default=(1, 1), metavar="I/N",
        help="only part I of N of the scans, counted from 1: every Nth from the Ith by name, for "
        "jobs that share the work. Results are called as in one run over all, whatever N is")
    parser.add_argument("--probabilities", action="store_true",
        help="also write OUT-probabilities/VALUE-ORGAN.nii.gz, one float32 volume per organ: "
        "3-D files open in every viewer, and only one organ at a time needs to be loaded")
    parser.add_argument("--uncertainty", action="store_true",
        help="also write OUT-uncertainty.nii.gz: how undecided every voxel is, in bits")
    parser.add_argument("--overlay", action=argparse.BooleanOptionalAction, default=True,
        help="write OUT.png as well: slices with coloured organs")
    parser.add_argument("--report", type=Path, action=options.Once, metavar="FILE",
        help="also write one HTML file to leaf through: volumes, doubts, organs in every scan; see "
        "`fastproto report`")
    parser.add_argument("--batch-size", type=options.positive, metavar="N",
        help="slices at once (default: 8)")
    options.add_runtime_options(parser)
    # fmt: on


def run(args: argparse.Namespace) -> int:
    """Segment all scans; report those that fail and go on with the next."""
    from fastproto.data.scans import find_scans, plan_outputs, stem
    from fastproto.segmentation import Task, load_model, segment_volume

    _check_source(args)
    scans = find_scans(args.input, series=args.series, output=args.output)
    jobs = plan_outputs(args.input, scans, args.output, args.format)
    part, parts = args.shard
    whole, jobs = len(jobs), jobs[part - 1 :: parts]
    if not jobs:
        print(f"{args.input}: no scan for part {part} of {parts}, as there are {whole}")
        return 0
    check_writable(jobs[0][1])
    if args.report:
        check_report(args.report)
    with options.runtime(args) as device:
        fix = "Close other programs, or take --device cpu."
        with enough_memory(args.model or "the base model", fix):
            model = load_model(args.model, backend=args.backend).to(device)
        fingerprint = model.fingerprint()  # nothing below changes the weights
        if args.task:
            files = [*{path.resolve(): path for path in args.task}.values()]  # each counts once
            tasks = [Task.load(path) for path in files]
            for task, path in zip(tasks, files, strict=True):
                task.check_model(model, name=path, fingerprint=fingerprint)
        else:
            tasks = []
            for image, label in args.example:
                with enough_memory(image):
                    tasks.append(
                        learn_example(
                            model,
                            image,
                            label,
                            args,
                            series=args.example_series,
                            fingerprint=fingerprint,
                        )
                    )
        segment = partial(
            segment_volume,
            model,
            tasks,
            batch_size=args.batch_size,
            probabilities=args.probabilities or args.uncertainty,
            prior=args.prior,
            fingerprint=fingerprint,
            force=args.force,
        )
        report = None
        if args.report:
            from fastproto.report import Results

            names, dice = what_tasks_say(tasks)
            report = Results(names, len(jobs), dice)
        failed = 0
        for scan, output in jobs:
            try:
                with enough_memory(scan):
                    _segment_scan(segment, tasks, scan, output, args, report)
            except FastprotoError as error:
                if len(jobs) == 1:
                    raise
                failed += 1
                if report:
                    report.fail(stem(output), str(error))
                print(f"fastproto: error: {error}", file=sys.stderr)
    if report:
        write_report(args.report, results=report)
    if failed:
        print(f"fastproto: {failed} of {len(jobs)} scans failed", file=sys.stderr)
        return options.EXIT_SOME_FAILED
    return 0


def _segment_scan(
    segment: Callable[..., Segmentation],
    tasks: Sequence[Task],
    scan: Path,
    output: Path,
    args: argparse.Namespace,
    report: Results | None,
) -> None:
    """Segment one scan, write what was asked for and report on it."""
    from fastproto.data.scans import stem
    from fastproto.data.volume import check_label_output, read_volume, write_label, write_volume
    from fastproto.segmentation import write_overlay
    from fastproto.segmentation.postprocess import uncertainty

    started = time.perf_counter()
    names = {value: name for task in tasks for value, name in task.labels.items()}
    volume = read_volume(scan, series=args.series)
    check_label_output(output, volume)
    with options.progress_bar(stem(scan), "slice") as advance:
        result = segment(volume, progress=advance)
    write_label(output, result.labels, volume, names)
    base = output.parent / stem(output)
    probabilities = result.probabilities or {}
    if args.probabilities:
        for value, probability in probabilities.items():
            name = re.sub(r"[^\w-]+", "_", names[value])
            write_volume(f"{base}-probabilities/{value}-{name}.nii.gz", probability, like=volume)
    if args.uncertainty:
        entropy = uncertainty(probabilities.values())
        write_volume(f"{base}-uncertainty.nii.gz", entropy, like=volume)
    label = dataclasses.replace(volume, array=result.labels, path=output)
    if args.overlay:
        write_overlay(f"{base}.png", volume, label, tasks[0].preprocessing, names)
    voxel = math.prod(volume.spacing) / 1000
    found = {value: float((result.labels == value).sum() * voxel) for value in names}
    sizes = ", ".join(f"{names[value]} {size:.1f} ml" for value, size in found.items())
    print(f"{scan} -> {output} ({sizes}; {time.perf_counter() - started:.1f} s)")
    absent = result.absent()
    doubts = [f"{names[value]} is probably not in this scan" for value in absent]
    annotated = [task.millilitres for task in tasks]
    for value, size in found.items():
        drawn = [each[value] for each in annotated if value in each]
        if value not in absent and not min(drawn) / UNUSUAL < size < max(drawn) * UNUSUAL:
            usual = ", ".join(f"{each:.1f}" for each in drawn)
            doubts.append(f"{names[value]}: {size:.1f} ml (in the annotated scan {usual} ml)")
    if result.prior.fallback:
        doubts.append(f"not registered, only body boxes were compared ({result.prior.fallback})")
    for doubt in doubts:
        warn(scan, doubt)
    if report:
        forced = [result.unfit] if result.unfit else []  # which was a warning already
        report.add(stem(output), label, volume, forced + doubts)


def _check_source(args: argparse.Namespace) -> None:
    """Either task files or annotated scans with their label maps."""
    require(
        bool(args.task) != bool(args.example),
        "--example",
        found="task files and annotated scans" if args.task else "nothing to find",
        allowed="--example SCAN MASK, or --task TASK",
    )
    values = {name: getattr(args, name.replace("-", "_")) for name in _EXAMPLE_OPTIONS}
    given = [f"--{name}" for name, value in values.items() if value is not None]
    require(
        not (args.task and given),
        ", ".join(given),
        found="options of an example together with --task",
        allowed="them with --example; a task file has learned already",
    )
