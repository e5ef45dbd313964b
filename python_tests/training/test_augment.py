# SPDX-License-Identifier: Apache-2.0
"""Cutting and augmenting: exact where it must be, within its ranges, a function of its seed."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from fastproto.errors import ArgumentError
from fastproto.training.augment import Augmentation, AugmentParams, Cut, cut_batch

STILL = Augmentation(
    rotation=0, shear=0, shift=0, zoom=(1, 1), elastic_alpha=0,
    gamma=(1, 1), gain=(1, 1), offset=0, grain=0,
)  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole(image: torch.Tensor, label: torch.Tensor, pixel: float = 1.0) -> Cut:
    """All of a square slice."""
    side = len(image) * pixel
    return Cut(image, label, (side, side), (side / 2, side / 2), side)


def cuts(images: torch.Tensor, labels: torch.Tensor) -> list[Cut]:
    """All of every slice of [B, H, H]."""
    return [whole(image, label) for image, label in zip(images, labels, strict=True)]


def discs(batch: int = 2, size: int = 64) -> list[Cut]:
    """Slices that are their own label maps."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    labels = torch.stack(
        [((x - 20 - 3 * b) ** 2 + (y - 40) ** 2 < 144).to(torch.uint8) for b in range(batch)]
    )
    return cuts(labels.half(), labels)


def test_a_cut_of_the_whole_slice_is_the_slice():
    images = torch.randn(3, 48, 48)
    labels = torch.randint(0, 5, (3, 48, 48), dtype=torch.uint8)
    moved, moved_labels = cut_batch(cuts(images, labels), 48, AugmentParams.identity(3))
    torch.testing.assert_close(moved[:, 0], images, atol=1e-4, rtol=1e-4)
    assert torch.equal(moved_labels, labels.long())
    assert moved.dtype == torch.float32


@pytest.mark.parametrize(("rows", "columns"), [(1.0, 2.5), (3.0, 1.0)])
def test_a_cut_lies_where_it_says_in_mm(rows: float, columns: float):
    """On a slice that shows its own positions, under a known affine map."""
    height, width, size, side, centre = 60, 80, 32, 24.0, (31.0, 47.0)
    down = ((torch.arange(height) + 0.5) * rows)[:, None].expand(height, width)
    right = ((torch.arange(width) + 0.5) * columns).expand(height, width)
    extent = (height * rows, width * columns)
    matrix = torch.tensor([[0.9, -0.3], [0.4, 1.1]])  # of (x, y)
    params = dataclasses.replace(
        AugmentParams.identity(2),
        matrix=matrix.repeat(2, 1, 1),
        shift=torch.tensor([[2.03, -1.57]] * 2),
    )
    label = (down + right).int()
    parts = [Cut(image, label, extent, centre, side) for image in (down, right)]
    images, labels = cut_batch(parts, size, params)
    for i in (0, 9, 31):
        for j in (0, 20, 31):
            x, y = j - 15.5, i - 15.5
            at_x = centre[1] + (0.9 * x - 0.3 * y + 2.03) * side / size
            at_y = centre[0] + (0.4 * x + 1.1 * y - 1.57) * side / size
            assert images[0, 0, i, j].item() == pytest.approx(at_y, abs=1e-3)
            assert images[1, 0, i, j].item() == pytest.approx(at_x, abs=1e-3)
            assert labels[0, i, j] == label[int(at_y / rows), int(at_x / columns)]


def test_zooming_out_averages_and_skips_nothing():
    noise = torch.rand(128, 128, generator=generator())
    image, _ = cut_batch([whole(noise, torch.zeros(128, 128))], 16, AugmentParams.identity(1))
    expected = F.avg_pool2d(noise[None, None], 8)
    torch.testing.assert_close(image, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(128, 16), (16, 128)])
def test_pixels_that_are_no_squares_are_averaged_along_the_fine_axis_alone(shape: tuple[int, int]):
    noise = torch.rand(shape, generator=generator())
    cut = Cut(noise, torch.zeros(shape), (128.0, 128.0), (64.0, 64.0), 128.0)
    image, _ = cut_batch([cut], 16, AugmentParams.identity(1))
    expected = F.adaptive_avg_pool2d(noise[None, None], 16)
    torch.testing.assert_close(image, expected, atol=1e-5, rtol=1e-5)


