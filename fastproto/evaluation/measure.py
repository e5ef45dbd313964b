# SPDX-License-Identifier: Apache-2.0
"""Comparing label maps with the truth: a patient, or a folder of them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from scipy.ndimage import find_objects

from fastproto._memory import enough_memory
from fastproto.data.dataset import labels_of, open_dataset
from fastproto.data.formats.dicom_seg import find_segmentation, segment_names
from fastproto.data.formats.reading import reading
from fastproto.data.geometry import canonical
from fastproto.data.label_table import LabelTable
from fastproto.data.scans import stem
from fastproto.data.volume import (
    READABLE,
    Volume,
    check_labels,
    check_same_grid,
    read_label,
    volume_suffix,
)
from fastproto.errors import (
    DatasetError,
    GeometryError,
    LabelError,
    ResourceError,
    VolumeError,
    require,
    warn,
)
from fastproto.evaluation.metrics import METRICS, NSD_TOLERANCE_MM
from fastproto.evaluation.protocol import counted_slices
from fastproto.evaluation.report import Report
from fastproto.evaluation.surfaces import MaskPair

_CaseError: TypeAlias = VolumeError | GeometryError | LabelError | ResourceError
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
        prediction: Label map of the voxels of ``truth``; the axes may be stored in another order.
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
        GeometryError: The voxels lie elsewhere.
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
    prediction, truth = canonical(prediction), canonical(truth)
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
    boxes = [find_objects(volume.array, max(labels)) for volume in (prediction, truth)]
    rows = []
    for label, organ in labels.items():
        box = _union(*(found[label - 1] for found in boxes))
        predicted, true = prediction.array[box] == label, truth.array[box] == label
        if ignore is not None:
            predicted &= truth.array[box] != ignore
        if z_margin is not None:  # beyond the box there is nothing to count
            numbers = counted_slices(true, z_margin)
            predicted, true = predicted[numbers], true[numbers]
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
        prediction: A label map, or a folder of them named as the cases (``CASE.nii.gz``), such as
            nnU-Net writes; what else lies there does not matter.
        truth: A label map, a folder of them, or a data set (a folder with ``dataset.json``, and
            the label maps in a folder of their own). Two single files are compared whatever their
            names. Of a prediction and its truth one may be a DICOM segmentation; a prediction's
            segments count by their names, or by number where none is known.
        labels: Labels to measure and their names. None: those of the ``dataset.json`` in
            ``truth`` or beside it, else every value that occurs in the truth.
        nsd_tolerance: As in :func:`evaluate_case`.
        z_margin: As in :func:`evaluate_case`.
        ignore: As in :func:`evaluate_case`; None takes what the ``dataset.json`` ignores, unless
            ``labels`` has it.

    Returns:
        The report. A case of which a file cannot be used is named there, and the others measured.

    Raises:
        DatasetError: Nothing to compare was found.
        InputError: No file can be used, or as :func:`evaluate_case` raises.
        ResourceError: There is too little memory for any case.
    """
    prediction, truth = Path(prediction), Path(truth)
    with reading(prediction):
        predicted_files, _ = find_label_maps(prediction)
    with reading(truth):
        true_files, table = find_label_maps(truth)
    table = table or _labels_of_first(true_files.values())
    if ignore is None and table and table.ignore not in (labels or ()):
        ignore = table.ignore
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
    failed: dict[str, _CaseError] = {}
    known = labels or (table.names if table else None)
    if not known:
        values: set[int] = set()
        for case in cases:
            with _noted(failed, case):
                values.update(check_labels(read_label(true_files[case]), needed=False))
        known = {value: f"label {value}" for value in sorted(values - {ignore})}
        require(
            known or failed,
            truth,
            found="no voxel above 0" + ("" if ignore is None else f" other than {ignore}"),
            allowed="at least one annotated organ",
            error=LabelError,
        )
    names = {**(table.names if table else {}), **known}
    rows: list[dict[str, Any]] = []
    spacing: dict[str, tuple[float, ...]] = {}
    unknown: dict[str, list[int]] = {}
    seen: set[int] = set()
    options: Any = {"nsd_tolerance": nsd_tolerance, "z_margin": z_margin}
    for case in cases if known else ():
        if case in failed:
            continue
        with _noted(failed, case):
            predicted_map, true_map = _read_both(predicted_files[case], true_files[case], names)
            seen.update(check_labels(true_map, needed=False))
            measured = evaluate_case(predicted_map, true_map, known, ignore=ignore, **options)
            rows += [{"case": case} | row for row in measured]
            spacing[case] = tuple(float(step) for step in true_map.spacing)
            present = check_labels(predicted_map, needed=False)
            if strangers := [value for value in present if value not in names]:
                unknown[case] = strangers
    if not rows:
        raise next(iter(failed.values()))
    require(
        any(row["status"] != "absent" for row in rows),
        "labels",
        found="no voxel of " + ", ".join(f"{value} {name}" for value, name in known.items()),
        allowed=f"labels of {truth}: {', '.join(map(str, sorted(seen))) or 'none occurs'}",
        error=LabelError,
    )
    return Report(
        rows=rows,
        **options,
        spacing=spacing,
        unknown_labels=unknown,
        failed={case: str(error) for case, error in failed.items()},
        not_predicted=[
            case for case in true_files if case not in predicted_files and prediction.is_dir()
        ],
        not_compared=[case for case in predicted_files if case not in true_files],
    )


