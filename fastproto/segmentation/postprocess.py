# SPDX-License-Identifier: Apache-2.0
"""What is done to the voxels after the decision; each step is worth its line in a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy import ndimage, special

PIECE = 0.2  # share of the largest piece below which another one is dropped


def clean(mask: np.ndarray) -> np.ndarray:
    """Keep the largest piece of ``[n, h, w]`` bool and those at least a fifth as large.

    Their holes are filled, slice by slice.
    """
    pieces, sizes = find_pieces(mask)
    if not sizes.any():
        return mask
    kept = sizes >= PIECE * sizes.max()
    result = np.empty(mask.shape, bool)
    for section, target in zip(pieces, result, strict=True):
        target[...] = kept[section]
        if target.any():
            target[...] = ndimage.binary_fill_holes(target)
    return result


def find_pieces(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the pieces of ``[n, h, w]`` bool from 1; their voxels by number, 0 of number 0."""
    pieces, count = ndimage.label(mask)
    # Slice by slice: NumPy copies what it counts, or looks up, in 8 bytes.
    sizes = np.zeros(count + 1, np.int64)
    for section in pieces:
        sizes += np.bincount(section.ravel(), minlength=count + 1)
    sizes[0] = 0
    return pieces, sizes


def uncertainty(probabilities: Iterable[np.ndarray]) -> np.ndarray:
    """How undecided every voxel is between the organs and the background.

    Args:
        probabilities: Of every organ against the background alone, all of one shape.

    Returns:
        Entropy in bits, float32: 0 where one of them is certain, 1 where an organ is as likely as
        the background, at most log2 of the number of organs and 1.
    """
    total: Any = np.float32(1)  # the odds of the background are 1
    weighted: Any = np.float32(0)
    for probability in probabilities:
        odds = probability / (1 - probability).clip(min=1e-6)
        total = total + odds
        weighted = weighted + special.xlogy(odds, odds)
    return np.maximum((np.log(total) - weighted / total) / np.float32(np.log(2)), 0)
