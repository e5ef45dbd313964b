# SPDX-License-Identifier: Apache-2.0
"""The fused augmentation: exact where it must be, within its ranges, and a function of its seed."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from scipy import ndimage

from fastproto.errors import ArgumentError
from fastproto.training.augment import Augmentation, AugmentParams, augment_batch

ELASTIC_ONLY = Augmentation(
    rotation=0, shear=0, shift=0, zoom=(1, 1), gamma=(1, 1), elastic_alpha=200
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def discs(batch: int = 2, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that are their own label maps, as [B, 1, H, W] and [B, H, W]."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    labels = torch.stack(
        [((x - 20 - 3 * b) ** 2 + (y - 40) ** 2 < 144).to(torch.uint8) for b in range(batch)]
    )
    return labels[:, None].half(), labels


def test_identity_returns_the_input():
    images = torch.randn(3, 2, 33, 48)
    labels = torch.randint(0, 5, (3, 33, 48), dtype=torch.uint8)
    moved, moved_labels = augment_batch(images, labels, AugmentParams.identity(3))
    torch.testing.assert_close(moved, images, atol=1e-4, rtol=1e-4)
    assert torch.equal(moved_labels, labels.long())
    assert moved.dtype == torch.float32


def test_image_and_label_stay_aligned():
    images, labels = discs(8)
    params = dataclasses.replace(Augmentation(elastic_alpha=60).draw(generator(), 8, 64, 64))
    moved, moved_labels = augment_batch(images, labels, params)
    thresholded = moved[:, 0] ** (1 / params.gamma.view(-1, 1, 1)) > 0.5
    disagreeing = (thresholded != (moved_labels == 1)).sum().item()
    # bilinear and nearest can only disagree on the border of a disc, 8 x about 75 pixels long
    assert disagreeing < 0.3 * 8 * 75
    assert (moved_labels != labels).sum() > 100


@pytest.mark.parametrize("size", [33, 64])
def test_batch_equals_one_by_one(size: int):
    images = torch.randn(4, 1, size, size)
    labels = torch.randint(0, 4, (4, size, size))
    single = [Augmentation().draw(generator(seed), 1, size, size) for seed in range(4)]
    together = augment_batch(images, labels, AugmentParams.cat(single))
    for i, params in enumerate(single):
        alone = augment_batch(images[i : i + 1], labels[i : i + 1], params)
        assert torch.equal(alone[0][0], together[0][i])
        assert torch.equal(alone[1][0], together[1][i])


def test_same_generator_state_gives_the_same_bits():
    images, labels = discs()
    first, second, third = (
        augment_batch(images, labels, Augmentation().draw(generator(seed), 2, 64, 64))[0]
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_parameters_fill_their_ranges_and_no_more():
    params = Augmentation().draw(generator(), 2000, 8, 8)
    assert params.shift.abs().max() <= 5
    assert params.shift.abs().max() > 4.9
    assert 0.5 <= params.gamma.min() < 0.51
    assert 1.49 < params.gamma.max() <= 1.5
    assert params.noise is not None
    assert params.noise.abs().max() <= 1
    zoom = torch.linalg.det(params.matrix) ** -0.5
    assert 0.9 - 1e-4 <= zoom.min() < 0.905
    assert 1.19 < zoom.max() <= 1.2 + 1e-4
    # R^-1 and the shear from the QR decomposition of the inverse matrix, zoom removed
    q, r = torch.linalg.qr(torch.linalg.inv(params.matrix) / zoom.view(-1, 1, 1))
    angle = torch.rad2deg(torch.atan(q[:, 1, 0] / q[:, 0, 0])).abs()
    shear = torch.rad2deg(torch.atan(r[:, 0, 1] / r[:, 0, 0])).abs()
    for drawn in (angle, shear):
        assert 4.9 < drawn.max() <= 5 + 1e-3


def test_shift_moves_by_whole_pixels():
    images, labels = discs(1)
    identity = AugmentParams.identity(1)
    params = dataclasses.replace(identity, shift=torch.tensor([[3.0, -2.0]]))
    _, moved = augment_batch(images, labels, params)
    expected = torch.roll(labels.long(), (2, -3), dims=(1, 2))
    assert torch.equal(moved, expected)


def test_zoom_magnifies_the_middle():
    labels = torch.zeros(1, 64, 64, dtype=torch.uint8)
    labels[:, 22:42, 22:42] = 1
    augmentation = Augmentation(0, 0, 0, zoom=(1.2, 1.2), elastic_alpha=0, gamma=(1, 1))
    params = augmentation.draw(generator(), 1, 64, 64)
    _, moved = augment_batch(labels[:, None].float(), labels, params)
    assert moved.sum() == 24 * 24
    assert moved[0, 20:44, 20:44].all()


def test_gamma_is_a_power_of_the_range_normalised_intensity():
    images = torch.tensor([-3.0, -1.0, 1.0, 5.0]).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    params = dataclasses.replace(AugmentParams.identity(1), gamma=torch.tensor([0.5]))
    toned, _ = augment_batch(images, torch.zeros(1, 4, 4), params)
    expected = -3 + 8 * torch.tensor([0, 2 / 8, 4 / 8, 1]).sqrt()
    torch.testing.assert_close(toned[0, 0, 0], expected, atol=1e-4, rtol=1e-4)


def test_outside_is_the_darkest_value_and_background():
    images = torch.full((1, 1, 16, 16), 4.0)
    images[..., 8:] = 7.0
    identity = AugmentParams.identity(1)
    params = dataclasses.replace(identity, shift=torch.tensor([[8.0, 0.0]]))
    moved, labels = augment_batch(images, torch.ones(1, 16, 16), params)
    assert moved[0, 0, :, :8].eq(7).all()
    assert moved[0, 0, :, 8:].eq(4).all()
    assert labels[0, :, 8:].eq(0).all()


def test_constant_image_stays_constant():
    images = torch.full((2, 1, 20, 20), -1.5)
    moved, _ = augment_batch(
        images, torch.zeros(2, 20, 20), Augmentation().draw(generator(), 2, 20, 20)
    )
    assert moved.eq(-1.5).all()


def test_elastic_field_is_gaussian_smoothed_noise():
    """A ramp image shows its sampling positions, which must be those of scipy's filter."""
    size = 64
    params = ELASTIC_ONLY.draw(generator(), 1, size, size)
    ramp = torch.arange(size, dtype=torch.float32).expand(1, 1, size, size)
    moved, _ = augment_batch(ramp, torch.zeros(1, size, size), params)
    assert params.noise is not None
    smooth = ndimage.gaussian_filter(params.noise[0, 0].numpy(), 5, mode="mirror", truncate=2)
    expected = ramp[0, 0] + 200 * torch.from_numpy(smooth)
    inside = slice(16, -16)
    torch.testing.assert_close(
        moved[0, 0, inside, inside], expected[inside, inside], atol=1e-2, rtol=1e-3
    )


@pytest.mark.parametrize(
    "wrong",
    [{"rotation": -1}, {"zoom": (1.2, 0.9)}, {"zoom": (0, 1)}, {"elastic_sigma": 0},
     {"shift": math.inf}, {"gamma": (0.5, math.nan)}],
)  # fmt: skip
def test_ranges_are_checked(wrong: dict):
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        Augmentation(**wrong)
