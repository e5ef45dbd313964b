# SPDX-License-Identifier: Apache-2.0
"""One DICOM series of single-frame slices -> one array with its geometry.

The geometry comes from ImagePositionPatient and ImageOrientationPatient of every slice: the slice
thickness says nothing about the step between slices, and SimpleITK stretches the step over a
missing slice with no more than a warning.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from fastproto.data.formats.checks import Voxels, check_axes, require_geometry, require_volume
from fastproto.data.formats.simpleitk import quiet, reading

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
_EXPORT_AGAIN = "Export the series again, uncompressed, or remove the file if it is no slice of it."
_MOVE_OTHERS = "Move localisers and reformats into folders of their own."


class _Slice(NamedTuple):
    """What a file's header says; NaN stands for numbers that are absent or damaged."""

    path: Path
    series: str
    modality: str
    size: tuple[int, int]
    position: np.ndarray
    axes: np.ndarray
    pixel_spacing: np.ndarray
    thickness: float


def read_series(folder: Path, series: str | None = None) -> tuple[Voxels, str | None]:
    """Read the one DICOM series of a folder; the files may have any name.

    Args:
        folder: The folder, not searched below its top level.
        series: SeriesInstanceUID, needed where the folder holds several series.

    Returns:
        array [Z, Y, X] in the scanner's units (HU for CT: rescale slope and intercept applied),
        spacing (x, y, z) in mm, origin, direction (9, row by row); and the modality.

    Raises:
        VolumeError: No or several series, a damaged file, a missing or doubled slice, slices of
            different sizes, colour or multi-frame files.
        GeometryError: Slices without position, of different orientation, or sheared (gantry tilt).
    """
    paths = (path for path in sorted(folder.iterdir()) if path.is_file())
    slices = [_read_header(path) for path in paths if path.name[0] != "." and _is_slice(path)]
    require_volume(
        slices,
        folder,
        found="a folder without DICOM slices",
        allowed="a folder with one DICOM series",
        fix="Name the folder that holds the slices themselves.",
    )
    slices = _choose_series(folder, slices, series)
    row, column = _common_axes(folder, slices)
    spacing = slices[0].pixel_spacing.tolist()
    normal = np.cross(row, column)
    slices.sort(key=lambda item: float(item.position @ normal))
    step = _step(folder, slices, normal)
    voxels = (
        _pixels(slices),
        (*spacing, step),
        tuple(slices[0].position.tolist()),
        tuple(np.stack([row, column, normal], axis=1).ravel().tolist()),
    )
    return voxels, slices[0].modality or None


def _is_slice(path: Path) -> bool:
    """Whether a file, by its beginning, should hold a slice: DICOM, and of an image class.

    DICOM begins with the preamble (PS3.10 section 7.1), or in old files with its first element.
    """
    with open(path, "rb") as file:
        head = file.read(1024)
    if head[128:132] != b"DICM":
        return head[:4] in (b"\x08\x00\x00\x00", b"\x08\x00\x05\x00", b"\x08\x00\x08\x00")
    place = head.find(b"\x02\x00\x02\x00UI", 132)
    if place < 0:
        return True
    length = int.from_bytes(head[place + 6 : place + 8], "little")
    uid = head[place + 8 : place + 8 + length].rstrip(b"\0 ").decode("ascii", "replace")
    return not _NOT_A_SLICE.match(uid)


def _read_header(path: Path) -> _Slice:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    with reading(path, fix=_EXPORT_AGAIN), quiet():
        reader.ReadImageInformation()
    width, height, *frames = reader.GetSize()
    require_volume(
        not frames or frames[0] <= 1,
        path,
        found=lambda: f"a multi-frame DICOM file ({frames[0]} frames)",
        allowed="one slice per file",
        fix="Convert it to NIfTI first, e.g. with dcm2niix.",
    )
    scalar = reader.GetNumberOfComponents() == 1
    require_volume(scalar, path, found="colour pixels", allowed="one number per pixel")

    def text(tag: str) -> str:
        return reader.GetMetaData(tag).strip("\0 ") if reader.HasMetaDataKey(tag) else ""

    def numbers(tag: str, count: int) -> np.ndarray:
        try:
            found = np.array([float(word) for word in text(tag).split("\\")])
        except ValueError:
            found = np.empty(0)
        return found if len(found) == count else np.full(count, np.nan)

    return _Slice(
        path=path,
        series=text(_SERIES_UID),
        modality=text(_MODALITY),
        size=(height, width),
        position=numbers(_POSITION, 3),
        axes=numbers(_ORIENTATION, 6).reshape(2, 3),
        # DICOM gives the distance of rows (y) first.
        pixel_spacing=numbers(_PIXEL_SPACING, 2)[::-1],
        thickness=float(numbers(_SLICE_THICKNESS, 1)[0]),
    )


