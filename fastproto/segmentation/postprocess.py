# SPDX-License-Identifier: Apache-2.0
"""What is done to an organ's voxels after the decision; each step is worth its line in a table."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

PIECE = 0.2  # share of the largest piece below which another one is dropped


def clean(mask: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Drop small pieces, fill holes.

    Args:
        mask: ``[n, h, w]`` bool, one organ.
        distance: Signed distance to its expected place in mm, negative inside.

    Returns:
        A new mask: the piece with the most voxels near the expected place, pieces at least a fifth
        as large, and the holes of each slice.
    """
    pieces, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(pieces.ravel())[1:]
    kept = np.flatnonzero(sizes >= PIECE * sizes.max()) + 1
    result = np.isin(pieces, kept)
    for index, section in enumerate(result):
        if section.any():
            result[index] = ndimage.binary_fill_holes(section)
    return result