def test_zooming_out_of_an_odd_slice_moves_nothing():
    """Every halving drops the last row of 101 = 2 * 50 + 1 and of 25 = 2 * 12 + 1."""
    ramp = (torch.arange(101) + 0.5).expand(101, 101)
    cut = Cut(ramp, torch.zeros(101, 101), (101.0, 101.0), (48.0, 44.0), 80.0)
    image, _ = cut_batch([cut], 10, AugmentParams.identity(1))
    expected = 44 - 40 + 8 * (torch.arange(10) + 0.5)
    torch.testing.assert_close(image[0, 0, 5], expected, atol=1e-2, rtol=1e-4)


def test_slices_of_several_sizes_in_one_batch():
    parts = [whole(torch.full((n, n), float(n)), torch.full((n, n), n)) for n in (20, 33, 64)]
    images, labels = cut_batch(parts, 16, AugmentParams.identity(3))
    for image, label, n in zip(images, labels, (20, 33, 64), strict=True):
        assert image.eq(n).all()
        assert label.eq(n).all()


def test_image_and_label_stay_aligned():
    augmentation = dataclasses.replace(
        Augmentation(elastic_alpha=60), gain=(1, 1), offset=0, grain=0
    )
    params = augmentation.draw(generator(), 8, 64, 64)
    parts = discs(8)
    moved, moved_labels = cut_batch(parts, 64, params)
    thresholded = moved[:, 0] ** (1 / params.gamma.view(-1, 1, 1)) > 0.5
    disagreeing = (thresholded != (moved_labels == 1)).sum().item()
    # bilinear and nearest can only disagree on the border of a disc, 8 x about 75 pixels long
    assert disagreeing < 0.3 * 8 * 75
    assert (moved_labels != torch.stack([cut.label for cut in parts])).sum() > 100


@pytest.mark.parametrize("size", [33, 64])
def test_batch_equals_one_by_one(size: int):
    parts = cuts(torch.randn(4, size, size), torch.randint(0, 4, (4, size, size)))
    single = [Augmentation().draw(generator(seed), 1, size, size) for seed in range(4)]
    together = cut_batch(parts, size, AugmentParams.cat(single))
    for i, params in enumerate(single):
        alone = cut_batch(parts[i : i + 1], size, params)
        assert torch.equal(alone[0][0], together[0][i])
        assert torch.equal(alone[1][0], together[1][i])