def _choose_series(folder: Path, slices: list[_Slice], series: str | None) -> list[_Slice]:
    found: dict[str, list[_Slice]] = {}
    for item in slices:
        found.setdefault(item.series, []).append(item)
    uid = slices[0].series if series is None and len(found) == 1 else series
    listing = "; ".join(
        f"{uid or '(no UID)'}: {len(items)} {items[0].modality or 'DICOM'} slices of "
        f"{items[0].size[1]} x {items[0].size[0]}"
        for uid, items in sorted(found.items())
    )
    require_volume(
        uid in found,
        folder,
        found=f"{len(found)} series ({listing})",
        allowed="one series, or the series of the given UID",
        fix="Name one by its UID, or put it into a folder of its own.",
    )
    return found[str(uid)]


def _common_axes(folder: Path, slices: Sequence[_Slice]) -> tuple[np.ndarray, np.ndarray]:
    """The row and column axes that all slices share, as they share size and pixel spacing."""
    sizes = sorted({item.size for item in slices})
    require_volume(
        len(sizes) == 1,
        folder,
        found="slices of " + ", ".join(f"{width} x {height}" for height, width in sizes),
        allowed="slices of one size",
        fix=_MOVE_OTHERS,
    )
    first = slices[0]
    for item in slices:
        numbers = np.concatenate([item.position, item.axes.ravel(), item.pixel_spacing])
        require_geometry(
            np.isfinite(numbers).all() and (item.pixel_spacing > 0).all(),
            item.path,
            found="no usable ImagePositionPatient, ImageOrientationPatient or PixelSpacing",
            allowed="slices that say where they lie and how large their pixels are",
            fix=_EXPORT_AGAIN,
        )
        require_geometry(
            np.allclose(item.axes, first.axes, rtol=0, atol=_ORIENTATION_TOLERANCE),
            folder,
            found=f"slices of different orientation ({first.path.name}, {item.path.name})",
            allowed="parallel slices",
            fix=_MOVE_OTHERS,
        )
        require_geometry(
            np.allclose(item.pixel_spacing, first.pixel_spacing, rtol=1e-3),
            folder,
            found=f"pixels of {first.pixel_spacing.tolist()} and {item.pixel_spacing.tolist()} mm",
            allowed="one pixel size",
            fix=_MOVE_OTHERS,
        )
    check_axes(folder, first.axes.T)
    # Rounded to a few digits in the file: made exactly orthonormal (Gram-Schmidt).
    row = first.axes[0] / np.linalg.norm(first.axes[0])
    column = first.axes[1] - (first.axes[1] @ row) * row
    return row, column / np.linalg.norm(column)


def _step(folder: Path, slices: Sequence[_Slice], normal: np.ndarray) -> float:
    """The distance of neighbouring slices in mm; they are sorted along ``normal``."""
    if len(slices) == 1:
        found = f"one slice of thickness {slices[0].thickness:g}"
        usable = 0 < slices[0].thickness < np.inf
        require_geometry(usable, slices[0].path, found=found, allowed="a SliceThickness above 0")
        return slices[0].thickness
    positions = np.stack([item.position for item in slices])
    heights = positions @ normal
    steps = np.diff(heights)
    step = float(np.median(steps))

    def between(index: int) -> str:
        pair = f"{slices[index].path.name}, {slices[index + 1].path.name}"
        return f"{heights[index]:.2f} and {heights[index + 1]:.2f} mm along the slice axis ({pair})"

    require_volume(
        not steps.min() <= 1e-3,
        folder,
        found=lambda: f"two slices at {between(int(np.argmin(steps)))}",
        allowed="one slice per position",
        fix="Export a single phase or echo into a folder of its own.",
    )
    uneven = np.abs(steps - step) > _STEP_TOLERANCE * step
    gap = int(np.argmax(uneven))
    require_volume(
        not uneven.any(),
        folder,
        found=f"a gap of {steps[gap]:.2f} mm between {between(gap)}",
        allowed=f"evenly spaced slices; the step is {step:.2f} mm",
        fix="A slice is missing or the spacing varies: export the series again or resample it.",
    )
    drift = positions[-1] - positions[0]
    shear = np.linalg.norm(drift - (drift @ normal) * normal)
    require_geometry(
        not shear > 0.5 * min(slices[0].pixel_spacing),
        folder,
        found=f"a stack sheared by {shear:.2f} mm (gantry tilt)",
        allowed="slices stacked at right angles",
        fix="Resample the series to an orthogonal grid.",
    )
    return float((heights[-1] - heights[0]) / (len(slices) - 1))


def _pixels(slices: Sequence[_Slice]) -> np.ndarray:
    """[Z, Y, X], one slice at a time so that nothing is held twice."""
    array = np.empty((len(slices), *slices[0].size), bool)
    for index, item in enumerate(slices):
        with reading(item.path, fix=_EXPORT_AGAIN), quiet():
            image = sitk.ReadImage(str(item.path), imageIO="GDCMImageIO")
        pixels = sitk.GetArrayViewFromImage(image).reshape(item.size)
        # The first slice gives the type; rescaling may widen it later on, as in PET.
        array = array.astype(np.result_type(array.dtype, pixels.dtype), copy=False)
        array[index] = pixels
    return array
