# SPDX-License-Identifier: Apache-2.0
"""``fastproto report``: one HTML file of a training, of results or of scores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastproto._files import check_writable
from fastproto.cli import options
from fastproto.errors import first_of, require, warn

if TYPE_CHECKING:
    from fastproto.report import Results
    from fastproto.segmentation import Task

HELP = "write one HTML file to look at: of a training, of results, of scores"
DESCRIPTION = """\
Write one HTML file that needs no network: the curves of a training; the results in a folder of
scans, with volumes, outliers and slices to leaf through; the scores of `fastproto evaluate --json`
by organ. Several may be given: the dots of the scores then open the scans of the results."""
EXAMPLE = """\
  fastproto report results --scans phantom-ct/images --task organs.task -o report.html
  fastproto report results scores.json --scans phantom-ct/images --task organs.task -o report.html
  fastproto report run -o training.html"""

_RUN_FILES = ("log.jsonl", "config.json")


def add_options(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.add_argument("input", nargs="+", type=Path, metavar="RUN_OR_RESULTS",
        help="run folder of `fastproto train`, folder of label maps (or one), or JSON of "
        "`fastproto evaluate`; each kind once at most")
    parser.add_argument("-o", "--output", **options.ONE_FILE, metavar="HTML", help="file to write")
    parser.add_argument("--scans", type=Path, action=options.Once, metavar="SCANS",
        help="what was segmented, found by its names (default: the organs alone are shown)")
    parser.add_argument("--task", type=Path, action="append", metavar="TASK",
        help="task file that the results are of: it has the organs' names and the predicted Dice")
    options.add_label_options(parser)
    options.add_series_option(parser)
    # fmt: on


def run(args: argparse.Namespace) -> int:
    """Write the report.

    Returns:
        0, or 2 where the report names a scan that could not be read.
    """
    from fastproto.report import read_results, read_scores, training_contents
    from fastproto.segmentation import Task

    kinds = _kinds(args.input)
    lonely = [name for name in ("scans", "task", "labels", "series") if getattr(args, name)]
    require(
        "results" in kinds or not lonely,
        ", ".join(f"--{name}" for name in lonely),
        found="options of results without any",
        allowed="them with a folder of label maps",
    )
    check_report(args.output)
    results = None
    if "results" in kinds:
        names, dice = what_tasks_say([Task.load(path) for path in args.task or ()])
        if args.labels:
            names = dict(options.read_labels(args.labels).names)
        results = read_results(
            kinds["results"], args.scans, names=names or None, dice=dice, series=args.series
        )
    scores = read_scores(kinds["scores"]) if "scores" in kinds else None
    if results and scores:
        strangers = {row["case"] for row in scores["rows"]} - results.links().keys()
        if strangers:
            listed = first_of(sorted(strangers))
            warn(kinds["scores"], f"cases that {kinds['results']} does not hold: {listed}.")
    training = training_contents(kinds["training"]) if "training" in kinds else None
    title = f"Report: {', '.join(path.resolve().name for path in args.input)}"
    write_report(args.output, title=title, results=results, scores=scores, training=training)
    for name, why in results.failed.items() if results else ():
        print(f"fastproto: error: {name}: {why}", file=sys.stderr)
    return options.EXIT_SOME_FAILED if results and results.failed else 0


def check_report(path: Path) -> None:
    """Find out before a long computation whether a report can be written.

    Raises:
        ArgumentError: It is no HTML file, or a library is missing.
        OutputError: It cannot be written.
    """
    from fastproto.report.plots import check_installed

    require(
        path.suffix.lower() in (".html", ".htm"),
        path,
        found=f"suffix {path.suffix!r}",
        allowed="a report ending in .html",
    )
    check_installed()
    check_writable(path)


def what_tasks_say(tasks: Sequence[Task]) -> tuple[dict[int, str], dict[int, float | None]]:
    """The organs of tasks by label value: their names, and their predicted Dice, the mean of all.

    It is None where no task had a slice to check itself by.
    """
    names = {value: name for task in tasks for value, name in task.labels.items()}
    known: dict[int, list[float]] = {value: [] for value in names}
    for task in tasks:
        for organ in task.organs:
            if organ.expected_dice is not None:
                known[organ.value].append(organ.expected_dice)
    return names, {v: sum(found) / len(found) if found else None for v, found in known.items()}


def write_report(
    path: Path,
    *,
    title: str = "Segmented scans",
    results: Results | None = None,
    scores: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write the page and say how large it is."""
    from fastproto.report import scores_contents, write_page

    links = results.links() if results else {}
    write_page(
        path,
        title,
        results=results.contents() if results else None,
        scores=scores_contents(scores, links) if scores else None,
        training=training,
    )
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def _kinds(paths: Sequence[Path]) -> dict[str, Path]:
    """What the paths are: a training, results, scores."""
    kinds: dict[str, Path] = {}
    for path in paths:
        runs = any((path / name).is_file() for name in _RUN_FILES)
        kind = "training" if runs else "scores" if path.suffix.lower() == ".json" else "results"
        found = f"two of a kind: {kinds.get(kind)} and {path}"
        allowed = "one training, one folder of results and one JSON of scores"
        require(kind not in kinds, "RUN_OR_RESULTS", found=found, allowed=allowed)
        kinds[kind] = path
    return kinds
