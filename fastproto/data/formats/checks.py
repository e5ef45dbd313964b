# SPDX-License-Identifier: Apache-2.0
"""What every volume must satisfy, each check once; ``path`` is the file that messages name.

They raise VolumeError, or GeometryError about the place of the voxels. Sizes are x first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from fastproto.errors import GeometryError, VolumeError, require

Numbers = tuple[float, ...]
# Array [Z, Y, X], spacing, origin and direction, as the fields of Volume.
Voxels = tuple[np.ndarray, Numbers, Numbers, Numbers]
_BLOCK_VOXELS = 1 << 20

require_volume = partial(require, error=VolumeError)
require_geometry = partial(require, error=GeometryError)


def check_voxels(path: object, voxels: Voxels) -> None:
    """Everything that holds whatever the format."""
    array, spacing, origin, direction = voxels
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
    require_geometry(
        np.isfinite(sizes).all() and (sizes > 0).all(),
        path,
        found=f"{name} {', '.join(f'{size:g}' for size in sizes)}",
        allowed="finite sizes above 0 mm",
        fix="Correct the header from the scanner's data; distances cannot be guessed.",
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


def check_complete(path: object, size: int, promised: int) -> None:
    """Bytes of data, and how many the header says there are."""
    require_volume(
        size >= promised,
        path,
        found=f"{size} bytes of data where the header promises {promised}",
        allowed="a complete file",
        fix="The file is truncated or its header damaged: copy or export it again.",
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