def test_same_generator_state_gives_the_same_bits():
    first, second, third = (
        cut_batch(discs(), 64, Augmentation().draw(generator(seed), 2, 64, 64))[0]
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
    assert 0.8 <= params.gain.min() < 0.805
    assert 1.245 < params.gain.max() <= 1.25
    assert -0.3 <= params.offset.min() < -0.295
    assert 0.295 < params.offset.max() <= 0.3
    assert params.noise is not None
    assert params.noise.abs().max() <= 1
    assert params.grain is not None
    deviations = params.grain.flatten(1).std(dim=1)
    assert deviations.max() < 0.1 * 1.4  # of 64 pixels each
    assert deviations.mean() == pytest.approx(0.05, rel=0.1)
    zoom = torch.linalg.det(params.matrix) ** -0.5
    assert 0.9 - 1e-4 <= zoom.min() < 0.905
    assert 1.19 < zoom.max() <= 1.2 + 1e-4
    # R^-1 and the shear from the QR decomposition of the inverse matrix, zoom removed
    q, r = torch.linalg.qr(torch.linalg.inv(params.matrix) / zoom.view(-1, 1, 1))
    angle = torch.rad2deg(torch.atan(q[:, 1, 0] / q[:, 0, 0])).abs()
    shear = torch.rad2deg(torch.atan(r[:, 0, 1] / r[:, 0, 0])).abs()
    for drawn in (angle, shear):
        assert 4.9 < drawn.max() <= 5 + 1e-3


def test_what_is_switched_off_is_not_drawn():
    params = STILL.draw(generator(), 3, 8, 8)
    assert params.noise is None
    assert params.grain is None
    for name in ("matrix", "shift", "gamma", "gain", "offset"):
        assert torch.equal(getattr(params, name), getattr(AugmentParams.identity(3), name)), name


def test_shift_moves_by_whole_pixels():
    parts = discs(1)
    identity = AugmentParams.identity(1)
    params = dataclasses.replace(identity, shift=torch.tensor([[3.0, -2.0]]))
    _, moved = cut_batch(parts, 64, params)
    expected = torch.roll(parts[0].label.long(), (2, -3), dims=(0, 1))
    assert torch.equal(moved[0], expected)


def test_zoom_magnifies_the_middle():
    label = torch.zeros(64, 64, dtype=torch.uint8)
    label[22:42, 22:42] = 1
    params = dataclasses.replace(STILL, zoom=(1.2, 1.2)).draw(generator(), 1, 64, 64)
    _, moved = cut_batch([whole(label.float(), label)], 64, params)
    assert moved.sum() == 24 * 24
    assert moved[0, 20:44, 20:44].all()


def test_gamma_is_a_power_of_the_range_normalised_intensity():
    image = torch.tensor([-3.0, -1.0, 1.0, 5.0]).expand(4, 4)
    params = dataclasses.replace(AugmentParams.identity(1), gamma=torch.tensor([0.5]))
    toned, _ = cut_batch([whole(image, torch.zeros(4, 4))], 4, params)
    expected = -3 + 8 * torch.tensor([0, 2 / 8, 4 / 8, 1]).sqrt()
    torch.testing.assert_close(toned[0, 0, 0], expected, atol=1e-4, rtol=1e-4)


def test_the_range_is_that_of_the_whole_slice():
    """... and not of the part that is cut out, whose contrast would otherwise depend on it."""
    image = torch.tensor([0.0, 1.0, 2.0, 4.0]).expand(4, 4)
    params = dataclasses.replace(AugmentParams.identity(1), gamma=torch.tensor([2.0]))
    cut = Cut(image, torch.zeros(4, 4), (4.0, 4.0), (2.0, 2.0), 2.0)
    toned, _ = cut_batch([cut], 2, params)
    torch.testing.assert_close(
        toned[0, 0, 0], torch.tensor([4 / 16, 4 * 4 / 16]), atol=1e-4, rtol=1e-4
    )


def test_gain_offset_and_grain():
    images = torch.randn(2, 16, 16)
    grain = torch.randn(2, 16, 16)
    params = dataclasses.replace(
        AugmentParams.identity(2),
        gain=torch.tensor([0.5, 2.0]),
        offset=torch.tensor([1.0, -3.0]),
        grain=grain,
    )
    toned, _ = cut_batch(cuts(images, torch.zeros(2, 16, 16)), 16, params)
    expected = images * torch.tensor([0.5, 2.0]).view(2, 1, 1) + grain
    expected += torch.tensor([1.0, -3.0]).view(2, 1, 1)
    torch.testing.assert_close(toned[:, 0], expected, atol=1e-4, rtol=1e-4)


def test_outside_is_the_darkest_value_and_background():
    image = torch.full((16, 16), 4.0)
    image[:, 8:] = 7.0
    params = dataclasses.replace(AugmentParams.identity(1), shift=torch.tensor([[8.0, 0.0]]))
    moved, labels = cut_batch([whole(image, torch.ones(16, 16))], 16, params)
    assert moved[0, 0, :, :8].eq(7).all()
    assert moved[0, 0, :, 8:].eq(4).all()
    assert labels[0, :, :8].eq(1).all()
    assert labels[0, :, 8:].eq(0).all()


def test_constant_image_stays_constant():
    parts = cuts(torch.full((2, 20, 20), -1.5), torch.zeros(2, 20, 20))
    augmentation = Augmentation(gain=(1, 1), offset=0, grain=0)
    moved, _ = cut_batch(parts, 20, augmentation.draw(generator(), 2, 20, 20))
    assert moved.eq(-1.5).all()


def test_elastic_field_is_gaussian_smoothed_noise():
    """A ramp image shows its sampling positions, which must be those of scipy's filter."""
    size = 64
    params = dataclasses.replace(STILL, elastic_alpha=200).draw(generator(), 1, size, size)
    ramp = torch.arange(size, dtype=torch.float32).expand(size, size)
    moved, _ = cut_batch([whole(ramp, torch.zeros(size, size))], size, params)
    assert params.noise is not None
    smooth = ndimage.gaussian_filter(params.noise[0, 0].numpy(), 5, mode="mirror", truncate=2)
    expected = ramp + 200 * torch.from_numpy(smooth)
    inside = slice(16, -16)
    torch.testing.assert_close(
        moved[0, 0, inside, inside], expected[inside, inside], atol=1e-2, rtol=1e-3
    )


@pytest.mark.parametrize(
    "wrong",
    [{"rotation": -1}, {"zoom": (1.2, 0.9)}, {"zoom": (0, 1)}, {"elastic_sigma": 0},
     {"shift": math.inf}, {"gamma": (0.5, math.nan)}, {"gain": (0, 1)}, {"offset": -0.1},
     {"grain": math.nan}],
)  # fmt: skip
def test_ranges_are_checked(wrong: dict):
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        Augmentation(**wrong)
