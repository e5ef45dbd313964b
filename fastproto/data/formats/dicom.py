# SPDX-License-Identifier: Apache-2.0
"""One DICOM series, of single slices or of multi-frame files -> one array with its geometry.

The geometry comes from ImagePositionPatient and ImageOrientationPatient of every slice: the slice
thickness says nothing about the step between slices, and a missing slice shows only there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastproto.data.formats.checks import (
    Voxels,
    check_axes,
    grid,
    require_geometry,
    require_volume,
)
from fastproto.data.formats.dicom_header import (
    EXPORT_AGAIN,
    Other,
    Slice,
    listing,
    read_headers,
)
from fastproto.data.formats.dicom_pixels import read_pixels
from fastproto.errors import warn

_ORIENTATION_TOLERANCE = 1e-3
_STEP_TOLERANCE = 0.05
_MOVE_OTHERS = "Move localisers and reformats into folders of their own."


def read_dicom(path: Path, series: str | None = None) -> Voxels:
    """Read the DICOM series in a folder, or in one multi-frame file; files may have any name.

    A folder may hold several series where only one has slices that say where they lie; what is
    left out is named in a warning.

    Args:
        path: The folder, not searched below its top level, or the file.
        series: SeriesInstanceUID, needed where there are several series.

    Returns:
        array [Z, Y, X] in the scanner's units (HU for CT: rescale slope and intercept applied),
        spacing (x, y, z) in mm, origin, direction (9, row by row); the modality; the files of
        the slices.

    Raises:
        VolumeError: No or several series, a damaged file, a missing or doubled slice, slices of
            different sizes, colour pixels.
        GeometryError: Slices without position, of different orientation, or sheared (gantry tilt).
    """
    folder = path.is_dir()
    slices, others = read_headers(sorted(path.iterdir()) if folder else [path])
    slices = _choose_series(path, slices, others, series)
    require_volume(
        folder or slices[0].frames > 1,
        path,
        found="a single slice of a DICOM series",
        allowed="a folder with the slices, or a multi-frame file",
        fix="Name the folder instead of one of its files.",
    )
    axes = _common_axes(path, slices)
    normal = axes[:, 2]
    slices.sort(key=lambda item: float(item.position @ normal))
    step = _step(path, slices, normal)
    _check_rescaling(path, slices)
    return Voxels(
        read_pixels(slices),
        *grid(np.array([*slices[0].pixel_spacing, step]), slices[0].position, axes),
        modality=slices[0].modality or None,
        slices=tuple((item.path, item.frame) for item in slices),
    )


def _choose_series(
    path: Path, slices: Sequence[Slice], others: Sequence[Other], series: str | None
) -> list[Slice]:
    """The slices of the one series meant; warns of what is left out.

    A damaged file that may be a slice of it is an error: where it is the last one, no gap shows.
    """
    root = path if path.is_dir() else path.parent
    found: dict[str, list[Slice]] = {}
    for item in slices:
        found.setdefault(item.series, []).append(item)
    placed = [uid for uid, items in found.items() if any(item.placed for item in items)] or [*found]
    chosen = placed[0] if series is None and len(placed) == 1 else series
    for other in others:
        # A file may be cut off within its UID.
        suspect = chosen is not None and chosen.startswith(other.series or "")
        require_volume(
            not (other.damaged and (suspect or not slices)),
            other.path,
            found=other.why,
            allowed="complete DICOM slices",
            fix=EXPORT_AGAIN,
        )
    require_volume(
        slices,
        path,
        found=listing(others, root) or "a folder without DICOM slices",
        allowed="a DICOM series of grey slices, or a multi-frame file that says where they lie",
        fix="Name the folder that holds the slices themselves.",
    )
    known = "; ".join(
        f"{uid or '(no UID)'}: {len(items)} {items[0].modality or 'DICOM'} slices of "
        f"{items[0].size[1]} x {items[0].size[0]}"
        for uid, items in sorted(found.items())
    )
    require_volume(
        chosen in found,
        path,
        found=f"{len(found)} series ({known})",
        allowed="one series, or the series of the given UID",
        fix="Name one by its UID, or put it into a folder of its own.",
    )
    beside = [] if series else [uid for uid in found if uid != chosen]
    why = "images that do not say where they lie"
    left = [Other(item.path, uid, why) for uid in beside for item in found[uid]]
    left += [item for item in others if item.image and (series is None or item.series is None)]
    if left:
        warn(path, f"left out {listing(left, root)}.")
    return found[str(chosen)]


def _check_rescaling(path: Path, slices: Sequence[Slice]) -> None:
    """All slices are rescaled or none is; warns of a CT whose values are not HU."""
    without = [item.name for item in slices if not item.rescaled]
    require_volume(
        len(without) in (0, len(slices)),
        path,
        found=lambda: f"slices with a rescale slope and intercept and without ({without[0]})",
        allowed="the same for all slices",
        fix=EXPORT_AGAIN,
    )
    units = {item.unit for item in slices if item.modality == "CT"} - {"", "HU", "US"}
    if units:
        warn(path, f"RescaleType {', '.join(sorted(units))}: the values are not HU.")


def _common_axes(folder: Path, slices: Sequence[Slice]) -> np.ndarray:
    """[3, 3], by column where columns and rows grow and the normal, of slices of one size."""
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
            fix=EXPORT_AGAIN,
        )
        require_geometry(
            np.allclose(item.axes, first.axes, rtol=0, atol=_ORIENTATION_TOLERANCE),
            folder,
            found=f"slices of different orientation ({first.name}, {item.name})",
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
    normal = np.cross(*first.axes)
    return np.column_stack([*first.axes, normal / np.linalg.norm(normal)])


def _step(folder: Path, slices: Sequence[Slice], normal: np.ndarray) -> float:
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
        pair = f"{slices[index].name}, {slices[index + 1].name}"
        return f"{heights[index]:.2f} and {heights[index + 1]:.2f} mm along the slice axis ({pair})"

    require_volume(
        not steps.min() <= 1e-3,
        folder,
        found=lambda: f"two slices at {between(int(np.argmin(steps)))}",
        allowed="one slice per position",
        fix="Export a single phase, echo or stack into a folder or file of its own.",
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
