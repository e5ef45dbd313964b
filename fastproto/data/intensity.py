# SPDX-License-Identifier: Apache-2.0
"""What the values of a volume tell: its modality, how to normalise them, where the body is.

Whether a scan is a CT is read from facts about Hounsfield units: air is -1000, fat about -100, soft
tissue 0 to 80, bone above 200. Hardly a voxel of a body lies between air and fat, most of it within
150 of soft tissue. In MR the tissues spread over the whole range, so this tells the two apart, and
a CT in other numbers (shifted, scaled) from an MR.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
import scipy.ndimage

from fastproto.data.volume import Volume, blocks
from fastproto.errors import VolumeError, warn

CT_WINDOW = (-125.0, 275.0)
MR_CLIPPED_FRACTION = 0.005

_CT_BODY_HU = -500.0
_CT_AIR_HU = -200.0
_MR_BODY_FRACTION = 0.1
_BODY_MARGIN_MM = 5.0
_BODY_GRID = 128

# What makes a CT, in HU and in shares of voxels; see the top of this file. In brackets: what 89 CT
# and 91 MR scans of head, neck and abdomen show.
_AIR, _SOFT_TISSUE = -1000.0, 40.0
_LEVEL_TOLERANCE = 200.0  # of both: where air and soft tissue of a CT may lie [CT: up to 112]
_CLIPPED = (-300.0, -100.0)  # or where air lies once somebody clipped it, as we do
_FEW = 0.001  # fewer voxels than this are noise, outliers or ringing
_LEAST_AIR = 0.05  # to tell a CT by its air [CT: from 0.31]
_MOST_BETWEEN = 0.08  # of a body's voxels, between air and fat [CT: up to 0.06, MR: from 0.22]
_MOST_BETWEEN_IN_HU = 0.3  # the same where air is -1000: dense lungs may lie there, MR hardly does
_LEAST_TISSUE = 0.6  # of a body's voxels, within 150 of soft tissue [CT: from 0.63, MR: to 0.52]
_LEAST_IN_PLACE = 0.2  # of the voxels above air, fat or soft tissue, where something else is odd
_NO_AIR_NO_FAT = -30.0  # CT has voxels below this everywhere but within one organ
_NOISE = 250.0  # between the 1 % and the 99 % value within one organ, at a deviation of 50
_BOTTOM = 0.1  # share in the lowest twentieth of the range: less in a crop of CT, more where MR
# has its background [crops of CT within the body: up to 0.1 in 99 of 100, MR: from 0.12]

_LABELS = 40  # so few values, all whole and most of them 0, make a label map and no scan

_MODALITIES: dict[str | None, Literal["ct", "mr"]] = {"CT": "ct", "MR": "mr"}
_SAYS_NOTHING = (None, "OT")  # OT: other, as converters write
_ALLOWED = {
    "ct": "a CT in Hounsfield units (air -1000, fat -100, soft tissue about 40), for a model or "
    "task of CT",
    "mr": "an MR scan, for a model or task of MR",
}
_FIX = {
    "ct": "Export a CT with its rescale slope and intercept, or use a model or task of the scan's "
    "modality; with --force (force=True) it is used as it is.",
    "mr": "Use a model or task of the scan's modality; with --force (force=True) it is used as it "
    "is.",
}


def guess_modality(volume: Volume) -> Literal["ct", "mr"]:
    """What DICOM says or else the values look like.

    CT where one voxel in a thousand lies below -200, as air does, and the others where tissue
    does, or where the values are those of a body's inside: fat and soft tissue, no background.
    """
    if volume.modality in _MODALITIES:
        return _MODALITIES[volume.modality]
    sample = _sample(volume)
    air = np.mean(sample < _CT_AIR_HU) > _FEW
    is_ct = (air and _unlike_ct(sample, False) is None) or _is_inside_of_ct(sample)
    return "ct" if is_ct else "mr"


def check_intensities(volume: Volume, modality: str, *, force: bool = False) -> str | None:
    """Refuse a scan whose numbers are not those a model of this modality was trained on.

    Args:
        volume: The scan.
        modality: "ct" or "mr", of the preprocessing it is meant for.
        force: Warn instead.

    Returns:
        What it warned of, or None.

    Raises:
        VolumeError: It is constant, of another DICOM modality, or its values are not those of CT
            in HU, or those of CT where MR is expected.
    """
    found = _mismatch(volume, modality)
    if found is None:
        return None
    if not force:
        raise VolumeError(volume.name, found=found, allowed=_ALLOWED[modality], fix=_FIX[modality])
    told = f"found {found}; used all the same, as forced"
    warn(volume.name, f"{told}.")
    return told


def _mismatch(volume: Volume, modality: str) -> str | None:
    """What makes a volume unfit for a modality, or None."""
    sample = _sample(volume)
    if sample.min() == sample.max() and volume.array.min() == volume.array.max():
        return f"one value everywhere ({sample[0]:g})"
    levels = np.unique(sample)
    whole = np.array_equal(levels, np.rint(levels))
    if whole and levels[0] == 0 and len(levels) <= _LABELS and np.mean(sample == 0) > 0.5:
        return f"a label map ({len(levels)} values, most of them 0)"
    tag = volume.modality
    if tag not in _SAYS_NOTHING and _MODALITIES.get(tag) != modality:
        return f"a scan of DICOM modality {tag}"
    return _unlike_ct(sample, tag == "CT") if modality == "ct" else _unlike_mr(sample)


def _unlike_ct(sample: np.ndarray, tagged: bool) -> str | None:
    """``tagged``: DICOM says that it is a CT."""
    if levels := _ct_levels(sample):
        return _other_numbers(*levels)
    values = f"values from {sample.min():g} to {sample.max():g}"
    if _share(sample[sample > _CT_AIR_HU], _CT_AIR_HU, 250) < _LEAST_IN_PLACE:
        return f"{values}, hardly any of fat or soft tissue"
    if np.mean(sample < _NO_AIR_NO_FAT) >= _FEW:
        return None
    low, middle, high = np.percentile(sample, [1, 50, 99])
    most = _NOISE if tagged else 1.3 * middle  # else it may be an MR of small numbers
    within_an_organ = 10 <= middle <= 200 and high - low <= most
    return None if within_an_organ else f"{values}, none of them of air or fat"


def _unlike_mr(sample: np.ndarray) -> str | None:
    if levels := _ct_levels(sample):
        return _other_numbers(*levels) or "the values of a CT: air at -1000, soft tissue about 40"
    if _is_inside_of_ct(sample):
        return "the values of a CT: fat about -100, soft tissue about 40"
    return None


def _other_numbers(air: float, tissue: float) -> str | None:
    """What is wrong with a CT whose air and soft tissue lie there, or None."""
    in_place = abs(air - _AIR) <= _LEVEL_TOLERANCE or _CLIPPED[0] <= air <= _CLIPPED[1]
    if in_place and abs(tissue - _SOFT_TISSUE) <= _LEVEL_TOLERANCE:
        return None
    return (
        f"a CT whose numbers are not Hounsfield units (air at {air:.4g}, soft tissue at "
        f"{tissue:.4g})"
    )


def _ct_levels(sample: np.ndarray) -> tuple[float, float] | None:
    """The values of air and of soft tissue, where these are distributed as in CT at any scale."""
    lowest, high = np.percentile(sample, [2, 99])
    guesses = [(_AIR, _SOFT_TISSUE, _MOST_BETWEEN_IN_HU)]  # first: padding may lie below air
    if high > lowest:
        upper = sample[sample > (lowest + high) / 2]
        guesses.append((float(lowest), float(np.median(upper)), _MOST_BETWEEN))
    for air, tissue, most_between in guesses:
        scale = (tissue - air) / (_SOFT_TISSUE - _AIR)
        values = (sample - np.float32(air)) / np.float32(scale) + np.float32(_AIR)
        body = values[values > _CT_BODY_HU]
        if (
            np.mean(values < -900) >= _LEAST_AIR
            and _share(body, _CT_BODY_HU, -200) <= most_between
            and _share(body, -150, 150) >= _LEAST_TISSUE
            and _share(body, -170, -50) >= 0.01  # a uniform object is no body
        ):
            return air, tissue
    return None


def _is_inside_of_ct(sample: np.ndarray) -> bool:
    """Whether it shows fat and soft tissue in whole HU, without air or another background."""
    lowest, upper, high = np.percentile(sample, [0.5, 90, 99.5])
    return bool(
        np.mean(sample < _NO_AIR_NO_FAT) >= 0.01
        and high - lowest >= 100
        and _share(sample, -200, 300) >= 0.7
        and np.mean(sample <= lowest + 0.05 * (upper - lowest)) <= _BOTTOM
        and np.array_equal(sample, np.rint(sample))  # unlike an MR normalised to a mean of 0
    )


def _share(values: np.ndarray, low: float, high: float) -> float:
    """Of the values in (low, high]; 0 of none."""
    return float(np.mean((values > low) & (values <= high))) if values.size else 0.0


def _sample(volume: Volume) -> np.ndarray:
    """About 250 000 voxels, evenly spread, flat and as float32."""
    step = max(1, round((volume.array.size / 250_000) ** (1 / 3)))
    return volume.array[::step, ::step, ::step].astype(np.float32).ravel()


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
