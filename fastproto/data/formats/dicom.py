# SPDX-License-Identifier: Apache-2.0
"""One DICOM series of single-frame slices -> one array with its geometry.

The geometry comes from ImagePositionPatient and ImageOrientationPatient of every slice: the slice
thickness says nothing about the step between slices, and SimpleITK stretches the step over a
missing slice with no more than a warning.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from fastproto.data.formats.common import Voxels, quiet, reason
from fastproto.errors import GeometryError, VolumeError, require

_MODALITY = "0008|0060"
_SERIES_UID = "0020|000e"
_POSITION = "0020|0032"
_ORIENTATION = "0020|0037"
_PIXEL_SPACING = "0028|0030"
_SLICE_THICKNESS = "0018|0050"

# SOP classes that lie beside the slices without being any: DICOMDIR, presentation states, raw data,
# registrations and segmentations, structured reports, documents, RT dose, structures and plans.
_NOT_A_SLICE = re.compile(
    r"1\.2\.840\.10008\.(1\.3\.10$|5\.1\.4\.1\.1\.(11|66|88|104)(\.|$)|5\.1\.4\.1\.1\.481\.[2-9]$)"
)
_ORIENTATION_TOLERANCE = 1e-3
_STEP_TOLERANCE = 0.05


@dataclass(frozen=True)
class _Slice:
    """What a file's header says; NaN stands for numbers that are absent or damaged."""

    path: Path
    series: str
    modality: str
    size: tuple[int, int]
    position: np.ndarray
    axes: np.ndarray
    pixel_spacing: np.ndarray
    thickness: float


def read_series(folder: Path, series: str | None = None) -> Voxels:
    """Read the one DICOM series of a folder; the files may have any name.

    Args:
        folder: The folder, not searched below its top level.
        series: SeriesInstanceUID, needed where the folder holds several series.

    Returns:
        array [Z, Y, X] in the scanner's units (HU for CT: rescale slope and intercept applied),
        spacing (x, y, z) in mm, origin, direction (9, row by row).

    Raises:
        VolumeError: No or several series, a damaged file, a missing or doubled slice, slices of
            different sizes, colour or multi-frame files.
        GeometryError: Slices without position, of different orientation, or sheared (gantry tilt).
    """
    slices = _choose_series(folder, _scan(folder), series)
    axes, spacing = _common_plane(folder, slices)
    normal = np.cross(axes[0], axes[1])
    slices.sort(key=lambda item: float(item.position @ normal))
    step = _step(folder, slices, normal)
    array = _pixels(slices)
    direction = np.stack([axes[0], axes[1], normal], axis=1)
    return (
        array,
        (*spacing, step),
        tuple(slices[0].position.tolist()),
        tuple(direction.ravel().tolist()),
    )


def _scan(folder: Path) -> list[_Slice]:
    slices = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        with open(path, "rb") as file:
            head = file.read(1024)
        if _is_slice(head):
            slices.append(_read_header(path))
    require(
        slices,
        folder,
        error=VolumeError,
        found="a folder without DICOM slices",
        allowed="a folder with one DICOM series",
        fix="Name the folder that holds the slices themselves.",
    )
    return slices


def _is_slice(head: bytes) -> bool:
    """Whether a file of this beginning should hold a slice: DICOM, and of an image class.

    DICOM begins with the preamble (PS3.10 section 7.1), or in old files with its first element.
    """
    if head[128:132] != b"DICM":
        return head[:4] in (b"\x08\x00\x00\x00", b"\x08\x00\x05\x00", b"\x08\x00\x08\x00")
    place = head.find(b"\x02\x00\x02\x00UI", 132)
    if place < 0:
        return True
    length = int.from_bytes(head[place + 6 : place + 8], "little")
    uid = head[place + 8 : place + 8 + length].rstrip(b"\0 ").decode("ascii", "replace")
    return not _NOT_A_SLICE.match(uid)


