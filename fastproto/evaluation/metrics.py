# SPDX-License-Identifier: Apache-2.0
"""Overlap and surface distance of two masks, with the definition of every number stated.

Published "HD95" and "NSD" differ between tools; these are MONAI's:

* **Dice** ``2 |A & B| / (|A| + |B|)`` over voxels.
* **HD95** in mm: for each of the two directions, the 95th percentile (linear interpolation) of the
  distances from the border voxels of one mask to the nearest border voxel of the other; the larger
  of the two. A border voxel is one with a face on the outside or at the edge of the volume. Equals
  ``monai.metrics.compute_hausdorff_distance(percentile=95, spacing=...)``.
* **ASSD** in mm: the mean over the same distances, both directions pooled. Equals
  ``monai.metrics.compute_average_surface_distance(symmetric=True, spacing=...)``.
* **NSD** at a tolerance: the share of both surfaces that lies within the tolerance of the other,
  each surface element weighted with its area by marching cubes. The definition of DeepMind's
  ``surface-distance`` (Nikolov et al., arXiv:1809.04430); equals
  ``monai.metrics.compute_surface_dice(use_subvoxels=True, spacing=...)``.

Empty masks: where both are empty, nothing can be measured and every metric is NaN (averages leave
it out). Where one is empty, Dice and NSD are 0, and HD95 and ASSD are NaN: a missed organ has no
distance, so it must be counted beside the averages.

Distances are exact and come from a k-d tree over the surface points: on organs this is several
times faster than a distance transform of their box, and the memory grows with the surface only.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import binary_erosion
from scipy.spatial import KDTree

from fastproto.errors import ArgumentError

DEFINITIONS: dict[str, str] = {
    "dice": "2|A&B| / (|A|+|B|) over voxels",
    "hd95": (
        "mm, larger of the two directed 95th percentiles between border voxels "
        "(MONAI compute_hausdorff_distance, percentile=95)"
    ),
    "assd": (
        "mm, mean of both directed distances between border voxels, pooled "
        "(MONAI compute_average_surface_distance, symmetric=True)"
    ),
    "nsd": (
        "share of surface area within the tolerance, marching-cubes elements "
        "(DeepMind surface-distance; MONAI compute_surface_dice, use_subvoxels=True)"
    ),
}

_NAN = float("nan")


class SurfaceMetrics(NamedTuple):
    """Surface distances of two masks: ``hd95`` and ``assd`` in mm, ``nsd`` in 0..1."""

    hd95: float
    assd: float
    nsd: float


def dice(prediction: ArrayLike, truth: ArrayLike) -> float:
    """Dice overlap of two masks of any (equal) shape; 0..1, NaN where both are empty.

    Raises:
        ArgumentError: The shapes differ, or a mask holds values other than 0 and 1.
    """
    a, b = _two_masks(prediction, truth)
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return 2 * np.count_nonzero(a & b) / total if total else _NAN


def hd95(prediction: ArrayLike, truth: ArrayLike, *, spacing: Sequence[float]) -> float:
    """Symmetric 95th percentile of the surface distance, mm; see :func:`surface_metrics`."""
    return _border_metrics(*_crop(*_volumes(prediction, truth)), _checked_spacing(spacing))[0]


def assd(prediction: ArrayLike, truth: ArrayLike, *, spacing: Sequence[float]) -> float:
    """Average symmetric surface distance, mm; see :func:`surface_metrics`."""
    return _border_metrics(*_crop(*_volumes(prediction, truth)), _checked_spacing(spacing))[1]


def nsd(
    prediction: ArrayLike, truth: ArrayLike, *, spacing: Sequence[float], tolerance: float = 2.0
) -> float:
    """Normalised surface Dice at ``tolerance`` mm, 0..1; see :func:`surface_metrics`."""
    masks = _crop(*_volumes(prediction, truth))
    return _normalised_surface_dice(
        *masks, _checked_spacing(spacing), _checked_tolerance(tolerance)
    )


def surface_metrics(
    prediction: ArrayLike,
    truth: ArrayLike,
    *,
    spacing: Sequence[float],
    nsd_tolerance: float = 2.0,
) -> SurfaceMetrics:
    """HD95, ASSD and NSD of two masks [Z, Y, X], as the module defines them.

    Args:
        prediction: Mask of booleans or of 0 and 1.
        truth: Mask of the same shape.
        spacing: Size of a voxel in mm along the axes of the array, (z, y, x): the reverse of
            ``Volume.spacing``.
        nsd_tolerance: Distance in mm up to which a surface counts as right.

    Raises:
        ArgumentError: The shapes differ or are not 3-D, a mask holds values other than 0 and 1, or
            the spacing or tolerance is out of range.
    """
    masks = _crop(*_volumes(prediction, truth))
    steps = _checked_spacing(spacing)
    tolerance = _checked_tolerance(nsd_tolerance)
    return SurfaceMetrics(
        *_border_metrics(*masks, steps), _normalised_surface_dice(*masks, steps, tolerance)
    )


def _border_metrics(a: np.ndarray, b: np.ndarray, spacing: np.ndarray) -> tuple[float, float]:
    """(HD95, ASSD) of two cropped masks, mm."""
    if not (a.any() and b.any()):
        return _NAN, _NAN
    points_a, points_b = (np.argwhere(m & ~binary_erosion(m)) * spacing for m in (a, b))
    from_a = _nearest(points_a, points_b)
    from_b = _nearest(points_b, points_a)
    far = max(np.percentile(from_a, 95), np.percentile(from_b, 95))
    return float(far), float(np.concatenate([from_a, from_b]).mean(dtype=np.float64))


def _normalised_surface_dice(
    a: np.ndarray, b: np.ndarray, spacing: np.ndarray, tolerance: float
) -> float:
    """NSD of two cropped masks."""
    if not (a.any() and b.any()):
        return 0.0 if a.any() or b.any() else _NAN
    areas = _surface_areas(tuple(spacing.tolist()))
    points_a, area_a = _surface_elements(a, areas, spacing)
    points_b, area_b = _surface_elements(b, areas, spacing)
    reach = 1.001 * tolerance + 1e-6
    near = area_a[_nearest(points_a, points_b, reach) <= tolerance].sum()
    near += area_b[_nearest(points_b, points_a, reach) <= tolerance].sum()
    return float(near / (area_a.sum() + area_b.sum()))


def _nearest(points: np.ndarray, others: np.ndarray, reach: float = np.inf) -> np.ndarray:
    """Distance from every point to the nearest of the others, float32; infinite beyond ``reach``.

    Rounded to float32 so that a distance equal to the tolerance counts as within it, whatever the
    last bit of ``3 * 0.7``.
    """
    tree = KDTree(others, leafsize=32)
    return tree.query(points, distance_upper_bound=reach)[0].astype(np.float32)


def _surface_elements(
    mask: np.ndarray, areas: np.ndarray, spacing: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where eight voxels meet that are not all alike: positions [N, 3] in mm, areas [N] in mm2."""
    codes = _neighbour_codes(mask)
    where = np.argwhere((codes != 0) & (codes != 255))
    return where * spacing, areas[codes[tuple(where.T)]]


