# SPDX-License-Identifier: Apache-2.0
"""Where an organ really lies, if the registration was astray and the network sees it nearby."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.fft import irfftn, rfftn
from torch.nn import functional as F

_CELL_MM = 5.0  # side of the cells that are compared, for a small organ a third of its depth
_COST = 0.04  # Dice that a way as long as the organ is deep must gain
_LEAST_GAIN = 0.05  # beyond that: a network that errs a little must not move a good place


def correction(scores: Tensor, distance: Tensor, spacing: Sequence[float]) -> np.ndarray:
    """The way from an organ's expected place to where it agrees best with the network.

    What counts is the Dice of the expected mask and the network's probabilities, less a cost that
    grows with the way.

    Args:
        scores: The network's log odds, ``[n, h, w]``.
        distance: To the surface of the expected place in mm, negative inside, of the same shape.
        spacing: Of slices, rows and columns in mm.

    Returns:
        [3] mm along slices, rows and columns; zeros where it is best where it is.
    """
    depth = -float(distance.min())
    if depth <= 0:
        return np.zeros(3)
    cell = min(depth / 3, _CELL_MM)
    kernel = [
        min(size, max(1, round(cell / side)))
        for size, side in zip(scores.shape, spacing, strict=True)
    ]
    found, expected = (
        F.avg_pool3d(x[None, None], kernel, ceil_mode=True)[0, 0].double()
        for x in (scores.sigmoid(), (distance < 0).float())
    )
    shape = [2 * size - 1 for size in found.shape]
    # scipy.signal.fftconvolve in one line: scipy.signal takes a second to import.
    overlap = irfftn(rfftn(found, shape) * rfftn(expected.flip(0, 1, 2), shape), shape).numpy()
    cells = np.moveaxis(np.indices(overlap.shape), 0, -1) + 1 - np.array(found.shape)
    ways = cells * kernel * spacing
    length = np.linalg.norm(ways, axis=-1)
    gain = 2 * overlap / max(float(found.sum() + expected.sum()), 1e-6) - _COST * length / depth
    best = np.unravel_index(np.argmax(gain), gain.shape)
    if gain[best] < gain[length == 0][0] + _LEAST_GAIN:
        return np.zeros(3)
    return ways[best]
