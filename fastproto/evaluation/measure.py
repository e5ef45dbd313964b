# SPDX-License-Identifier: Apache-2.0
"""Comparing segmentations with the truth: per organ, per patient, as a table and as JSON.

The numbers are those of ``metrics.py``. How they are summed up: an organ's mean and standard
deviation (n - 1) run over the patients in whom it was measured; the overall mean is the mean of the
organs' means, so an organ seen in few patients weighs as much as one seen in all. An organ that the
prediction misses in a patient counts with Dice 0 and NSD 0; it has no distance, so HD95 and ASSD
are averaged without it and the number of misses stands beside them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import SimpleITK as sitk
from scipy.ndimage import find_objects

from fastproto._files import write_text
from fastproto._version import __version__
from fastproto.data.dataset import open_dataset
from fastproto.data.volume import (
    READABLE,
    Volume,
    check_labels,
    check_same_grid,
    read_label,
    volume_suffix,
    without_suffix,
)
from fastproto.errors import ArgumentError, DatasetError, LabelError
from fastproto.evaluation.metrics import DEFINITIONS, dice, surface_metrics

METRICS = tuple(DEFINITIONS)


def evaluate_case(
    prediction: Volume,
    truth: Volume,
    labels: Mapping[int, str],
    *,
    nsd_tolerance: float = 2.0,
    z_margin: int | None = None,
) -> list[dict[str, Any]]:
    """Measure every organ of one patient.

    Args:
        prediction: Label map on the grid of ``truth``.
        truth: Label map.
        labels: Name of each label to measure; label values that are not in it are ignored.
        nsd_tolerance: Distance in mm up to which a surface counts as right.
        z_margin: None counts every slice. A number counts the axial slices (of the patient,
            however the axes are stored) of the organ's extent in the truth and so many beyond it
            on either side; nothing counts for an organ that the truth does not show.

    Returns:
        One row per label: ``label``, ``organ``, ``dice``, ``hd95`` and ``assd`` (mm), ``nsd``,
        ``truth_ml``, ``prediction_ml``, and ``status``: ``"measured"``, ``"missed"`` (only the
        truth shows it), ``"spurious"`` (only the prediction does) or ``"absent"`` (neither).

    Raises:
        GeometryError: The grids differ.
        LabelError: A label map is not made of integers.
        ArgumentError: ``labels``, ``nsd_tolerance`` or ``z_margin`` is out of range.
    """
    _check_labels(labels)
    if z_margin is not None and (not isinstance(z_margin, int) or z_margin < 0):
        raise ArgumentError(
            "z_margin", found=repr(z_margin), allowed="None or a whole number of slices from 0"
        )
    check_same_grid(truth, prediction)
    for volume in (prediction, truth):
        if volume.array.dtype.kind not in "iu":
            raise LabelError(
                volume.name,
                found=f"{volume.array.dtype} values",
                allowed="a label map of integers, as read_label gives it",
            )
    spacing = truth.spacing[::-1]
    voxel_ml = math.prod(spacing) / 1000
    axial = _axial_axis(truth)
    boxes_predicted = find_objects(prediction.array, max(labels))
    boxes_true = find_objects(truth.array, max(labels))
    rows = []
    for label, organ in labels.items():
        box_true = boxes_true[label - 1]
        box = _union(boxes_predicted[label - 1], box_true)
        if z_margin is not None:
            box = _within_extent(box, box_true, axial, z_margin)
        predicted, true = prediction.array[box] == label, truth.array[box] == label
        surfaces = surface_metrics(predicted, true, spacing=spacing, nsd_tolerance=nsd_tolerance)
        row = {"label": label, "organ": organ, "status": _status(predicted, true)}
        row |= {"dice": dice(predicted, true)} | surfaces._asdict()
        row["truth_ml"] = int(np.count_nonzero(true)) * voxel_ml
        row["prediction_ml"] = int(np.count_nonzero(predicted)) * voxel_ml
        rows.append(row)
    return rows


def evaluate_folder(
    prediction: str | os.PathLike[str],
    truth: str | os.PathLike[str],
    *,
    labels: Mapping[int, str] | None = None,
    nsd_tolerance: float = 2.0,
    z_margin: int | None = None,
) -> Report:
    """Measure a folder of predicted label maps, or a single one.

    Args:
        prediction: A label map, or a folder of them named as the cases (``CASE.nii.gz``).
        truth: A label map, a folder of them, or a data set (a folder with ``dataset.json``). Two
            single files are compared whatever their names.
        labels: Labels to measure and their names. None: those of the ``dataset.json`` in
            ``truth`` or beside it, else every value that occurs in the truth.
        nsd_tolerance: As in :func:`evaluate_case`.
        z_margin: As in :func:`evaluate_case`.

    Raises:
        DatasetError: Nothing to compare was found.
        InputError: A file cannot be used, or as :func:`evaluate_case` raises.
    """
    prediction, truth = Path(prediction), Path(truth)
    predicted_files, _ = _find_label_maps(prediction)
    true_files, dataset_labels = _find_label_maps(truth)
    if prediction.is_file() and truth.is_file():
        true_files = dict.fromkeys(predicted_files, truth)
    cases = [case for case in true_files if case in predicted_files]
    if not cases:
        raise DatasetError(
            prediction,
            found=f"no label map with the name of a case in {truth}",
            allowed=f"CASE.nii.gz (or another of {', '.join(READABLE)}) for a case of the truth",
            fix="Name the predictions as the files they are to be compared with.",
        )
    known = labels or dataset_labels
    if known is None:
        known = _labels_in(true_files[case] for case in cases)
        if not known:
            raise LabelError(
                truth, found="no voxel above 0", allowed="at least one annotated organ"
            )
    rows: list[dict[str, Any]] = []
    spacing: dict[str, tuple[float, ...]] = {}
    unknown: dict[str, list[int]] = {}
    for case in cases:
        predicted_map, true_map = read_label(predicted_files[case]), read_label(true_files[case])
        rows += [
            {"case": case} | row
            for row in evaluate_case(
                predicted_map, true_map, known, nsd_tolerance=nsd_tolerance, z_margin=z_margin
            )
        ]
        spacing[case] = tuple(float(step) for step in true_map.spacing)
        named = {*known, *(dataset_labels or ())}
        present = check_labels(predicted_map, needed=False)
        if strangers := [value for value in present if value not in named]:
            unknown[case] = strangers
    if all(row["status"] == "absent" for row in rows):
        raise LabelError(
            "labels",
            found=f"that none of {', '.join(map(str, known))} occurs in {truth}",
            allowed="labels that some patient has",
        )
    return Report(
        rows=rows,
        nsd_tolerance=nsd_tolerance,
        z_margin=z_margin,
        spacing=spacing,
        unknown_labels=unknown,
        not_predicted=[case for case in true_files if case not in predicted_files],
        not_compared=[case for case in predicted_files if case not in true_files],
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`evaluate_folder` found.

    Attributes:
        rows: Rows of :func:`evaluate_case` with their ``case``.
        nsd_tolerance: Tolerance of the NSD in mm.
        z_margin: Which slices counted, see :func:`evaluate_case`.
        spacing: Size of a voxel in mm along (x, y, z), per case.
        unknown_labels: Label values in a prediction that have no name, per case.
        not_predicted: Cases of the truth without a prediction.
        not_compared: Files beside the predictions without a truth.
    """

    rows: list[dict[str, Any]]
    nsd_tolerance: float
    z_margin: int | None
    spacing: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    unknown_labels: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    not_predicted: list[str] = dataclasses.field(default_factory=list)
    not_compared: list[str] = dataclasses.field(default_factory=list)

    def per_organ(self) -> list[dict[str, Any]]:
        """Mean and standard deviation of every metric over the patients, one entry per organ."""
        return self._summaries(lambda row: {"label": row["label"], "organ": row["organ"]})

    def per_patient(self) -> list[dict[str, Any]]:
        """Mean and standard deviation of every metric over the organs, one entry per patient."""
        return self._summaries(lambda row: {"case": row["case"]})

    def overall(self) -> dict[str, float]:
        """Mean over the organs of each metric's mean over the patients."""
        organs = self.per_organ()
        return {m: mean_and_std(organ[m]["mean"] for organ in organs)["mean"] for m in METRICS}

    def to_text(self) -> str:
        """The report as tables to print."""
        slices = (
            "every slice"
            if self.z_margin is None
            else f"slices of the organ in the truth, {self.z_margin} beyond on either side"
        )
        cases = list(dict.fromkeys(row["case"] for row in self.rows))
        header = ["n", "missed", "spurious", "Dice", "HD95 [mm]", "ASSD [mm]"]
        header.append(f"NSD @ {self.nsd_tolerance:g} mm")
        overall = self.overall()
        organs = [["organ", *header]]
        organs += [[entry["organ"], *_cells(entry)] for entry in self.per_organ()]
        organs.append(
            ["mean of organs", "", "", "", *(number_text(overall[m], m) for m in METRICS)]
        )
        patients = [["patient", *header]]
        patients += [[entry["case"], *_cells(entry)] for entry in self.per_patient()]
        notes = [f"{metric.upper()}: {text}" for metric, text in DEFINITIONS.items()]
        notes += [
            "mean ± standard deviation (n - 1) over patients, below over organs; n: measured, "
            "missed and spurious ones included",
            "missed: only in the truth, spurious: only in the prediction; both count with Dice 0 "
            "and NSD 0 and have no distance",
        ]
        notes += [
            f"{case}: the prediction has labels without a name: {', '.join(map(str, values))}"
            for case, values in self.unknown_labels.items()
        ]
        if self.not_predicted:
            notes.append(f"no prediction for: {', '.join(self.not_predicted)}")
        if self.not_compared:
            notes.append(f"no truth for: {', '.join(self.not_compared)}")
        title = f"{len(cases)} patient(s), {len(organs) - 2} organ(s), {slices}"
        return (
            "\n\n".join([title, text_table(organs), text_table(patients), "\n".join(notes)]) + "\n"
        )

    def to_json(self) -> str:
        """The report as JSON; what was not measurable is null."""
        content = {
            "definitions": DEFINITIONS,
            "nsd_tolerance_mm": self.nsd_tolerance,
            "z_margin": self.z_margin,
            "overall": self.overall(),
            "organs": self.per_organ(),
            "patients": self.per_patient(),
            "rows": self.rows,
            "spacing_xyz_mm": self.spacing,
            "unknown_labels": self.unknown_labels,
            "not_predicted": self.not_predicted,
            "not_compared": self.not_compared,
            "versions": {
                "fastproto": __version__,
                "numpy": np.__version__,
                "scipy": scipy.__version__,
                "SimpleITK": sitk.Version.VersionString(),
                "python": platform.python_version(),
            },
        }
        return json.dumps(without_nan(content), indent=1, allow_nan=False) + "\n"

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_json` to a file.

        Raises:
            OutputError: The file cannot be written.
        """
        write_text(path, self.to_json())

    def _summaries(self, key: Callable[[dict[str, Any]], dict[str, Any]]) -> list[dict[str, Any]]:
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in self.rows:
            groups.setdefault(tuple(key(row).values()), []).append(row)
        summaries = []
        for rows in groups.values():
            statuses = [row["status"] for row in rows]
            summary = key(rows[0])
            summary["n"] = len(rows) - statuses.count("absent")
            summary["missed"] = statuses.count("missed")
            summary["spurious"] = statuses.count("spurious")
            summary |= {metric: mean_and_std(row[metric] for row in rows) for metric in METRICS}
            summaries.append(summary)
        return summaries


def _find_label_maps(path: Path) -> tuple[dict[str, Path], dict[int, str] | None]:
    """Label maps by case, and the names of the labels where a ``dataset.json`` tells them."""
    if path.is_file():
        return {_case_id(path) or path.name: path}, _names_beside(path.parent)
    if not path.is_dir():
        raise DatasetError(
            path,
            found="no such file or folder",
            allowed="a label map, a folder of label maps or a data set",
        )
    if (path / "dataset.json").is_file():
        dataset = open_dataset(path)
        files = {case.id: case.label for case in dataset.cases if case.label is not None}
        return files, dataset.labels
    files = {}
    for file in sorted(path.iterdir()):
        case = _case_id(file)
        if case is None or file.name.startswith("."):
            continue
        if case in files:
            raise DatasetError(
                path,
                found=f"two files for {case}: {files[case].name} and {file.name}",
                allowed="one label map per case",
            )
        files[case] = file
    return files, _names_beside(path)


def _names_beside(folder: Path) -> dict[int, str] | None:
    """Names of the labels when ``folder`` is the label folder of a data set."""
    if folder.name in ("labels", "labelsTr") and (folder.parent / "dataset.json").is_file():
        return open_dataset(folder.parent).labels
    return None


def _case_id(path: Path) -> str | None:
    """File name without its suffix, None where it is not that of a volume."""
    return without_suffix(path.name) if volume_suffix(path) else None


def _labels_in(files: Iterable[Path]) -> dict[int, str]:
    values = {value for file in files for value in check_labels(read_label(file), needed=False)}
    return {value: f"label {value}" for value in sorted(values)}


def _check_labels(labels: Mapping[int, str]) -> None:
    if not labels or any(not isinstance(label, int) or label < 1 for label in labels):
        raise ArgumentError(
            "labels",
            found=repr(dict(labels)),
            allowed="at least one label: {1: 'liver', ...}, values from 1",
        )


def _axial_axis(volume: Volume) -> int:
    """Array axis whose direction is nearest to the patient's long axis."""
    letters = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(volume.direction)
    return 2 - next(axis for axis, letter in enumerate(letters) if letter in "SI")


_Box = tuple[slice, ...]
_NOTHING = (slice(0, 0),) * 3


def _union(a: _Box | None, b: _Box | None) -> _Box:
    if a is None or b is None:
        return a or b or _NOTHING
    return tuple(
        slice(min(s.start, t.start), max(s.stop, t.stop)) for s, t in zip(a, b, strict=True)
    )


def _within_extent(box: _Box, box_true: _Box | None, axis: int, margin: int) -> _Box:
    """``box`` without the slices further than ``margin`` from the organ in the truth."""
    if box_true is None:
        return _NOTHING
    start = max(box[axis].start, box_true[axis].start - margin)
    stop = min(box[axis].stop, box_true[axis].stop + margin)
    return (*box[:axis], slice(start, stop), *box[axis + 1 :])


def _status(predicted: np.ndarray, true: np.ndarray) -> str:
    if true.any():
        return "measured" if predicted.any() else "missed"
    return "spurious" if predicted.any() else "absent"


def mean_and_std(values: Iterable[float]) -> dict[str, float]:
    """Mean and standard deviation (n - 1) of what is not NaN; NaN where there is too little."""
    measured = np.array([value for value in values if not math.isnan(value)])
    return {
        "mean": float(measured.mean()) if measured.size else float("nan"),
        "std": float(measured.std(ddof=1)) if measured.size > 1 else float("nan"),
    }


def without_nan(value: Any) -> Any:
    """The same as JSON can say it: None for every NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _cells(entry: dict[str, Any]) -> list[str]:
    cells = [str(entry[count]) for count in ("n", "missed", "spurious")]
    for metric in METRICS:
        mean, std = entry[metric]["mean"], entry[metric]["std"]
        spread = "" if math.isnan(std) else f" ± {number_text(std, metric)}"
        cells.append(number_text(mean, metric) + spread)
    return cells


def number_text(value: float, metric: str) -> str:
    """A metric's value in a table."""
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if metric in ("hd95", "assd") else f"{value:.3f}"


def text_table(rows: list[list[str]]) -> str:
    """Rows of text with aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)