def _neighbour_codes(mask: np.ndarray) -> np.ndarray:
    """Which of the eight voxels around every corner are set: uint8, one larger along each axis."""
    padded = np.pad(mask, 1).view(np.uint8)
    shape = np.array(padded.shape) - 1
    codes = np.zeros(shape, dtype=np.uint8)
    for bit, offset in enumerate(itertools.product((0, 1), repeat=3)):
        window = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
        codes |= padded[window] << np.uint8(7 - bit)
    return codes


# The marching-cubes triangles of each way to set corners of a cube, up to symmetry: set corners
# as (z, y, x), and per triangle its area vector in units of 1/8 of the cube's faces. Triangles
# with the same direction are one row. Lorensen & Cline 1987, in the reading of DeepMind's table.
_CUBE_CASES: tuple[tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]], ...] = (
    (("111",), ((1, 1, 1),)),
    (("110", "111"), ((4, 4, 0),)),
    (("101", "110"), ((1, -1, 1), (-1, -1, 1))),
    (("101", "110", "111"), ((4, 0, 0), (3, 3, 3))),
    (("100", "101", "110", "111"), ((8, 0, 0),)),
    (("011", "101", "110"), ((-1, -1, 1), (1, -1, 1), (1, -1, -1))),
    (("011", "101", "110", "111"), ((6, 6, 6),)),
    (("011", "100"), ((-1, 1, 1), (1, -1, -1))),
    (("011", "100", "111"), ((0, 4, 4), (-1, 1, 1))),
    (("011", "100", "110", "111"), ((4, 4, 4), (0, -2, 2), (-2, 0, 2))),
    (("011", "100", "101", "110"), ((4, 0, 0), (4, 4, 4))),
    (("010", "011", "100", "101"), ((8, -8, 0),)),
    (("001", "010", "100", "111"), ((-1, 1, 1), (1, -1, 1), (-1, -1, 1), (1, 1, 1))),
)


