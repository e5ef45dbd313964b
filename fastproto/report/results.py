# SPDX-License-Identifier: Apache-2.0
"""What `segment` found, for a page: volumes, doubts, outliers and pictures to leaf through."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import find_objects

from fastproto.data.anatomy import organ_colours
from fastproto.data.volume import Volume, check_labels, check_same_grid
from fastproto.defaults import POOR_DICE
from fastproto.errors import LabelError, require
from fastproto.report.pictures import encode
from fastproto.report.plots import Dot, histogram
from fastproto.report.tables import Cell, Table
from fastproto.segmentation.postprocess import find_pieces

FEWEST = 5  # scans in which an organ was found, to tell what is unusual
WHISKER = 1.5  # interquartile ranges beyond the quartiles, as of a box plot
SLIGHT = 0.2  # share of the median that no outlier is nearer to it
CRUMB = 0.05  # share of an organ's largest piece below which another one is not counted
_MOST_ORGANS = 255  # a byte of a picture each


@dataclass(frozen=True)
class Finding:
    """What was found in one scan: its name, volumes in ml and pieces by label value, doubts,
    pictures.
    """

    name: str
    volumes: dict[int, float]
    pieces: dict[int, int]
    doubts: list[str]
    planes: list[dict[str, Any]]


class Results:
    """The results in some scans, taken up one by one; only small pictures of them are kept.

    Args:
        names: Label value -> name of the organs.
        scans: How many scans will come, which decides how good their pictures are.
        dice: Label value -> the Dice that the task's self-check predicts, as far as it is known.

    Raises:
        LabelError: More than 255 organs.
    """

    def __init__(
        self, names: Mapping[int, str], scans: int, dice: Mapping[int, float | None] | None = None
    ):
        allowed = f"at most {_MOST_ORGANS} in a report"
        few = len(names) <= _MOST_ORGANS
        require(few, "organs", found=str(len(names)), allowed=allowed, error=LabelError)
        self.names = dict(names)
        self.dice = dict(dice or {})
        self.scans = scans
        self.findings: list[Finding] = []
        self.failed: dict[str, str] = {}

    def add(
        self, name: str, label: Volume, scan: Volume | None, doubts: Collection[str] | None = None
    ) -> None:
        """Take up the label map of a scan.

        Args:
            name: What the scan is called.
            label: Its label map; values without a name are left out, and named among the doubts.
            scan: The scan, for pictures; None shows the organs alone.
            doubts: What the user should look at. None: what the label map tells, organs that were
                not found.

        Raises:
            GeometryError: Scan and label map are on different grids.
        """
        if scan is not None:
            check_same_grid(scan, label)
        counts = _voxels_and_pieces(label.array, self.names)
        millilitres = math.prod(label.spacing) / 1000
        volumes = {value: voxels * millilitres for value, (voxels, _) in counts.items()}
        told = list(doubts or ())
        if doubts is None:
            told += [f"{self.names[v]} was not found" for v, size in volumes.items() if not size]
        present = check_labels(label, needed=False)
        if strangers := [value for value in present if value not in self.names]:
            told.append(f"label {', '.join(map(str, strangers))} has no name and is not shown")
        planes = encode(scan, label, list(self.names), self.scans)
        pieces = {value: number for value, (_, number) in counts.items()}
        self.findings.append(Finding(name, volumes, pieces, told, planes))

    def fail(self, name: str, why: str) -> None:
        """Take up a scan that could not be segmented or read."""
        self.failed[name] = why

    def contents(self) -> dict[str, Any]:
        """What the page's template shows."""
        findings = self.findings
        outliers = {value: self._outliers(value) for value in self.names}
        scattered = {value: self._scattered(value) for value in self.names}
        doubts = [
            finding.doubts
            + [self._unusual(v, finding) for v in self.names if i in outliers[v]]
            + [scattered[v][i] for v in self.names if i in scattered[v]]
            for i, finding in enumerate(findings)
        ]
        return {
            "organs": [
                {"name": self.names[value], "colour": "#" + bytes(colour).hex()}
                for value, colour in organ_colours(self.names).items()
            ],
            "scans": [
                {"name": finding.name, "doubts": told, "planes": finding.planes}
                for finding, told in zip(findings, doubts, strict=True)
            ],
            "failed": self.failed,
            "organ_table": self._organ_table(outliers),
            "scan_table": self._scan_table(outliers, doubts),
            "histograms": [self._histogram(value, outliers[value]) for value in self.names]
            if len(findings) > 1
            else [],
            "fewest": FEWEST,
        }

    def links(self) -> dict[str, str]:
        """Name of a scan -> id of what the page shows of it."""
        return {finding.name: f"scan-{i}" for i, finding in enumerate(self.findings)}

    def _sizes(self, value: int) -> list[tuple[int, float]]:
        """Number and volume of the scans in which an organ was found."""
        volumes = (finding.volumes[value] for finding in self.findings)
        return [(number, volume) for number, volume in enumerate(volumes) if volume > 0]

    def _unusual(self, value: int, finding: Finding) -> str:
        median = float(np.median([size for _, size in self._sizes(value)]))
        size = f"{finding.volumes[value]:.1f} ml is unusual (median {median:.1f} ml)"
        return f"{self.names[value]}: {size}"

    def _scattered(self, value: int) -> dict[int, str]:
        """Numbers of the scans in which an organ is in more pieces than in most; what is told."""
        if len(self._sizes(value)) < FEWEST:
            return {}
        pieces = [finding.pieces[value] for finding in self.findings]
        usual = max(int(np.median(pieces)), 1)
        return {
            number: f"{self.names[value]}: in {count} pieces (most scans: {usual})"
            for number, count in enumerate(pieces)
            if count > usual
        }

    def _outliers(self, value: int) -> set[int]:
        """Numbers of the scans in which an organ is much larger or smaller than in the others."""
        sizes = self._sizes(value)
        if len(sizes) < FEWEST:
            return set()
        low, median, high = np.percentile([size for _, size in sizes], [25, 50, 75])
        reach = WHISKER * (high - low)
        return {
            number
            for number, size in sizes
            if not low - reach <= size <= high + reach and abs(size - median) > SLIGHT * median
        }

    def _organ_table(self, outliers: Mapping[int, set[int]]) -> Table:
        rows = []
        for value, name in self.names.items():
            sizes = [size for _, size in self._sizes(value)]
            expected = self.dice.get(value)
            poor = expected is not None and expected < POOR_DICE
            note = "was hardly learned: expect poor results" if poor else ""
            span = f"{min(sizes):.1f} to {max(sizes):.1f}" if sizes else "-"
            rows.append(
                [
                    Cell(name),
                    Cell.number(value, "d"),
                    Cell.number(expected, ".2f"),
                    Cell(f"{len(sizes)} of {len(self.findings)}", len(sizes)),
                    Cell.number(float(np.median(sizes)) if sizes else None, ".1f"),
                    Cell(span, max(sizes, default=0.0)),
                    Cell.number(len(outliers[value]) if len(sizes) >= FEWEST else None, "d"),
                    Cell(note, warning=poor),
                ]
            )
        head = ("organ", "label", "predicted Dice", "found in", "median [ml]", "range [ml]")
        return Table("Organs", (*head, "outliers", "warning"), rows)

    def _scan_table(
        self, outliers: Mapping[int, set[int]], doubts: Sequence[Sequence[str]]
    ) -> Table:
        rows = []
        for index, finding in enumerate(self.findings):
            sizes = [
                Cell(f"{volume:.1f}", volume, warning=index in outliers[value] or not volume)
                for value, volume in finding.volumes.items()
            ]
            told = Cell("; ".join(doubts[index]), -len(doubts[index]), warning=bool(doubts[index]))
            rows.append([Cell(finding.name, link=f"scan-{index}"), *sizes, told])
        return Table("Volumes in ml", ("scan", *self.names.values(), "warnings"), rows)

    def _histogram(self, value: int, outliers: set[int]) -> str:
        sizes = self._sizes(value)
        if not sizes:
            return ""
        dots = [
            Dot(size, f"{self.findings[number].name}: {size:.1f} ml", f"scan-{number}")
            for number, size in sizes
        ]
        marked = [number in outliers for number, _ in sizes]
        return histogram(self.names[value], dots, marked, xlabel="volume [ml]")


def _voxels_and_pieces(labels: np.ndarray, values: Collection[int]) -> dict[int, tuple[int, int]]:
    """Of each organ the voxels, and the pieces that do not touch each other, but for crumbs."""
    places = find_objects(labels, max(values, default=0))
    found = {}
    for value in values:
        place = places[value - 1]
        if place is None:
            found[value] = 0, 0
            continue
        _, sizes = find_pieces(labels[place] == value)
        found[value] = int(sizes.sum()), int((sizes > CRUMB * sizes.max()).sum())
    return found