def _read_header(path: Path) -> _Slice:
    reader = _reader(path)
    try:
        with quiet():
            reader.ReadImageInformation()
    except RuntimeError as error:
        raise VolumeError(
            path,
            found=f"a damaged or truncated DICOM file ({reason(error)})",
            allowed="complete slices",
            fix="Export the series again, or remove the file if it is no slice of it.",
        ) from error
    width, height, *frames = reader.GetSize()
    require(
        not frames or frames[0] <= 1,
        path,
        error=VolumeError,
        found=lambda: f"a multi-frame DICOM file ({frames[0]} frames)",
        allowed="one slice per file",
        fix="Convert it to NIfTI first, e.g. with dcm2niix.",
    )
    if reader.GetNumberOfComponents() != 1:
        raise VolumeError(path, found="colour pixels", allowed="one number per pixel")
    return _Slice(
        path=path,
        series=_text(reader, _SERIES_UID),
        modality=_text(reader, _MODALITY),
        size=(height, width),
        position=_numbers(reader, _POSITION, 3),
        axes=_numbers(reader, _ORIENTATION, 6).reshape(2, 3),
        # DICOM gives the distance of rows (y) first.
        pixel_spacing=_numbers(reader, _PIXEL_SPACING, 2)[::-1],
        thickness=float(_numbers(reader, _SLICE_THICKNESS, 1)[0]),
    )


