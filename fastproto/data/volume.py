# SPDX-License-Identifier: Apache-2.0
"""Volumes in and out: the one door for image files, with every check of them.

Arrays are [Z, Y, X] in the axes of the file; spacing, origin and direction are in mm and in the
patient's LPS coordinates, as DICOM and ITK have them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastproto._files import atomic_write
from fastproto.data.formats.checks import (
    GRID_TOLERANCE,
    Voxels,
    blocks,
    check_voxels,
    require_volume,
)
from fastproto.data.formats.dicom import read_dicom
from fastproto.data.formats.dicom_header import is_dicom
from fastproto.data.formats.dicom_seg import find_segmentation, read_segmentation
from fastproto.data.formats.dicom_seg_writer import source_images, write_segmentation
from fastproto.data.formats.nrrd import write_segments
from fastproto.data.formats.reading import reading
from fastproto.data.formats.table import CONVERT, FORMATS, READABLE, WRITABLE
from fastproto.data.label_table import MAX_LABEL
from fastproto.errors import ArgumentError, GeometryError, LabelError, VolumeError, require

LABELS_WRITABLE = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".mha", ".dcm")
_LABEL_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3-D scalar image and the place of its voxels.

    Attributes:
        array: [Z, Y, X], the file's own axes.
        spacing: Voxel size (x, y, z) in mm.
        origin: Centre of the first voxel (x, y, z) in mm, LPS.
        direction: 3 x 3 matrix, row by row; column j is the axis along which index j grows.
        path: Where it was read from; None for a volume made in memory.
        nifti: Of a NIfTI file, the fields of its header that place the voxels: a result on the
            same grid gets both forms and their codes as they were.
        modality: DICOM's, such as "CT", "MR" or "PT"; None where nothing says it.
        slices: Of a DICOM series, the file of every slice and its frame there, from 0.
    """

    array: np.ndarray
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    origin: tuple[float, ...] = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    path: Path | None = None
    nifti: np.void | None = None
    modality: str | None = None
    slices: tuple[tuple[Path, int], ...] | None = None

    @property
    def name(self) -> str:
        """What error messages call it."""
        return "volume" if self.path is None else str(self.path)


def volume_suffix(path: str | os.PathLike[str]) -> str | None:
    """The suffix of a readable volume file in lower case; None for any other file."""
    name = Path(path).name.lower()
    return next((suffix for suffix in READABLE if name.endswith(suffix)), None)


def without_suffix(name: str) -> str:
    """A file name without the suffix of a readable volume; any other name as it is."""
    suffix = volume_suffix(name)
    return name[: -len(suffix)] if suffix else name


def read_volume(path: str | os.PathLike[str], *, series: str | None = None) -> Volume:
    """Read an image file or a DICOM series, or say what is wrong with it.

    Args:
        path: A .nii, .nii.gz, .nrrd, .nhdr, .mha or .mhd file, a folder with a DICOM series, or a
            multi-frame DICOM file. A file with more than three dimensions is taken when the further
            ones have size 1.
        series: SeriesInstanceUID, needed where the folder holds several series.

    Warns:
        FastprotoWarning: A NIfTI file whose sform and qform disagree or that has neither, gzip data
            named .nii, a header without axes or origin, bytes after compressed data.

    Raises:
        VolumeError: No such file, unknown format, truncated or damaged data, more bytes than the
            header promises, NaN or Inf voxels, not a 3-D scalar volume, more than memory holds, a
            DICOM series with a missing slice.
        GeometryError: Spacing that is missing or not within 0.01 to 100 mm, in an unknown unit, a
            direction further than 1e-3 from orthonormal.
    """
    path = Path(path)
    suffix = volume_suffix(path)
    name = path.name.lower()
    with reading(path):
        require_volume(
            path.exists(), path, found="no such file or folder", allowed="an existing volume"
        )
        require_volume(
            suffix or path.is_dir() or is_dicom(path),
            path,
            found="a file of unknown format",
            allowed=f"{', '.join(READABLE)}, a multi-frame DICOM file, or a folder with a DICOM "
            "series",
            fix=next((text for ending, text in CONVERT.items() if name.endswith(ending)), None),
        )
        named = suffix and path.is_file()
        voxels = FORMATS[suffix or ""].read(path) if named else read_dicom(path, series)
    check_voxels(path, voxels)
    return Volume(*voxels[:4], path, *voxels[4:])


