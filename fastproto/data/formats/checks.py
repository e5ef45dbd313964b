# SPDX-License-Identifier: Apache-2.0
"""What every volume must satisfy, each check once; ``path`` is the file that messages name.

They raise VolumeError, or GeometryError about the place of the voxels. Sizes are x first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastproto.errors import GeometryError, VolumeError, require

Numbers = tuple[float, ...]
Grid = tuple[Numbers, Numbers, Numbers]  # spacing, origin, direction
_BLOCK_VOXELS = 1 << 20
_PLAUSIBLE_MM = 0.01, 100.0
# Two grids are one when no corner is further apart than this part of the smallest voxel side:
# headers round to float32 or a few decimals, and that must not matter.
GRID_TOLERANCE = 0.05


class Voxels(NamedTuple):
    """What a format reads and writes, as the fields of Volume; written also [C, Z, Y, X]."""

    array: np.ndarray
    spacing: Numbers
    origin: Numbers
    direction: Numbers
    nifti: np.void | None = None
    modality: str | None = None
    slices: tuple[tuple[Path, int], ...] | None = None


require_volume = partial(require, error=VolumeError)
require_geometry = partial(require, error=GeometryError)


def check_voxels(path: object, voxels: Voxels) -> None:
    """Everything that holds whatever the format."""
    array, spacing, origin, direction, *_ = voxels
    check_size(path, array.shape[::-1])
    check_spacing(path, spacing)
    check_finite(path, "origin or direction", (*origin, *direction))
    check_axes(path, np.array(direction).reshape(3, 3))
    check_values(path, array)


def check_size(path: object, size: Sequence[int]) -> None:
    """Three dimensions; further ones may have size 1."""
    require_volume(
        len(size) >= 3 and min(size) >= 1 and all(extent == 1 for extent in size[3:]),
        path,
        found=f"a {len(size)}-D image of {' x '.join(map(str, size))} voxels",
        allowed="one 3-D volume with sizes above 0 (further dimensions of size 1 are fine)",
        fix="Save one volume of it as a file of its own.",
    )


def check_spacing(path: object, spacing: Iterable[float], name: str = "spacing") -> None:
    """Voxel sizes in mm, read from the field ``name``."""
    sizes = np.array(spacing)
    low, high = _PLAUSIBLE_MM
    found = f"{name} {', '.join(f'{size:g}' for size in sizes)}"
    require_geometry(
        np.isfinite(sizes).all() and (sizes > 0).all(),
        path,
        found=found,
        allowed="finite sizes above 0 mm",
        fix="Correct the header from the scanner's data; distances cannot be guessed.",
    )
    unit = "micrometres" if sizes.max() > high else "metres"
    require_geometry(
        ((low <= sizes) & (sizes <= high)).all(),
        path,
        found=f"{found} mm",
        allowed=f"voxels of {low:g} to {high:g} mm",
        fix=f"The sizes are probably in {unit}: correct the header.",
    )


def check_finite(path: object, name: str, numbers: Iterable[float]) -> None:
    """Numbers of the geometry, read from the field ``name``."""
    finite = np.isfinite(list(numbers)).all()
    require_geometry(finite, path, found=f"NaN or Inf in {name}", allowed="finite geometry")


def check_axes(path: object, axes: np.ndarray) -> None:
    """Unit vectors at right angles to within 1e-3, one per column."""
    require_geometry(
        np.allclose(axes.T @ axes, np.eye(axes.shape[1]), rtol=0, atol=1e-3),
        path,
        found=lambda: f"sheared or non-orthonormal axes {np.round(axes, 4).tolist()}",
        allowed="axes of unit length at right angles",
        fix="Resample the volume to an orthogonal grid.",
    )


def grid(spacing: np.ndarray, origin: np.ndarray, axes: np.ndarray) -> Grid:
    """The fields of Volume; of axes that ``check_axes`` accepts, the nearest orthonormal ones."""
    left, _, right = np.linalg.svd(axes)
    direction = (left @ right).ravel()
    return tuple(spacing.tolist()), tuple(origin.tolist()), tuple(direction.tolist())


def check_bytes(path: object, size: int, promised: int) -> None:
    """Bytes of voxels, and how many the header says there are."""
    require_volume(
        size == promised,
        path,
        found=f"{size} bytes of voxels where the header promises {promised}",
        allowed="exactly the voxels of the header",
        fix="The file is truncated or its header damaged: copy or export it again."
        if size < promised
        else f"{size - promised} bytes are too many, and where the voxels begin is unclear: "
        "export it again, or correct its header.",
    )


def check_values(path: object, array: np.ndarray) -> None:
    """Finite in float32, in which everything downstream computes."""
    start = 0
    for block in blocks(array) if array.dtype.kind == "f" else ():
        with np.errstate(over="ignore"):
            finite = np.isfinite(block.astype(np.float32, copy=False))
        if not finite.all():
            z, y, x = (int(i) for i in np.argwhere(~finite)[0])
            raise VolumeError(
                path,
                found=f"a voxel of {block[z, y, x]:g} at (x, y, z) = {(x, y, z + start)}",
                allowed="finite voxels within float32",
                fix="Replace NaN and Inf by a background value and check the intensity scaling.",
            )
        start += len(block)


def blocks(array: np.ndarray) -> list[np.ndarray]:
    """Views that cover ``array`` along its first axis, about a million voxels each."""
    rows = max(_BLOCK_VOXELS * len(array) // max(array.size, 1), 1)
    return [array[start : start + rows] for start in range(0, len(array), rows)]


def parsed(text: str) -> list[float]:
    """The numbers of a header's field.

    Raises:
        ValueError: Something else, as are Python's 1_000 and other digits than 0 to 9.
    """
    if "_" in text or not text.isascii():
        raise ValueError(text)
    return [float(word) for word in text.split()]


def unique_names(segments: Iterable[tuple[int, str]]) -> dict[int, str]:
    """Value -> name on one line; names that occur twice, or say nothing, get their value too."""
    names = {value: " ".join(name.split()) or "segment" for value, name in segments}
    counts = Counter({"segment": 1})  # which alone is no name
    counts.update(name.casefold() for name in names.values())
    return {
        value: name if counts[name.casefold()] == 1 else f"{name} {value}"
        for value, name in names.items()
    }