def _reader(path: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    return reader


def _text(reader: sitk.ImageFileReader, tag: str) -> str:
    return reader.GetMetaData(tag).strip("\0 ") if reader.HasMetaDataKey(tag) else ""


def _numbers(reader: sitk.ImageFileReader, tag: str, count: int) -> np.ndarray:
    try:
        numbers = np.array([float(word) for word in _text(reader, tag).split("\\")])
    except ValueError:
        numbers = np.empty(0)
    return numbers if len(numbers) == count else np.full(count, np.nan)


def _choose_series(folder: Path, slices: list[_Slice], series: str | None) -> list[_Slice]:
    found: dict[str, list[_Slice]] = {}
    for item in slices:
        found.setdefault(item.series, []).append(item)
    if series is None and len(found) == 1:
        return slices
    if series in found:
        return found[series]
    listing = "; ".join(
        f"{uid or '(no UID)'}: {len(items)} {items[0].modality or 'DICOM'} slices of "
        f"{items[0].size[1]} x {items[0].size[0]}"
        for uid, items in sorted(found.items())
    )
    raise VolumeError(
        folder,
        found=f"{len(found)} series ({listing})",
        allowed="one series, or the series of the given UID",
        fix="Name one by its UID, or put it into a folder of its own.",
    )


def _common_plane(folder: Path, slices: Sequence[_Slice]) -> tuple[np.ndarray, tuple[float, float]]:
    """The row and column axes [2, 3] and the pixel spacing (x, y) that all slices share."""
    sizes = sorted({item.size for item in slices})
    require(
        len(sizes) == 1,
        folder,
        error=VolumeError,
        found="slices of " + ", ".join(f"{width} x {height}" for height, width in sizes),
        allowed="slices of one size",
        fix="Move localisers and reformats into folders of their own.",
    )
    for item in slices:
        numbers = np.concatenate([item.position, item.axes.ravel(), item.pixel_spacing])
        require(
            np.isfinite(numbers).all() and (item.pixel_spacing > 0).all(),
            item.path,
            error=GeometryError,
            found="no usable ImagePositionPatient, ImageOrientationPatient or PixelSpacing",
            allowed="slices that say where they lie and how large their pixels are",
        )
    axes, spacing = slices[0].axes, slices[0].pixel_spacing
    for item in slices:
        require(
            np.allclose(item.axes, axes, rtol=0, atol=_ORIENTATION_TOLERANCE),
            folder,
            error=GeometryError,
            found=f"slices of different orientation ({slices[0].path.name}, {item.path.name})",
            allowed="parallel slices",
            fix="Move localisers and reformats into folders of their own.",
        )
        require(
            np.allclose(item.pixel_spacing, spacing, rtol=1e-3),
            folder,
            error=GeometryError,
            found=f"pixels of {spacing.tolist()} and {item.pixel_spacing.tolist()} mm",
            allowed="one pixel size",
        )
    require(
        np.allclose(axes @ axes.T, np.eye(2), rtol=0, atol=_ORIENTATION_TOLERANCE),
        folder,
        error=GeometryError,
        found=f"ImageOrientationPatient {axes.ravel().tolist()}",
        allowed="two unit vectors at right angles",
    )
    # Rounded to a few digits in the file: made exactly orthonormal (Gram-Schmidt).
    row = axes[0] / np.linalg.norm(axes[0])
    column = axes[1] - (axes[1] @ row) * row
    return np.stack([row, column / np.linalg.norm(column)]), (float(spacing[0]), float(spacing[1]))


def _step(folder: Path, slices: Sequence[_Slice], normal: np.ndarray) -> float:
    """The distance of neighbouring slices in mm; they are sorted along ``normal``."""
    if len(slices) == 1:
        thickness = slices[0].thickness
        require(
            np.isfinite(thickness) and thickness > 0,
            slices[0].path,
            error=GeometryError,
            found="one slice without SliceThickness",
            allowed="a thickness",
        )
        return thickness
    positions = np.stack([item.position for item in slices])
    heights = positions @ normal
    steps = np.diff(heights)
    step = float(np.median(steps))
    doubled = int(np.argmin(steps))
    require(
        not steps[doubled] <= 1e-3,
        folder,
        error=VolumeError,
        found=f"two slices at {heights[doubled]:.2f} mm along the slice axis "
        f"({slices[doubled].path.name}, {slices[doubled + 1].path.name})",
        allowed="one slice per position",
        fix="Export a single phase or echo into a folder of its own.",
    )
    uneven = np.abs(steps - step) > _STEP_TOLERANCE * step
    gap = int(np.argmax(uneven))
    require(
        not uneven.any(),
        folder,
        error=VolumeError,
        found=f"a gap of {steps[gap]:.2f} mm between {heights[gap]:.2f} and "
        f"{heights[gap + 1]:.2f} mm along the slice axis ({slices[gap].path.name}, "
        f"{slices[gap + 1].path.name}), where the step is {step:.2f} mm",
        allowed="evenly spaced slices",
        fix="A slice is missing or the spacing varies: export the series again or resample it.",
    )
    drift = positions[-1] - positions[0]
    drift = drift - (drift @ normal) * normal
    require(
        not np.linalg.norm(drift) > 0.5 * min(slices[0].pixel_spacing),
        folder,
        error=GeometryError,
        found=f"a stack sheared by {np.linalg.norm(drift):.2f} mm (gantry tilt)",
        allowed="slices stacked at right angles",
        fix="Resample the series to an orthogonal grid.",
    )
    return float((heights[-1] - heights[0]) / (len(slices) - 1))


def _pixels(slices: Sequence[_Slice]) -> np.ndarray:
    """[Z, Y, X], one slice at a time so that nothing is held twice."""
    array: np.ndarray | None = None
    for index, item in enumerate(slices):
        try:
            with quiet():
                image = _reader(item.path).Execute()
        except RuntimeError as error:
            raise VolumeError(
                item.path,
                found=f"pixels that cannot be decoded ({reason(error)})",
                allowed="complete slices in a transfer syntax GDCM reads",
                fix="Export the series again, uncompressed.",
            ) from error
        pixels = sitk.GetArrayViewFromImage(image).reshape(item.size)
        if array is None:
            array = np.empty((len(slices), *item.size), pixels.dtype)
        elif not np.can_cast(pixels.dtype, array.dtype):
            array = array.astype(np.result_type(array, pixels))
        array[index] = pixels
    assert array is not None
    return array
