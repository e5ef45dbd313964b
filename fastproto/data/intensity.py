# SPDX-License-Identifier: Apache-2.0
"""What the values of a volume tell: its modality, how to normalise them, where the body is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
import scipy.ndimage

from fastproto.data.volume import Volume, blocks

CT_WINDOW = (-125.0, 275.0)
MR_CLIPPED_FRACTION = 0.005

_CT_BODY_HU = -500.0
_CT_AIR_HU = -200.0
_MR_BODY_FRACTION = 0.1
_BODY_MARGIN_MM = 5.0
_BODY_GRID = 128


def guess_modality(volume: Volume) -> Literal["ct", "mr"]:
    """What the values look like: CT where one in a thousand voxels lies below -200, as air does."""
    step = max(1, round((volume.array.size / 1e6) ** (1 / 3)))
    sample = volume.array[::step, ::step, ::step].astype(np.float32)
    return "ct" if float(np.percentile(sample, 0.1)) < _CT_AIR_HU else "mr"


def normalisation(
    array: np.ndarray, mean: float | None, std: float | None
) -> tuple[float, float, float, float]:
    """(low, high, mean, scale): clip to [low, high], subtract the mean, multiply by the scale.

    With ``mean`` and ``std`` as for CT, without them as for MR; see ``Preprocessing``.
    """
    if mean is not None and std is not None:
        return (*CT_WINDOW, mean, 1 / std)
    low = float(array.min())
    high = upper_value(array, 1 - MR_CLIPPED_FRACTION)
    # Relative to the lowest value: a constant volume gives a deviation of exactly 0.
    _, mean, variance = clipped_moments(blocks(array), low, high, low)
    return low, high, low + mean, 1 / math.sqrt(variance) if variance > 0 else 0.0


def clipped_moments(
    parts: Iterable[np.ndarray], low: float, high: float, origin: float = 0.0
) -> tuple[int, float, float]:
    """Number, mean and variance of all values, clipped to [low, high], less ``origin``."""
    count, total, squares = 0, 0.0, 0.0
    for part in parts:
        values = np.clip(part, low, high, dtype=np.float64)
        values -= origin
        count += values.size
        total += values.sum()
        squares += np.square(values).sum()
    mean = total / max(count, 1)
    return count, float(mean), max(float(squares / max(count, 1) - mean**2), 0.0)


def upper_value(array: np.ndarray, fraction: float) -> float:
    """The smallest value that ``fraction``, in (0, 1], of the voxels do not exceed, as float32.

    ``numpy.quantile(array, fraction, method="inverted_cdf")`` without the sorted copy: float32
    numbers, read as integers, keep their order, so two counts over 16 bits each find the value.
    """
    rank = max(math.ceil(fraction * array.size), 1)
    found = 0
    for shift in (16, 0):
        counts = np.zeros(1 << 16, np.int64)
        for block in blocks(array):
            keys = _ordered(block)
            if shift == 0:
                keys = keys[keys >> 16 == found]
            counts += np.bincount((keys >> shift) & 0xFFFF, minlength=1 << 16)
        cumulative = np.cumsum(counts)
        digit = int(np.searchsorted(cumulative, rank))
        rank -= int(cumulative[digit - 1]) if digit else 0
        found = found << 16 | digit
    bits = found ^ 0x80000000 if found >> 31 else found ^ 0xFFFFFFFF
    return float(np.uint32(bits).view(np.float32))


def _ordered(block: np.ndarray) -> np.ndarray:
    """Flat uint32 keys in the order of the values as float32."""
    bits = np.ascontiguousarray(block, dtype=np.float32).ravel().view(np.uint32)
    return bits ^ np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))


def body_box(
    array: np.ndarray, spacing: tuple[float, ...], modality: str
) -> tuple[int, int, int, int]:
    """Rows and columns [top, bottom, left, right) of the body in any slice, with a margin of 5 mm.

    It is found on a grid of at most 128 voxels a side, see ``body_mask``. A volume without
    foreground keeps its whole slices.
    """
    steps = tuple(-(-length // _BODY_GRID) for length in array.shape)
    body = body_mask(array[tuple(slice(None, None, step) for step in steps)], modality)
    box = []
    for axis in (1, 2):
        if not body.any():
            box += [0, array.shape[axis]]
            continue
        hit = np.flatnonzero(body.any(axis=tuple({0, 1, 2} - {axis})))
        margin = round(_BODY_MARGIN_MM / spacing[axis])
        # Between two coarse voxels the body may begin or end anywhere.
        first = (hit[0] - 1) * steps[axis] + 1 - margin
        last = (hit[-1] + 1) * steps[axis] + margin
        box += [max(int(first), 0), min(int(last), array.shape[axis])]
    return box[0], box[1], box[2], box[3]


def body_mask(array: np.ndarray, modality: str) -> np.ndarray:
    """Which voxels are body, as bool of the same shape; for a coarse view of a volume.

    CT: above -500 HU. MR: above a tenth of the way from the 0.5 % to the 99.5 % value. Pieces
    smaller than a quarter of the largest (the table, noise) do not count.
    """
    coarse = array.astype(np.float32)
    if modality == "ct":
        threshold = _CT_BODY_HU
    else:
        low, high = np.percentile(coarse, [0.5, 99.5])
        threshold = low + _MR_BODY_FRACTION * (high - low)
    pieces, count = scipy.ndimage.label(coarse > threshold)
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)
    sizes[0] = 0
    return (sizes >= max(0.25 * sizes.max(), 1))[pieces]
