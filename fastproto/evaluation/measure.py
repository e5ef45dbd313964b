# SPDX-License-Identifier: Apache-2.0
"""Comparing label maps with the truth: a patient, or a folder of them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import find_objects

from fastproto.data.dataset import Dataset, open_dataset
from fastproto.data.volume import (
    READABLE,
    Volume,
    check_labels,
    check_same_grid,
    read_label,
    volume_suffix,
    without_suffix,
)
from fastproto.errors import DatasetError, LabelError, require
from fastproto.evaluation.metrics import METRICS, NSD_TOLERANCE_MM
from fastproto.evaluation.protocol import counted_slices
from fastproto.evaluation.report import Report
from fastproto.evaluation.surfaces import MaskPair

_STATUS = {  # by whether the truth and the prediction show an organ
    (True, True): "measured",
    (True, False): "missed",
    (False, True): "spurious",
    (False, False): "absent",
}


def evaluate_case(
    prediction: Volume,
    truth: Volume,
    labels: Mapping[int, str],
    *,
    nsd_tolerance: float = NSD_TOLERANCE_MM,
    z_margin: int | None = None,
    ignore: int | None = None,
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
        ignore: A value of ``truth`` whose voxels do not count: what is predicted there is taken
            away, so that at their border both have the same surface.

    Returns:
        One row per label: ``label``, ``organ``, every metric of ``METRICS``, ``truth_ml``,
        ``prediction_ml``, and ``status``: ``"measured"``, ``"missed"`` (only the truth shows it),
        ``"spurious"`` (only the prediction does) or ``"absent"`` (neither).

    Raises:
        GeometryError: The grids differ.
        LabelError: A label map is not made of integers.
        ArgumentError: ``labels``, ``nsd_tolerance`` or ``z_margin`` is out of range, or a label is
            to be measured and ignored.
    """
    require(
        labels and all(isinstance(label, int) and label >= 1 for label in labels),
        "labels",
        found=repr(dict(labels)),
        allowed="at least one label: {1: 'liver', ...}, values from 1",
    )
    found, allowed = f"label {ignore} among those to measure", "another value, or None"
    require(ignore not in labels, "ignore", found=found, allowed=allowed)
    require(
        z_margin is None or (isinstance(z_margin, int) and z_margin >= 0),
        "z_margin",
        found=repr(z_margin),
        allowed="None or a whole number of slices from 0",
    )
    check_same_grid(truth, prediction)
    for volume in (prediction, truth):
        require(
            volume.array.dtype.kind in "iu",
            volume.name,
            found=f"{volume.array.dtype} values",
            allowed="a label map of integers, as read_label gives it",
            error=LabelError,
        )
    spacing = truth.spacing[::-1]
    voxel_ml = math.prod(spacing) / 1000
    letters = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(truth.direction)
    axial = 2 - next(axis for axis, letter in enumerate(letters) if letter in "SI")
    boxes = [find_objects(volume.array, max(labels)) for volume in (prediction, truth)]
    rows = []
    for label, organ in labels.items():
        box = _union(*(found[label - 1] for found in boxes))
        predicted, true = prediction.array[box] == label, truth.array[box] == label
        if ignore is not None:
            predicted &= truth.array[box] != ignore
        if z_margin is not None:  # beyond the box there is nothing to count
            numbers = counted_slices(np.moveaxis(true, axial, 0), z_margin)
            predicted, true = predicted.take(numbers, axial), true.take(numbers, axial)
        pair = MaskPair(predicted, true, spacing, nsd_tolerance)
        true_size, predicted_size = (int(np.count_nonzero(mask)) for mask in (true, predicted))
        rows.append(
            {
                "label": label,
                "organ": organ,
                "status": _STATUS[true_size > 0, predicted_size > 0],
                **{metric.name: metric.function(pair) for metric in METRICS},
                "truth_ml": true_size * voxel_ml,
                "prediction_ml": predicted_size * voxel_ml,
            }
        )
    return rows


