# SPDX-License-Identifier: Apache-2.0
"""What lies between two masks: overlap, distances between borders, share of surface nearby.

Distances are exact and come from a k-d tree over the surface points: on organs this is several
times faster than a distance transform of their box, and the memory grows with the surface only.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import binary_erosion, correlate, find_objects
from scipy.spatial import KDTree

from fastproto.errors import require
from fastproto.evaluation.metrics import NSD_TOLERANCE_MM


class MaskPair:
    """Two masks, and what they have in common.

    Args:
        prediction: Mask of booleans or of 0 and 1; 3-D ``[Z, Y, X]`` for all but the overlap.
        truth: Mask of the same shape.
        spacing: Size of a voxel in mm along the axes of the array, (z, y, x): the reverse of
            ``Volume.spacing``. Needed for all but the overlap.
        nsd_tolerance: Distance in mm up to which a surface counts as right.

    Raises:
        ArgumentError: The shapes differ, a mask holds values other than 0 and 1, or, when it is
            needed, the shape, spacing or tolerance is out of range.
    """

    def __init__(
        self,
        prediction: ArrayLike,
        truth: ArrayLike,
        spacing: Sequence[float] | None = None,
        nsd_tolerance: float = NSD_TOLERANCE_MM,
    ):
        self.masks = _mask(prediction, "prediction"), _mask(truth, "truth")
        self.spacing = spacing
        self.nsd_tolerance = nsd_tolerance
        a, b = self.masks
        found = f"shapes {a.shape} and {b.shape}"
        require(
            a.shape == b.shape, "prediction and truth", found=found, allowed="masks of one shape"
        )

    def overlap(self) -> float:
        """``2 |A & B| / (|A| + |B|)`` over voxels; NaN where both are empty."""
        a, b = self.masks
        total = np.count_nonzero(a) + np.count_nonzero(b)
        return 2 * np.count_nonzero(a & b) / total if total else math.nan

    def far(self, percentile: float) -> float:
        """Percentile (linear interpolation) of the border's distance: the larger direction's."""
        return float(max(np.percentile(one_way, percentile) for one_way in self._distances))

    def mean_distance(self) -> float:
        """Mean distance of the borders, both directions pooled."""
        return float(np.concatenate(self._distances).mean(dtype=np.float64))

    def share_nearby(self) -> float:
        """Share of both surfaces within the tolerance of the other, elements weighted by area."""
        (a, b), spacing = self._cropped
        tolerance = self.nsd_tolerance
        valid = math.isfinite(tolerance) and tolerance >= 0
        require(valid, "nsd_tolerance", found=repr(tolerance), allowed="0 or more mm")
        if not (a.any() and b.any()):
            return 0.0 if a.any() or b.any() else math.nan
        areas = _surface_areas(tuple(spacing.tolist()))
        points_a, area_a = _surface_elements(a, areas, spacing)
        points_b, area_b = _surface_elements(b, areas, spacing)
        reach = 1.001 * tolerance + 1e-6
        near = area_a[_nearest(points_a, points_b, reach) <= tolerance].sum()
        near += area_b[_nearest(points_b, points_a, reach) <= tolerance].sum()
        return float(near / (area_a.sum() + area_b.sum()))

    @functools.cached_property
    def _cropped(self) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        """Both masks cut to the box that holds either, and the spacing."""
        a, b = self.masks
        require(
            a.ndim == 3,
            "prediction and truth",
            found=f"shape {a.shape}",
            allowed="3-D masks [Z, Y, X]",
            fix="Give a single slice as [1, Y, X].",
        )
        steps = np.asarray(self.spacing, dtype=np.float64)
        require(
            steps.shape == (3,) and np.all(np.isfinite(steps) & (steps > 0)),
            "spacing",
            found=repr(self.spacing),
            allowed="three numbers above 0: mm along (z, y, x)",
        )
        box = find_objects((a | b).view(np.uint8), 1)[0] or (slice(0, 0),) * 3
        return (a[box], b[box]), steps

    @functools.cached_property
    def _distances(self) -> tuple[np.ndarray, np.ndarray]:
        """From the border voxels of either mask to the nearest of the other; NaN if one is empty.

        A border voxel is one with a face on the outside or at the edge of the volume.
        """
        masks, spacing = self._cropped
        if not all(mask.any() for mask in masks):
            return (np.array([np.nan]),) * 2
        a, b = (np.argwhere(mask & ~binary_erosion(mask)) * spacing for mask in masks)
        return _nearest(a, b), _nearest(b, a)


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
    codes = correlate(np.pad(mask, (0, 1)).view(np.uint8), _CORNERS, mode="constant")
    where = np.argwhere((codes != 0) & (codes != 255))
    return where * spacing, areas[codes[tuple(where.T)]]


# The bit of each of the eight voxels around a corner, along (z, y, x), in the code of the corner.
_CORNERS = (128 >> np.arange(8)).reshape(2, 2, 2)

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
        cube = np.zeros((2, 2, 2), dtype=bool)
        for corner in corners:
            cube[tuple(map(int, corner))] = True
        for axes in itertools.permutations(range(3)):
            turned_vectors = np.array(vectors)[:, axes]
            for flips in itertools.product((1, -1), repeat=3):
                turned = cube.transpose(axes)[tuple(slice(None, None, f) for f in flips)]
                area = np.linalg.norm(turned_vectors * flips / 8 * faces, axis=1).sum()
                code = _CORNERS[turned].sum()
                areas[[code, 255 - code]] = area
    return areas


def _mask(values: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype == bool:
        return array
    mask = array == 1
    require(
        np.all(mask | (array == 0)),
        name,
        found=lambda: f"values other than 0 and 1 (the largest is {array.max()})",
        allowed="booleans, or 0 and 1",
        fix="Compare a label map with one label first: labels == 3.",
    )
    return mask
