# SPDX-License-Identifier: Apache-2.0
"""Where the slices of a volume lie, and where the network's images lie in them."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch

from fastproto.data.volume import Volume
from fastproto.defaults import PLANE

# Where slices, rows and columns grow: (world axis, sign) with world axes 0 = left, 1 = posterior,
# 2 = superior. Coronal and sagittal pictures have the head on top.
PLANES = {
    "axial": ((2, 1), (1, 1), (0, 1)),
    "coronal": ((1, 1), (2, -1), (0, 1)),
    "sagittal": ((0, 1), (2, -1), (1, 1)),
}
# What lies at the left and at the right of these pictures: the patient's right, front, ...
SIDES = {"axial": ("R", "L"), "coronal": ("R", "L"), "sagittal": ("A", "P")}


class FieldOfView(NamedTuple):
    """A square in the slices of a volume: its centre in canonical pixels, its side in mm."""

    row: float
    column: float
    side: float


class ImageAxis:
    """Rows or columns: where a slice's pixels lie in the square image, and the other way round.

    Args:
        length: Pixels of the slice.
        spacing: Their distance in mm.
        centre: The pixel that the field of view is centred on.
        pixel_size: Of the image, in mm.
        image_size: Pixels of the image.
    """

    def __init__(
        self, length: int, spacing: float, centre: float, pixel_size: float, image_size: int
    ):
        middle = (image_size - 1) / 2
        ratio = pixel_size / spacing
        # Of the image's pixels, in pixels of the slice.
        self.positions = positions = centre + (np.arange(image_size) - middle) * ratio
        self.to_image = linear_weights(positions, length, ratio)
        self.to_slice = linear_weights(
            middle + (np.arange(length) - centre) / ratio, image_size, 1 / ratio
        )
        index = np.floor(positions + 0.5).astype(np.int64)
        # Index for every image pixel, and whether it lies within the slice.
        self.nearest = index.clip(0, length - 1), (index >= 0) & (index < length)


def linear_weights(positions: np.ndarray, length: int, step: float) -> torch.Tensor:
    """Linear interpolation at ``positions`` as a matrix [len(positions), length].

    Where neighbouring positions are more than one pixel apart, the triangle widens with them, so
    nothing between them is skipped. Positions outside the pixels give a row of zeros.
    """
    distance = np.abs(positions[:, None] - np.arange(length))
    weights = np.clip(1 - distance / max(step, 1.0), 0, None)
    outside = (positions < -0.5) | (positions > length - 0.5)
    weights[outside] = 0
    weights[~outside] /= weights[~outside].sum(axis=1, keepdims=True)
    return torch.from_numpy(weights.astype(np.float32))


def canonical(volume: Volume, plane: str = PLANE) -> Volume:
    """The same voxels in canonical order, as a view of the array.

    Oblique volumes take the nearest axes; nothing is resampled. Slices, rows and columns grow as
    ``PLANES`` says: in the axial plane towards superior, posterior and left (LPS).
    """
    order, flips = view_of_axes(volume.direction, plane)
    seen = volume.array.transpose(order)[flips]
    stored = [2 - axis for axis in reversed(order)]
    spacing = tuple(volume.spacing[axis] for axis in stored)
    columns = np.array(volume.direction).reshape(3, 3)[:, stored]
    origin = np.array(volume.origin)
    for column, flip in enumerate(reversed(flips)):
        if flip.step == -1:
            last = seen.shape[2 - column] - 1
            origin = origin + columns[:, column] * spacing[column] * last
            columns[:, column] *= -1
    direction = tuple(columns.ravel().tolist())
    return Volume(seen, spacing, tuple(origin.tolist()), direction, volume.path)


def view_of_axes(
    direction: tuple[float, ...], plane: str
) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """How [Z, Y, X] becomes [slice, row, column]: the transposition, then the flips."""
    axes = np.array(direction).reshape(3, 3)
    nearest = max(
        itertools.permutations(range(3)),
        key=lambda stored: sum(abs(axes[world, stored[world]]) for world in range(3)),
    )
    order, flips = [], []
    for world, sign in PLANES[plane]:
        order.append(2 - nearest[world])
        along = axes[world, nearest[world]] * sign > 0
        flips.append(slice(None, None, 1 if along else -1))
    return tuple(order), tuple(flips)
