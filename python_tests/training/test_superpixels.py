# SPDX-License-Identifier: Apache-2.0
"""Superpixels cover the body, only the body, and are numbered without gaps."""

from __future__ import annotations

import numpy as np
import pytest

from fastproto.training.superpixels import foreground_mask, foreground_threshold, superpixels


def body(size: int = 128) -> np.ndarray:
    """A disc with four organs, a dark cavity and noise, in air with a small bright object."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] * (128 / size)
    image = np.where((x - 64) ** 2 + (y - 64) ** 2 < 50**2, 0.5, 0.0)
    for cy, cx, value in ((45, 45, 0.9), (45, 85, 0.8), (85, 45, 0.3), (85, 85, 0.7)):
        image[(x - cx) ** 2 + (y - cy) ** 2 < 13**2] = value
    image[(x - 64) ** 2 + (y - 64) ** 2 < 5**2] = 0.0
    image[5:10, 5:10] = 1.0
    return image + rng.normal(0, 0.002, image.shape)


def test_foreground_is_the_largest_component_with_its_holes_filled():
    image = body()
    mask = foreground_mask(image, foreground_threshold(image[None]))
    assert mask[64, 64]
    assert not mask[7, 7]
    assert mask.sum() == pytest.approx(np.pi * 50**2, rel=0.02)


@pytest.mark.parametrize("size", [96, 256])
def test_superpixels_partition_the_body(size: int):
    image = body(size)
    threshold = foreground_threshold(image[None])
    segments = superpixels(image, threshold)
    mask = foreground_mask(image, threshold)
    assert not segments[~mask].any()
    assert (segments[mask] > 0).mean() > 0.95
    numbers, sizes = np.unique(segments[segments > 0], return_counts=True)
    assert numbers.tolist() == list(range(1, len(numbers) + 1))
    assert sizes.min() >= round(400 * size**2 / 256**2) / 2
    assert len(numbers) >= 4


def test_an_organ_is_one_superpixel():
    image = body()
    segments = superpixels(image, foreground_threshold(image[None]))
    organ = segments[40:50, 40:50]
    assert (organ == organ[5, 5]).all()
    assert organ[5, 5] != segments[45, 85] != 0


@pytest.mark.parametrize("image", [np.zeros((64, 64)), np.full((64, 64), 7.0)])
def test_a_slice_without_body_has_none(image: np.ndarray):
    assert not superpixels(image, foreground_threshold(image[None])).any()


def test_the_threshold_belongs_to_the_volume():
    """A slice of air stays air although its noise fills its own range."""
    volume = np.stack([body(), np.random.default_rng(1).normal(0, 0.002, (128, 128))])
    assert not superpixels(volume[1], foreground_threshold(volume)).any()