def read_label(
    path: str | os.PathLike[str], *, series: str | None = None, like: Volume | None = None
) -> Volume:
    """Read a label map: a volume whose voxels are integers >= 0, or a DICOM segmentation (SEG).

    Values stored as real numbers are rounded where they are within 1e-3 of an integer. The values
    of a segmentation are its segment numbers.

    Args:
        path: As in ``read_volume``, or a DICOM segmentation, or a folder that holds one.
        series: As in ``read_volume``.
        like: The scan that is annotated. A DICOM segmentation needs it, for its grid; one of 3D
            Slicer that is a part of that grid is put there.

    Returns:
        A volume of uint8, or of uint16 where a label is above 255.

    Raises:
        LabelError: Fractional or negative labels, labels above 65535, or overlapping segments.
        VolumeError, GeometryError: As in ``read_volume``.
    """
    path = Path(path)
    with reading(path):
        segmentation = find_segmentation(path)
        if segmentation is not None:
            if like is None:
                raise VolumeError(
                    path,
                    found="a DICOM segmentation",
                    allowed="one together with the scan that it annotates, which has the grid",
                    fix="Convert it to NIfTI first.",
                )
            volume = replace(like, array=read_segmentation(segmentation, like), path=path)
    if segmentation is None:
        volume = read_volume(path, series=series)
        if like is not None and volume_suffix(path) == ".seg.nrrd":
            volume = _uncropped(volume, like)
    return replace(volume, array=_integer_labels(volume))


def check_labels(
    label: Volume, names: Mapping[int, str] | None = None, *, needed: bool = True
) -> list[int]:
    """The labels above 0 that occur, in order.

    Args:
        label: What ``read_label`` returned.
        names: The known labels; None accepts any.
        needed: Refuse a map without any label.

    Raises:
        LabelError: The map is empty, or holds labels that ``names`` does not know.
    """
    seen = np.zeros(int(label.array.max()) + 1, dtype=bool)
    for block in blocks(label.array):
        seen[block] = True
    present = (np.flatnonzero(seen[1:]) + 1).tolist()
    require(
        present or not needed,
        label.name,
        error=LabelError,
        found="an empty label map (no voxel above 0)",
        allowed="at least one annotated voxel",
        fix="Annotate the structure, or name the right label file.",
    )
    unknown = [value for value in present if names is not None and value not in names]
    known = ", ".join(f"{value} {name}" for value, name in sorted((names or {}).items()))
    require(
        not unknown,
        label.name,
        error=LabelError,
        found=f"unknown labels {', '.join(map(str, unknown))}",
        allowed=f"0 background, {known}",
        fix="Name the labels, or remove them from the map.",
    )
    return present


def check_same_grid(a: Volume, b: Volume) -> None:
    """Refuse two volumes whose voxels do not lie at the same places.

    Raises:
        GeometryError: Different sizes, or a corner that differs by over 5 % of a voxel.
    """
    require(
        _same_grid(a, b),
        b.name,
        error=GeometryError,
        found=lambda: f"{_grid(b)}; its corners lie up to {_distance(a, b):.3g} mm away",
        allowed=f"the grid of {a.name}, {_grid(a)}",
        fix="Resample one onto the grid of the other.",
    )


def write_volume(path: str | os.PathLike[str], array: np.ndarray, like: Volume) -> None:
    """Write an array on the grid of ``like``: compressed, atomic, without patient metadata.

    Args:
        path: A .nii.gz, .nii, .nrrd or .mha file; missing folders are made.
        array: [Z, Y, X], or [C, Z, Y, X] for C values per voxel, written as vector pixels (the
            form both 3D Slicer and ITK-SNAP open). Integers become the smallest of uint8, uint16,
            int16 and int32 that holds them, real numbers float32.
        like: Gives spacing, origin and direction. Where it was read from a NIfTI file and the
            result is one, both have the same qform and sform with the same codes.

    Raises:
        ArgumentError: Unknown suffix, other shape, NaN, Inf or integers beyond int32.
        OutputError: The folder cannot be written or the disk is full; an old file survives.
    """
    path = Path(path)
    suffix = next((suffix for suffix in WRITABLE if path.name.endswith(suffix)), "")
    require(suffix, path, found=f"suffix {path.suffix!r}", allowed=", ".join(WRITABLE))
    require(
        array.shape[-3:] == like.array.shape and array.ndim in (3, 4),
        "array",
        found=f"shape {tuple(array.shape)}",
        allowed=f"{like.array.shape}, or that with leading channels",
    )
    with atomic_write(path) as temporary:
        WRITABLE[suffix](temporary, _voxels(array, like))


def label_suffix(path: str | os.PathLike[str]) -> str | None:
    """The ending of a file that `write_label` writes; None for any other."""
    return next((suffix for suffix in LABELS_WRITABLE if Path(path).name.endswith(suffix)), None)


def check_label_output(path: str | os.PathLike[str], like: Volume) -> None:
    """Find out before a long computation whether `write_label` can write of this scan.

    Raises:
        VolumeError, ArgumentError: As there.
    """
    suffix = label_suffix(path)
    require(suffix, path, found="a file of another name", allowed=", ".join(LABELS_WRITABLE))
    if suffix == ".dcm":
        source_images(like)