@functools.lru_cache(maxsize=32)
def _surface_areas(spacing: tuple[float, float, float]) -> np.ndarray:
    """Area in mm2 of the surface element of each neighbour code, float64 [256].

    Turning or mirroring the cube, or swapping inside and outside, maps a case onto others.
    """
    dz, dy, dx = spacing
    faces = np.array([dy * dx, dz * dx, dz * dy])
    areas = np.zeros(256)
    for corners, vectors in _CUBE_CASES:
        cube = np.zeros((2, 2, 2), dtype=np.uint8)
        for corner in corners:
            cube[tuple(map(int, corner))] = 1
        for axes in itertools.permutations(range(3)):
            turned_vectors = np.array(vectors)[:, axes]
            for flips in itertools.product((1, -1), repeat=3):
                turned = cube.transpose(axes)[tuple(slice(None, None, f) for f in flips)]
                area = np.linalg.norm(turned_vectors * flips / 8 * faces, axis=1).sum()
                code = int(np.packbits(turned)[0])
                areas[[code, 255 - code]] = area
    return areas


def _crop(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both masks cut to the box that holds either."""
    box = []
    for axis in range(a.ndim):
        others = tuple(i for i in range(a.ndim) if i != axis)
        used = np.flatnonzero(a.any(axis=others) | b.any(axis=others))
        box.append(slice(used[0], used[-1] + 1) if used.size else slice(0, 0))
    return a[tuple(box)], b[tuple(box)]


def _volumes(prediction: ArrayLike, truth: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = _two_masks(prediction, truth)
    if a.ndim != 3:
        raise ArgumentError(
            "prediction and truth",
            found=f"shape {a.shape}",
            allowed="3-D masks [Z, Y, X]",
            fix="Give a single slice as [1, Y, X].",
        )
    return a, b


def _two_masks(prediction: ArrayLike, truth: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = _mask(prediction, "prediction"), _mask(truth, "truth")
    if a.shape != b.shape:
        raise ArgumentError(
            "prediction and truth",
            found=f"shapes {a.shape} and {b.shape}",
            allowed="masks of one shape",
        )
    return a, b


def _mask(values: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype == bool:
        return array
    mask = array == 1
    if not np.all(mask | (array == 0)):
        raise ArgumentError(
            name,
            found=f"values other than 0 and 1 (the largest is {array.max()})",
            allowed="booleans, or 0 and 1",
            fix="Compare a label map with one label first: labels == 3.",
        )
    return mask


def _checked_spacing(spacing: Sequence[float]) -> np.ndarray:
    steps = np.asarray(spacing, dtype=np.float64)
    if steps.shape != (3,) or not np.all(np.isfinite(steps) & (steps > 0)):
        raise ArgumentError(
            "spacing", found=repr(spacing), allowed="three numbers above 0: mm along (z, y, x)"
        )
    return steps


def _checked_tolerance(tolerance: float) -> float:
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ArgumentError("nsd_tolerance", found=repr(tolerance), allowed="0 or more mm")
    return tolerance
