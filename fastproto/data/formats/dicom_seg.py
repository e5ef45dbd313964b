# SPDX-License-Identifier: Apache-2.0
"""A DICOM segmentation (SEG) as a label map on the grid of the scan that it annotates.

It holds frames for the slices where a segment is drawn, in any order, so that only the scan says
how many slices there are. Segment numbers are the values (PS3.3 C.8.20).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastproto.data.formats import dicom_header
from fastproto.data.formats.checks import (
    GRID_TOLERANCE,
    require_geometry,
    require_volume,
    unique_names,
)
from fastproto.data.formats.dicom_header import (
    EXPORT_AGAIN,
    functional_group,
    numbers,
    pydicom_reading,
)
from fastproto.data.formats.dicom_pixels import stored_frames
from fastproto.errors import LabelError, warn

if TYPE_CHECKING:
    from pydicom import Dataset

    from fastproto.data.volume import Volume


def find_segmentation(path: Path) -> Path | None:
    """``path`` if it is a DICOM segmentation, or the folder's only DICOM file if that is one.

    Raises:
        VolumeError: A damaged file.
    """
    if path.is_dir():
        inside = [entry for entry in path.iterdir() if entry.is_file() and entry.name[0] != "."]
        files, _ = dicom_header.dicom_files(inside)
        return find_segmentation(files[0]) if len(files) == 1 else None
    if not (path.is_file() and dicom_header.is_dicom(path)):
        return None
    dataset = _read_header(path)
    with pydicom_reading(path):
        return path if dicom_header.sop_classes(dataset) & dicom_header.SEGMENTATIONS else None


def segment_names(path: Path) -> dict[int, str]:
    """Segment number -> SegmentLabel; those that occur twice get their number as well.

    Raises:
        VolumeError: A damaged file, segments of one number.
    """
    return _names(path, _read_header(path))


def _names(path: Path, dataset: Dataset) -> dict[int, str]:
    with pydicom_reading(path):
        segments = [
            (int(item.SegmentNumber), str(item.get("SegmentLabel") or ""))
            for item in dataset.get("SegmentSequence") or []
        ]
        if dataset.get("SegmentationType") == "LABELMAP":  # whose background may be described too
            segments = [item for item in segments if item[0] != 0]
        given = [number for number, _ in segments]
        require_volume(
            len({*given}) == len(given) and min(given, default=0) > 0,
            path,
            found=f"segments numbered {', '.join(map(str, given)) or 'none at all'}",
            allowed="a SegmentSequence of different numbers above 0",
            fix=EXPORT_AGAIN,
        )
        return unique_names(segments)


def read_segmentation(path: Path, like: Volume) -> np.ndarray:
    """Read a DICOM segmentation.

    Args:
        path: Of BINARY, LABELMAP or FRACTIONAL type; of the last, what is drawn by at least half.
        like: The scan that it annotates.

    Returns:
        [Z, Y, X], uint16, on the grid of ``like``; slices without a frame are empty.

    Raises:
        VolumeError: A damaged file, or values that its type does not have.
        GeometryError: Frames that do not lie on the scan's voxels.
        LabelError: Segments that overlap.
    """
    dataset = _read_header(path)
    known = _names(path, dataset)
    labels = np.zeros(like.array.shape, np.uint16)
    partly = False
    with pydicom_reading(path):
        kind, most = _kind(path, dataset)
        shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])[:1]
        frames = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])
        count = int(dataset.get("NumberOfFrames") or 1)
        require_volume(
            len(frames) == count,
            path,
            found=f"a damaged or truncated DICOM file ({len(frames)} positions for {count} frames)",
            allowed="one for each frame",
            fix=EXPORT_AGAIN,
        )
        for index, (frame, pixels) in enumerate(zip(frames, stored_frames(path), strict=True)):
            where = [frame, *shared]
            name = f"{path}, frame {index + 1}"
            require_volume(
                pixels.min() >= 0 and pixels.max() <= most,
                name,
                found=f"values {pixels.min()} to {pixels.max()}",
                allowed=f"0 to {most} in a segmentation of type {kind}",
                fix=EXPORT_AGAIN,
            )
            seen = _voxels(name, where, dataset, pixels.shape, like, labels)
            if kind != "LABELMAP":
                partly |= bool(((pixels > 0) & (pixels < most)).any())
                segment = functional_group(where, dataset, "SegmentIdentificationSequence")
                number = segment.ReferencedSegmentNumber
                used = {int(number)}
                pixels = (pixels >= most / 2) * np.uint16(number)
            else:
                used = set(np.unique(pixels).tolist()) - {0}
            require_volume(
                used <= known.keys(),
                name,
                found=f"segment {min(used - known.keys(), default=0)}, which nothing describes",
                allowed=f"those of the SegmentSequence: {', '.join(map(str, known))}",
                fix=EXPORT_AGAIN,
            )
            clash = (seen > 0) & (pixels > 0) & (seen != pixels)
            if clash.any():
                both = f"both segment {seen[clash][0]} and segment {pixels[clash][0]}"
                raise LabelError(
                    name,
                    found=f"{clash.sum()} pixels of {both}",
                    allowed="segments that do not overlap",
                    fix="Export the segments one by one.",
                )
            np.maximum(seen, pixels, out=seen, casting="unsafe")
    if partly:
        warn(path, "a fractional segmentation: half of a voxel or more counts as drawn.")
    return labels


def _read_header(path: Path) -> Dataset:
    import pydicom

    with pydicom_reading(path):
        return pydicom.dcmread(path, force=True, stop_before_pixels=True)


def _kind(path: Path, dataset: Dataset) -> tuple[str, int]:
    """The type of a segmentation, and the largest value that its pixels may have."""
    kind = str(dataset.get("SegmentationType"))
    most = {
        "BINARY": 1,
        "LABELMAP": np.iinfo(np.uint16).max,
        "FRACTIONAL": int(dataset.get("MaximumFractionalValue") or 0),
    }
    require_volume(
        most.get(kind, 0) > 0,
        path,
        found=f"SegmentationType {kind}" + " without a maximum" * (kind == "FRACTIONAL"),
        allowed=", ".join(most),
        fix="Export the segmentation as NIfTI.",
    )
    return kind, most[kind]


def _voxels(
    name: str,
    where: list[Dataset],
    dataset: Dataset,
    shape: tuple[int, ...],
    like: Volume,
    labels: np.ndarray,
) -> np.ndarray:
    """The view [rows, columns] of ``labels``, on the grid of ``like``, where a frame lies."""
    measures = functional_group(where, dataset, "PixelMeasuresSequence")
    plane = functional_group(where, dataset, "PlanePositionSequence")
    orientation = functional_group(where, dataset, "PlaneOrientationSequence")
    axes = numbers(orientation, "ImageOrientationPatient", 6).reshape(2, 3)
    spacing = numbers(measures, "PixelSpacing", 2)[::-1]
    position = numbers(plane, "ImagePositionPatient", 3)
    # In voxels of the scan: where the first pixel lies, and the steps of columns and rows.
    to_voxels = np.linalg.inv(np.array(like.direction).reshape(3, 3) * np.array(like.spacing))
    start = to_voxels @ (position - np.array(like.origin))
    steps = (axes * spacing[:, None]) @ to_voxels.T
    exact = np.stack([start, *steps])
    whole = np.rint(np.nan_to_num(exact)).astype(int)
    corners = np.array([[1, 0, 0], [1, shape[1] - 1, 0], [1, 0, shape[0] - 1]])
    inside = (corners @ whole >= 0).all() and (corners @ whole < like.array.shape[::-1]).all()
    along = np.abs(whole[1:])
    require_geometry(
        np.isfinite(exact).all()
        and np.abs(corners @ (exact - whole)).max() <= GRID_TOLERANCE
        and inside
        and (along.sum(1) == 1).all()  # along one axis of the scan each, in steps of one voxel
        and not (along[0] == along[1]).all(),
        name,
        found="pixels that are no voxels of the scan",
        allowed=f"frames on the grid of {like.name}",
        fix="Name the scan that was annotated, or export the segmentation as NIfTI.",
    )
    place: list[int | slice] = [*whole[0].tolist()]
    across, down = along.argmax(1).tolist()
    for axis, step, count in zip((across, down), whole[1:], shape[::-1], strict=True):
        first, sign = int(whole[0, axis]), int(step[axis])
        stop = first + sign * count
        place[axis] = slice(first, stop if stop >= 0 else None, sign)
    frame = labels.T[tuple(place)]
    return frame.T if across < down else frame