def evaluate_folder(
    prediction: str | os.PathLike[str],
    truth: str | os.PathLike[str],
    *,
    labels: Mapping[int, str] | None = None,
    nsd_tolerance: float = NSD_TOLERANCE_MM,
    z_margin: int | None = None,
    ignore: int | None = None,
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
        ignore: As in :func:`evaluate_case`; None takes what the ``dataset.json`` ignores, unless
            ``labels`` has it.

    Raises:
        DatasetError: Nothing to compare was found.
        InputError: A file cannot be used, or as :func:`evaluate_case` raises.
    """
    prediction, truth = Path(prediction), Path(truth)
    predicted_files, _ = _find_label_maps(prediction)
    true_files, dataset = _find_label_maps(truth)
    dataset_labels = dataset.labels if dataset else None
    if ignore is None and dataset and dataset.ignore not in (labels or ()):
        ignore = dataset.ignore
    if prediction.is_file() and truth.is_file():
        true_files = dict.fromkeys(predicted_files, truth)
    cases = [case for case in true_files if case in predicted_files]
    require(
        cases,
        prediction,
        found=f"no label map with the name of a case in {truth}",
        allowed=f"CASE.nii.gz (or another of {', '.join(READABLE)}) for a case of the truth",
        fix="Name the predictions as the files they are to be compared with.",
        error=DatasetError,
    )
    known = labels or dataset_labels
    if known is None:
        maps = (read_label(true_files[case]) for case in cases)
        values = {value for true in maps for value in check_labels(true, needed=False)}
        known = {value: f"label {value}" for value in sorted(values)}
        require(
            known,
            truth,
            found="no voxel above 0",
            allowed="at least one annotated organ",
            error=LabelError,
        )
    named = {*known, *(dataset_labels or ())}
    rows: list[dict[str, Any]] = []
    spacing: dict[str, tuple[float, ...]] = {}
    unknown: dict[str, list[int]] = {}
    options: Any = {"nsd_tolerance": nsd_tolerance, "z_margin": z_margin}
    for case in cases:
        predicted_map, true_map = read_label(predicted_files[case]), read_label(true_files[case])
        measured = evaluate_case(predicted_map, true_map, known, ignore=ignore, **options)
        rows += [{"case": case} | row for row in measured]
        spacing[case] = tuple(float(step) for step in true_map.spacing)
        present = check_labels(predicted_map, needed=False)
        if strangers := [value for value in present if value not in named]:
            unknown[case] = strangers
    require(
        any(row["status"] != "absent" for row in rows),
        "labels",
        found=f"that none of {', '.join(map(str, known))} occurs in {truth}",
        allowed="labels that some patient has",
        error=LabelError,
    )
    return Report(
        rows=rows,
        **options,
        spacing=spacing,
        unknown_labels=unknown,
        not_predicted=[case for case in true_files if case not in predicted_files],
        not_compared=[case for case in predicted_files if case not in true_files],
    )


def _find_label_maps(path: Path) -> tuple[dict[str, Path], Dataset | None]:
    """Label maps by case, and the data set that they are of, where there is a ``dataset.json``."""
    allowed = "a label map, a folder of label maps or a data set"
    found = "no such file or folder"
    require(path.exists(), path, found=found, allowed=allowed, error=DatasetError)
    folder = path if path.is_dir() else path.parent
    beside = [folder.parent] if folder.name in ("labels", "labelsTr") else []
    roots = [root for root in (path, *beside) if (root / "dataset.json").is_file()]
    # Which modality it is does not matter here.
    dataset = open_dataset(roots[0], modality="ct") if roots else None
    if path.is_file():
        return {without_suffix(path.name): path}, dataset
    if dataset and roots[0] == path:
        return {case.id: case.label for case in dataset.cases if case.label is not None}, dataset
    files: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if volume_suffix(file) and not file.name.startswith("."):
            case = without_suffix(file.name)
            first = files.setdefault(case, file)
            found = f"two files for {case}: {first.name} and {file.name}"
            allowed = "one label map per case"
            require(first is file, path, found=found, allowed=allowed, error=DatasetError)
    return files, dataset


def _union(a: tuple[slice, ...] | None, b: tuple[slice, ...] | None) -> tuple[slice, ...]:
    if a is None or b is None:
        return a or b or (slice(0, 0),) * 3
    return tuple(
        slice(min(s.start, t.start), max(s.stop, t.stop)) for s, t in zip(a, b, strict=True)
    )
