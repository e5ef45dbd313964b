# SPDX-License-Identifier: Apache-2.0
"""The intensities of a synthetic patient, as of a CT or MR scanner."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import gaussian_filter

from fastproto.data.phantom_anatomy import TISSUE_INDEX, TISSUES


def ct_image(
    rng: np.random.Generator, tissue: np.ndarray, light: np.ndarray, spacing: np.ndarray
) -> np.ndarray:
    """HU of every voxel, int16."""
    means = _draw_means(rng, [(t.ct, t.ct_spread) for t in TISSUES.values()])
    image = _render(rng, tissue, light, spacing, means, texture=14.0)
    image += rng.normal(0, rng.uniform(9, 18), image.shape).astype(np.float32)
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16)


def mr_image(
    rng: np.random.Generator, tissue: np.ndarray, light: np.ndarray, spacing: np.ndarray
) -> np.ndarray:
    """MR signal of every voxel in arbitrary units that differ between patients, int16."""
    means = _draw_means(rng, [(t.mr, t.mr_spread) for t in TISSUES.values()])
    image = _render(rng, tissue, light, spacing, means.clip(0), texture=28.0)
    image *= bias_field(rng, tissue.shape)
    sigma = rng.uniform(12, 24)
    real = image + rng.normal(0, sigma, image.shape).astype(np.float32)
    imaginary = rng.normal(0, sigma, image.shape).astype(np.float32)
    return np.rint(np.hypot(real, imaginary) * rng.uniform(0.5, 4.0)).astype(np.int16)


def _draw_means(rng: np.random.Generator, normals: Sequence[tuple[float, float]]) -> np.ndarray:
    """Mean intensity of every tissue in one patient, float32; both kidneys are alike."""
    means = rng.normal(*np.transpose(normals)).astype(np.float32)
    means[TISSUE_INDEX["left kidney"]] = means[TISSUE_INDEX["right kidney"]]
    return means


def _render(
    rng: np.random.Generator,
    tissue: np.ndarray,
    light: np.ndarray,
    spacing: np.ndarray,
    means: np.ndarray,
    *,
    texture: float,
) -> np.ndarray:
    """Noise-free image: mean of each tissue, its texture, and the blur of a scanner, float32."""
    grain = gaussian_filter(rng.standard_normal(tissue.shape, dtype=np.float32), 4.0 / spacing)
    grain *= np.float32(texture / grain.std())
    amplitude = np.array([t.texture for t in TISSUES.values()], dtype=np.float32)
    image = means[tissue]
    image += amplitude[tissue] * (grain + np.float32(texture) * light)
    return gaussian_filter(image, [0.5, 2.2 / spacing[1], 2.2 / spacing[2]])


def bias_field(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A smooth gain, about 0.6 to 1.6, as of a receiver coil."""
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in shape]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    a = rng.uniform(-0.2, 0.2, 6).astype(np.float32)
    return np.exp(a[0] * x + a[1] * y + a[2] * z + a[3] * x * y + a[4] * x * x + a[5] * y * y)