def write_label(
    path: str | os.PathLike[str],
    array: np.ndarray,
    like: Volume,
    names: Mapping[int, str] | None = None,
) -> None:
    """Write a label map on the grid of ``like``, in the format that the file's name ends in.

    Args:
        path: As in ``write_volume``; or .seg.nrrd, 3D Slicer's segmentation, or .dcm, a DICOM
            segmentation (SEG), in which the values have names, colours and codes.
        array: [Z, Y, X], integers from 0 to 65535.
        like: Gives the grid. Of a .dcm also the patient, the study and the slices: it must have
            been read from DICOM. Its segments are numbered from 1 in the order of the values.
        names: Of the values; others are called ``label 3``.

    Raises:
        ArgumentError: Unknown ending, other shape, or highdicom is missing for a .dcm.
        LabelError: Other numbers.
        VolumeError: A .dcm of a scan that is not DICOM, or of slices to which it cannot refer.
        OutputError: As in ``write_volume``.
    """
    path = Path(path)
    check_label_output(path, like)
    found, allowed = f"shape {tuple(array.shape)}", f"{like.array.shape}"
    require(array.shape == like.array.shape, "array", found=found, allowed=allowed)
    if label_suffix(path) in WRITABLE:
        return write_volume(path, array, like)
    label = replace(like, array=array, path=None)
    label = replace(label, array=_integer_labels(label))
    present = check_labels(label, needed=False)
    names = {**{value: f"label {value}" for value in present}, **(names or {})}
    fix = "Name the organs, or write .nii.gz."
    require(names, path, found="a label map without any label", allowed="one at least", fix=fix)
    with atomic_write(path) as temporary:
        if label_suffix(path) == ".dcm":
            write_segmentation(temporary, label.array, names, like)
        else:
            write_segments(temporary, _voxels(label.array, like), names)


def _voxels(array: np.ndarray, like: Volume) -> Voxels:
    return Voxels(
        _storable(array),
        tuple(map(float, like.spacing)),
        tuple(map(float, like.origin)),
        tuple(map(float, like.direction)),
        like.nifti,
    )


def _integer_labels(volume: Volume) -> np.ndarray:
    array, low, high = volume.array, volume.array.min(), volume.array.max()
    if low < -_LABEL_TOLERANCE:
        raise LabelError(volume.name, found=f"label {low:g}", allowed="integers of 0 and above")
    if high > MAX_LABEL:
        allowed = f"integers up to {MAX_LABEL}"
        raise LabelError(volume.name, found=f"label {high:g}", allowed=allowed)
    dtype = np.uint8 if round(high) <= 255 else np.uint16
    if array.dtype.kind != "f":
        return array.astype(dtype)
    labels = np.empty(array.shape, dtype)
    for block, target in zip(blocks(array), blocks(labels), strict=True):
        target[...] = rounded = np.rint(block)
        fractional = block[np.abs(block - rounded) > _LABEL_TOLERANCE]
        if fractional.size:
            raise LabelError(
                volume.name,
                found=f"the fractional label {fractional[0]:g}",
                allowed="integers of 0 and above",
                fix="Is it an intensity or probability image? Resample labels by nearest voxel.",
            )
    return labels


def _storable(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "f":
        require(np.isfinite(array).all(), "array", found="NaN or Inf", allowed="finite numbers")
        return array.astype(np.float32, copy=False)
    low, high = int(array.min()), int(array.max())
    for dtype in (np.uint8, np.uint16, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype, copy=False)
    raise ArgumentError("array", found=f"values {low} to {high}", allowed="integers within int32")


def _uncropped(label: Volume, like: Volume) -> Volume:
    """A box of the grid of ``like``, to which 3D Slicer may crop, on all of it; else as it is."""
    axes = np.array(like.direction).reshape(3, 3) * np.array(like.spacing)
    first = np.rint(np.linalg.solve(axes, np.subtract(label.origin, like.origin))).astype(int)
    start = first[::-1]
    stop = start + label.array.shape
    if (start < 0).any() or (stop > like.array.shape).any():
        return label
    box = tuple(map(slice, start, stop))
    origin = tuple((np.array(like.origin) + axes @ first).tolist())
    if not _same_grid(replace(like, array=like.array[box], origin=origin), label):
        return label
    whole = np.zeros(like.array.shape, label.array.dtype)
    whole[box] = label.array
    return replace(like, array=whole, path=label.path)


def _same_grid(a: Volume, b: Volume) -> bool:
    same = a.array.shape == b.array.shape
    return bool(same and _distance(a, b) <= GRID_TOLERANCE * min(*a.spacing, *b.spacing))


def _distance(a: Volume, b: Volume) -> float:
    """Between the corners that are furthest apart, along one axis, in mm."""
    return float(np.abs(_corners(a) - _corners(b)).max())


def _corners(volume: Volume) -> np.ndarray:
    """[8, 3] centres of the corner voxels in mm."""
    index = np.indices((2, 2, 2)).reshape(3, 8).T * (np.array(volume.array.shape[::-1]) - 1)
    axes = np.array(volume.direction).reshape(3, 3) * np.array(volume.spacing)
    return index @ axes.T + np.array(volume.origin)


def _grid(volume: Volume) -> str:
    fields = volume.array.shape[::-1], volume.spacing, volume.origin, volume.direction
    listed = ("(" + ", ".join(f"{number:.6g}" for number in field) + ")" for field in fields)
    return "{} voxels, spacing {}, origin {}, direction {}".format(*listed)
