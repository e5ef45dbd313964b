# SPDX-License-Identifier: Apache-2.0
"""The shape of an organ as signed distances, which stay exact between the points of a coarse grid.

As in `alignment`, points are (slice, row, column) in mm along the canonical axes of a scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt, map_coordinates
from torch import Tensor

MAP_SIDE = 48  # points of a distance map along each axis, at most


@dataclass(frozen=True, eq=False)
class DistanceMap:
    """Signed distance to an organ's surface in mm, negative inside, on a grid around the organ.

    Attributes:
        values: [a, b, c] float32.
        first: Position of the first grid point in mm.
        step: Distance of grid points in mm, per axis.
    """

    values: np.ndarray
    first: np.ndarray
    step: np.ndarray

    @classmethod
    def of_mask(cls, mask: np.ndarray, spacing: np.ndarray) -> DistanceMap:
        """The map of a mask [n, h, w] in canonical orientation that is not empty."""
        low, last = extent(mask)
        size = last + 1 - low
        # Cells of whole voxels, so that thin parts weigh in; two empty ones on every side.
        pool = -(-size // (MAP_SIDE - 4))
        cells = -(-size // pool)
        part = np.zeros(cells * pool, np.float32)
        part[tuple(map(slice, size))] = mask[tuple(map(slice, low, last + 1))]
        share = part.reshape(np.stack([cells, pool], axis=1).ravel()).mean(axis=(1, 3, 5))
        inside = np.pad(share >= min(0.5, share.max()), 2)
        step = pool * spacing
        values = np.where(inside, -_to_surface(inside, step), _to_surface(~inside, step))
        # As precise as a task file keeps them: a loaded task must give the same prior.
        values = values.astype(np.float16).astype(np.float32)
        return cls(values, (low + (pool - 1) / 2) * spacing - 2 * step, step)

    @property
    def millilitres(self) -> float:
        """The organ's volume, about."""
        return float(np.count_nonzero(self.values < 0) * self.step.prod() / 1000)

    @property
    def last(self) -> np.ndarray:
        """Position of the last grid point in mm."""
        return self.first + self.step * (np.array(self.values.shape) - 1)

    def at(self, points: np.ndarray) -> np.ndarray:
        """Distances at [..., 3]. Beyond the grid: that at its border and of the way to there."""
        near = points.clip(self.first, self.last)
        values = sample(self.values, near, self.first, self.step)
        return values + np.linalg.norm(points - near, axis=-1).astype(np.float32)

    def on(self, axes: Sequence[np.ndarray]) -> Tensor:
        """Distances on the grid that three rows of positions in mm span, ``[n, h, w]`` float32."""
        result, beyond = torch.from_numpy(self.values), []
        for axis, positions in enumerate(axes):
            near = positions.clip(self.first[axis], self.last[axis])
            beyond.append(torch.from_numpy(np.float32((positions - near) ** 2)))
            index = (near - self.first[axis]) / self.step[axis]
            weights = 1 - np.abs(index[:, None] - np.arange(self.values.shape[axis]))
            weights = torch.from_numpy(weights.clip(0).astype(np.float32))
            result = torch.tensordot(result, weights, dims=([0], [1]))  # the next axis comes first
        return result + (beyond[0][:, None, None] + beyond[1][:, None] + beyond[2]).sqrt_()


def sample(
    values: np.ndarray, points: np.ndarray, first: np.ndarray | float, step: np.ndarray | float
) -> np.ndarray:
    """float32 between the voxels of a grid [n, h, w], at [..., 3] mm; beyond it the border's."""
    index = np.moveaxis((points - first) / step, -1, 0)
    return map_coordinates(values, index, np.float32, order=1, mode="nearest")


def extent(mask: np.ndarray) -> np.ndarray:
    """[2, axes], the first and the last place along every axis of a mask that is not empty."""
    axes = range(mask.ndim)
    hits = [np.flatnonzero(mask.any(axis=tuple({*axes} - {axis}))) for axis in axes]
    return np.array([[hit[0], hit[-1]] for hit in hits]).T


def _to_surface(inside: np.ndarray, step: np.ndarray) -> np.ndarray:
    """From every cell inside to the surface, which lies midway to the first cell outside."""
    nearest = distance_transform_edt(
        inside, sampling=step, return_distances=False, return_indices=True
    )
    way = np.abs(nearest - np.indices(inside.shape))
    length = np.linalg.norm(np.moveaxis(way, 0, -1) * step, axis=-1)
    return length * (1 - 0.5 / way.max(axis=0).clip(1))