def _read_both(prediction: Path, truth: Path, names: Mapping[int, str]) -> tuple[Volume, Volume]:
    """Two label maps; a DICOM segmentation has the grid of the other one."""
    if segmentation := find_segmentation(prediction):
        true_map = read_label(truth)
        predicted_map = read_label(prediction, like=true_map)
        return _numbered_as(names, segmentation, predicted_map), true_map
    predicted_map = read_label(prediction)
    return predicted_map, read_label(truth, like=predicted_map)


def _numbered_as(names: Mapping[int, str], path: Path, label: Volume) -> Volume:
    """A DICOM segmentation, which numbers its segments from 1, with the values of their names."""
    values = {name.casefold(): value for value, name in names.items()}
    segments = segment_names(path)
    known = {number: values.get(name.casefold(), 0) for number, name in segments.items()}
    if not any(known.values()):
        pairs = (f"{name!r} as {names.get(n, 'no organ')}" for n, name in segments.items())
        warn(path, f"segments count by their numbers, not by their names: {', '.join(pairs)}.")
        return label
    if others := [segments[number] for number, value in known.items() if not value]:
        warn(path, f"segments that the truth does not name are left out: {', '.join(others)}.")
    table = np.zeros(max(known) + 1, np.uint16)
    table[[*known]] = [*known.values()]
    return replace(label, array=table[label.array])


@contextlib.contextmanager
def _noted(failed: dict[str, _CaseError], case: str) -> Iterator[None]:
    """Keep what is wrong with the files of one case, so that the others go on."""
    try:
        with enough_memory(f"case {case}"):
            yield
    except (VolumeError, GeometryError, LabelError, ResourceError) as error:
        failed[case] = error


def find_label_maps(path: Path) -> tuple[dict[str, Path], LabelTable | None]:
    """Label maps by case, and of a data set the names of the labels.

    A folder that holds label maps itself is no data set, even with a ``dataset.json`` among them:
    nnU-Net writes a copy of it beside its predictions.
    """
    allowed = "a label map, a folder of label maps or a data set"
    found = "no such file or folder"
    require(path.exists(), path, found=found, allowed=allowed, error=DatasetError)
    if path.is_file():
        return {stem(path): path}, None
    maps = [file for file in sorted(path.iterdir()) if _is_label_map(file)]
    parts = any((path / name).is_dir() for name in ("labels", "labelsTr", "images", "imagesTr"))
    if (path / "dataset.json").is_file() and (parts or not maps):
        # Which modality it is does not matter here.
        dataset = open_dataset(path, modality="ct")
        found_maps = {case.id: case.label for case in dataset.cases if case.label is not None}
        return found_maps, LabelTable(dataset.labels, dataset.ignore)
    files: dict[str, Path] = {}
    for file in maps:
        case = stem(file)
        first = files.setdefault(case, file)
        found = f"two files for {case}: {first.name} and {file.name}"
        allowed = "one label map per case"
        require(first is file, path, found=found, allowed=allowed, error=DatasetError)
    return files, None


def _labels_of_first(files: Iterable[Path]) -> LabelTable | None:
    """`labels_of` the first file that can be read."""
    for file in files:
        with contextlib.suppress(VolumeError):  # it is noted where it is to be measured
            return labels_of(file)
    return None


def _is_label_map(file: Path) -> bool:
    if not file.is_file() or file.name.startswith("."):
        return False
    if file.suffix.lower() != ".dcm":
        return bool(volume_suffix(file))
    try:
        return bool(find_segmentation(file))
    except (VolumeError, OSError):
        return True  # what is wrong is said where it is to be measured


def _union(a: tuple[slice, ...] | None, b: tuple[slice, ...] | None) -> tuple[slice, ...]:
    if a is None or b is None:
        return a or b or (slice(0, 0),) * 3
    return tuple(
        slice(min(s.start, t.start), max(s.stop, t.stop)) for s, t in zip(a, b, strict=True)
    )
