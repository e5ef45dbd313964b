# SPDX-License-Identifier: Apache-2.0
"""Superpixels of a slice: the pseudo-organs of training without labels."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from skimage.segmentation import felzenszwalb

from fastproto.training.supervoxels import foreground_threshold

__all__ = ["foreground_mask", "foreground_threshold", "superpixels"]

MIN_SIZE = 400  # pixels of a 256 x 256 slice
SIGMA = 1.0  # pixels
SCALE = 1.0


def foreground_mask(image: np.ndarray, threshold: float) -> np.ndarray:
    """The body in one slice: the largest component above ``threshold``, its holes filled.

    Args:
        image: [H, W].
        threshold: As from ``foreground_threshold``.

    Returns:
        [H, W] bool; all False where nothing is above the threshold.
    """
    components, count = ndimage.label(image > threshold)
    if count == 0:
        return np.zeros(image.shape, dtype=bool)
    sizes = np.bincount(components.ravel())
    return ndimage.binary_fill_holes(components == 1 + sizes[1:].argmax())


def superpixels(image: np.ndarray, threshold: float) -> np.ndarray:
    """Felzenszwalb's segmentation (scale 1, sigma 1) of one slice, without its background.

    ``min_size`` is 400 pixels for 256 x 256 and proportional to the area for other sizes, so a
    superpixel stays the same share of the field of view. Intensities are scaled to [0, 1] over the
    slice first, because the algorithm's ``scale`` depends on them. Pieces that the foreground mask
    cuts below half of ``min_size`` become background.

    Args:
        image: [H, W].
        threshold: As from ``foreground_threshold``.

    Returns:
        [H, W] int16: 0 outside the body, superpixels 1..n without gaps; n = 0 without a body.
    """
    min_size = max(1, round(MIN_SIZE * image.size / 256**2))
    foreground = foreground_mask(image, threshold)
    if foreground.sum() < min_size:
        return np.zeros(image.shape, dtype=np.int16)
    unit = image.astype(np.float64) - float(image.min())
    unit /= unit.max()
    segments = felzenszwalb(unit, scale=SCALE, sigma=SIGMA, min_size=min_size) + 1
    segments[~foreground] = 0
    sizes = np.bincount(segments.ravel())
    kept = sizes >= min_size / 2
    kept[0] = False
    renumber = np.cumsum(kept) * kept
    return renumber[segments].astype(np.int16)
