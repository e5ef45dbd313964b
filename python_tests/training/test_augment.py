# SPDX-License-Identifier: Apache-2.0
"""Cutting and augmenting: exact where it must be, within its ranges, a function of its seed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from fastproto.errors import ArgumentError
from fastproto.training.augment import Augmentation, AugmentParams, Cut, cut_batch

UNTONED = Augmentation(gain=(1, 1), offset=0, grain=0)
STILL = replace(UNTONED, rotation=0, shear=0, shift=0, zoom=(1, 1), elastic_alpha=0, gamma=(1, 1))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole(image: torch.Tensor, label: torch.Tensor) -> Cut:
    """All of a square slice."""
    side = float(len(image))
    return Cut(image, label, (side, side), (side / 2, side / 2), side)


def cuts(images: torch.Tensor, labels: torch.Tensor) -> list[Cut]:
    """All of every slice of [B, H, H]."""
    return [whole(image, label) for image, label in zip(images, labels, strict=True)]


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
    shift = torch.tensor([[2.03, -1.57]] * 2)
    params = replace(AugmentParams.identity(2), matrix=matrix.repeat(2, 1, 1), shift=shift)
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


@pytest.mark.parametrize("shape", [(128, 128), (128, 16), (16, 128)])
def test_zooming_out_averages_along_the_fine_axes_and_skips_nothing(shape: tuple[int, int]):
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


def test_constant_slices_of_several_sizes_stay_constant():
    sizes = (20, 33, 64)
    parts = [whole(torch.full((n, n), -float(n)), torch.full((n, n), n)) for n in sizes]
    images, labels = cut_batch(parts, 16, AugmentParams.identity(3))
    moved, _ = cut_batch(parts, 16, UNTONED.draw(generator(), 3, 16, 16))
    for n, image, label, other in zip(sizes, images, labels, moved, strict=True):
        assert image.eq(-n).all()
        assert label.eq(n).all()
        assert other.eq(-n).all()


def test_image_and_label_stay_aligned():
    """Discs that are their own label maps."""
    y, x, disc = torch.meshgrid(torch.arange(64), torch.arange(64), torch.arange(8), indexing="ij")
    labels = ((x - 20 - 3 * disc) ** 2 + (y - 40) ** 2 < 144).to(torch.uint8).movedim(2, 0)
    params = replace(UNTONED, elastic_alpha=60).draw(generator(), 8, 64, 64)
    moved, moved_labels = cut_batch(cuts(labels.half(), labels), 64, params)
    thresholded = moved[:, 0] ** (1 / params.gamma.view(-1, 1, 1)) > 0.5
    disagreeing = (thresholded != (moved_labels == 1)).sum().item()
    # bilinear and nearest can only disagree on the border of a disc, 8 x about 75 pixels long
    assert disagreeing < 0.3 * 8 * 75
    assert (moved_labels != labels).sum() > 100


@pytest.mark.parametrize("size", [33, 64])
def test_batch_equals_one_by_one(size: int):
    parts = cuts(torch.randn(4, size, size), torch.randint(0, 4, (4, size, size)))
    single = [Augmentation().draw(generator(seed), 1, size, size) for seed in range(4)]
    together = cut_batch(parts, size, AugmentParams.cat(single))
    for i, params in enumerate(single):
        alone = cut_batch(parts[i : i + 1], size, params)
        assert torch.equal(alone[0][0], together[0][i])
        assert torch.equal(alone[1][0], together[1][i])


def test_parameters_fill_their_ranges_and_no_more():
    params = Augmentation().draw(generator(), 2000, 8, 8)
    assert 4.9 < params.shift.abs().max() <= 5
    for name, low, high in (("gamma", 0.5, 1.5), ("gain", 0.8, 1.25), ("offset", -0.3, 0.3)):
        drawn = getattr(params, name)
        assert low <= drawn.min() < low + 0.005, name
        assert high - 0.005 < drawn.max() <= high, name
    assert params.noise.abs().max() <= 1
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
    assert 4.9 < angle.max() <= 5 + 1e-3
    assert 4.9 < shear.max() <= 5 + 1e-3


def test_what_is_switched_off_is_not_drawn():
    params = STILL.draw(generator(), 3, 8, 8)
    assert params.noise is None
    assert params.grain is None
    for name in ("matrix", "shift", "gamma", "gain", "offset"):
        assert torch.equal(getattr(params, name), getattr(AugmentParams.identity(3), name)), name


@pytest.mark.parametrize(
    ("row", "side", "gamma", "expected"),
    [
        ([-3.0, -1.0, 1.0, 5.0], 4, 0.5, [-3.0, 1.0, -3 + 8 * 0.5**0.5, 5.0]),
        ([0.0, 1.0, 2.0, 4.0], 2, 2.0, [1 / 4, 1.0]),  # or contrast depended on the part
    ],
)
def test_gamma_is_a_power_of_the_intensity_in_the_range_of_the_whole_slice(
    row: list[float], side: int, gamma: float, expected: list[float]
):
    params = replace(AugmentParams.identity(1), gamma=torch.tensor([gamma]))
    cut = Cut(torch.tensor(row).expand(4, 4), torch.zeros(4, 4), (4.0, 4.0), (2.0, 2.0), side)
    toned, _ = cut_batch([cut], side, params)
    torch.testing.assert_close(toned[0, 0, 0], torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_gain_offset_and_grain():
    images, grain = torch.randn(2, 2, 16, 16)
    gain, offset = torch.tensor([[0.5, 2.0], [1.0, -3.0]])
    params = replace(AugmentParams.identity(2), gain=gain, offset=offset, grain=grain)
    toned, _ = cut_batch(cuts(images, torch.zeros(2, 16, 16)), 16, params)
    expected = images * gain.view(2, 1, 1) + grain + offset.view(2, 1, 1)
    torch.testing.assert_close(toned[:, 0], expected, atol=1e-4, rtol=1e-4)


def test_outside_is_the_darkest_value_and_background():
    image = torch.full((16, 16), 4.0)
    image[:, 8:] = 7.0
    params = replace(AugmentParams.identity(1), shift=torch.tensor([[8.0, 0.0]]))
    moved, labels = cut_batch([whole(image, torch.ones(16, 16))], 16, params)
    assert moved[0, 0, :, :8].eq(7).all()
    assert moved[0, 0, :, 8:].eq(4).all()
    assert labels[0, :, :8].eq(1).all()
    assert labels[0, :, 8:].eq(0).all()


def test_elastic_field_is_gaussian_smoothed_noise():
    """A ramp image shows its sampling positions, which must be those of scipy's filter."""
    params = replace(STILL, elastic_alpha=200).draw(generator(), 1, 64, 64)
    ramp = torch.arange(64.0).expand(64, 64)
    moved, _ = cut_batch([whole(ramp, torch.zeros(64, 64))], 64, params)
    smooth = ndimage.gaussian_filter(params.noise[0, 0].numpy(), 5, mode="mirror", truncate=2)
    difference = moved[0, 0] - (ramp + 200 * torch.from_numpy(smooth))
    assert difference[16:-16, 16:-16].abs().max() < 1e-2


@pytest.mark.parametrize(
    "wrong",
    [{"rotation": -1}, {"zoom": (1.2, 0.9)}, {"zoom": (0, 1)}, {"elastic_sigma": 0},
     {"shift": math.inf}, {"gamma": (0.5, math.nan)}, {"gain": (0, 1)}, {"offset": -0.1},
     {"grain": math.nan}],
)  # fmt: skip
def test_ranges_are_checked(wrong: dict):
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        Augmentation(**wrong)
