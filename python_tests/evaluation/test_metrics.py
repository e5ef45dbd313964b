# SPDX-License-Identifier: Apache-2.0
"""Metrics against MONAI, against hand-computed cases, and on every kind of empty mask."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_surface_dice,
)
from monai.metrics.utils import create_table_neighbour_code_to_surface_area
from scipy.ndimage import gaussian_filter

from fastproto.data.volume import read_label
from fastproto.errors import ArgumentError
from fastproto.evaluation.metrics import METRICS
from fastproto.evaluation.surfaces import MaskPair, _surface_areas

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:monai")

SPACINGS = [(1.0, 1.0, 1.0), (5.0, 1.5, 1.5), (0.7, 2.3, 0.9)]
dice, hd95, assd, nsd = METRICS


def measured(*arguments, **options) -> tuple[float, ...]:
    """Every metric of one pair of masks."""
    pair = MaskPair(*arguments, **options)
    return tuple(metric.function(pair) for metric in METRICS)


def random_pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two masks: smooth shapes, or scattered voxels, of random size, often touching the edge."""
    rng = np.random.default_rng(seed)
    shape = rng.integers(3, 22, 3)
    if seed % 4 == 0:
        return rng.random(shape) < 0.2, rng.random(shape) < 0.1
    field = gaussian_filter(rng.standard_normal(shape), 2.0)
    other = field + 0.6 * gaussian_filter(rng.standard_normal(shape), 2.0)
    level = np.quantile(field, rng.uniform(0.4, 0.9))
    return field > level, other > level


def monai_values(
    a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...], tolerance: float
) -> tuple[float, ...]:
    pred, truth = (torch.from_numpy(mask)[None, None].float() for mask in (a, b))
    grid = {"include_background": True, "spacing": list(spacing)}
    return (
        compute_dice(pred, truth, include_background=True).item(),
        compute_hausdorff_distance(pred, truth, percentile=95, **grid).item(),
        compute_average_surface_distance(pred, truth, symmetric=True, **grid).item(),
        compute_surface_dice(pred, truth, [tolerance], use_subvoxels=True, **grid).item(),
    )


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("tolerance", [0.0, 0.7, 2.0])
def test_equals_monai_on_random_masks(spacing, tolerance):
    for seed in range(32):
        a, b = random_pair(seed)
        assert a.any()
        assert b.any()
        expected = pytest.approx(monai_values(a, b, spacing, tolerance), rel=2e-6, abs=2e-6)
        assert measured(a, b, spacing, tolerance) == expected, f"seed {seed}"


@pytest.mark.data
def test_equals_monai_on_real_organs(test_data):
    """Organs of one brain against those of another, which overlap roughly."""
    folder = test_data / "ixi_brain_mr" / "labels"
    first, second = (read_label(path) for path in sorted(folder.glob("*.nii.gz"))[:2])
    spacing = (2.0, 1.0, 2.5)
    for value in (1, 4, 6, 8):
        a, b = first.array == value, second.array == value
        expected = pytest.approx(monai_values(a, b, spacing, 2.0), rel=2e-6)
        assert measured(a, b, spacing) == expected


@pytest.mark.parametrize("spacing", [(1.0, 1.7, 2.9), (3.0, 0.5, 0.5)])
def test_area_of_all_256_surface_elements_equals_monais(spacing):
    table, _ = create_table_neighbour_code_to_surface_area(spacing)
    np.testing.assert_allclose(_surface_areas(spacing), table.numpy(), rtol=1e-6)


def test_masks_shifted_along_one_axis():
    a, b = np.zeros((2, 4, 30, 30), dtype=bool)
    a[:, 5:15, 5:15] = True
    b[:, 5:15, 8:18] = True
    spacing = (5.0, 1.0, 2.0)
    assert dice(a, b) == pytest.approx(0.7)
    assert hd95(a, b, spacing=spacing) == pytest.approx(6.0)
    assert nsd(a, b, spacing=spacing, nsd_tolerance=6.0) == 1.0
    assert nsd(a, b, spacing=spacing, nsd_tolerance=5.9) < 1.0
    a, b = np.zeros((2, 12, 12, 12), dtype=bool)
    a[2, 3, 3] = b[5, 3, 3] = True  # a distance equal to the tolerance, but 3 * 0.7 > 2.1
    assert nsd(a, b, spacing=(0.7, 1.0, 1.0), nsd_tolerance=2.1) == 1.0


def test_empty_and_full_masks():
    empty, some, full = np.zeros((3, 4, 5, 6), dtype=bool)
    some[1:3, 2, 2:4] = True
    full[:] = True  # with a surface at the edge
    spacing = (1.0, 1.0, 1.0)
    assert measured(full, full, spacing) == (1.0, 0.0, 0.0, 1.0)
    assert all(math.isnan(value) for value in measured(empty, empty, spacing))
    for pair in ((empty, some), (some, empty)):
        found = dict(zip(METRICS, measured(*pair, spacing), strict=True))
        assert found[dice] == found[nsd] == 0
        assert math.isnan(found[hd95])
        assert math.isnan(found[assd])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(1, 10_000),
    factor=st.sampled_from([0.5, 2.0, 4.0]),
    pad=st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 3),
)
def test_symmetric_and_indifferent_to_place_and_unit(seed, factor, pad):
    a, b = random_pair(seed)
    assume(a.any() and b.any())  # the rules for empty masks have a test of their own
    spacing = np.array([3.0, 1.0, 1.5])
    here = measured(a, b, spacing)
    assert measured(b, a, spacing) == pytest.approx(here)
    assert measured(np.pad(a, pad), np.pad(b, pad), spacing) == pytest.approx(here)
    expected = [value * factor if m.unit else value for m, value in zip(METRICS, here, strict=True)]
    assert measured(a, b, spacing * factor, 2.0 * factor) == pytest.approx(expected, rel=1e-6)
    assert measured(a, a, spacing) == (1.0, 0.0, 0.0, 1.0)


def test_zeros_and_ones_of_any_type_are_a_mask_and_a_metric_alone_equals_that_of_all():
    a, b = random_pair(5)
    options = {"spacing": (5.0, 1.5, 1.4), "nsd_tolerance": 1.5}
    expected = measured(a, b, **options)
    assert tuple(metric(a, b, **options) for metric in METRICS) == expected
    for other in (*map(a.astype, (np.uint8, np.int64, np.float32)), torch.from_numpy(a)):
        assert measured(other, b, **options) == expected


CUBE = np.zeros((2, 2, 2))


@pytest.mark.parametrize(
    ("prediction", "truth", "options", "subject"),
    [
        (np.zeros((2, 3, 4)), np.zeros((2, 3, 5)), {}, "prediction and truth"),
        (np.zeros((3, 4)), np.zeros((3, 4)), {}, "prediction and truth"),
        (CUBE + 3, CUBE, {}, "prediction"),
        (CUBE, CUBE + 0.5, {}, "truth"),
        (CUBE, CUBE + np.nan, {}, "truth"),
        (CUBE, CUBE, {"spacing": (1, 1)}, "spacing"),
        (CUBE, CUBE, {"spacing": (1, 0, 1)}, "spacing"),
        (CUBE, CUBE, {"spacing": (1, np.nan, 1)}, "spacing"),
        (CUBE, CUBE, {"nsd_tolerance": -1.0}, "nsd_tolerance"),
        (CUBE, CUBE, {"nsd_tolerance": np.inf}, "nsd_tolerance"),
    ],
)
def test_bad_arguments_are_named(prediction, truth, options, subject):
    with pytest.raises(ArgumentError) as error:
        measured(prediction, truth, **{"spacing": (1.0, 1.0, 1.0)} | options)
    assert error.value.subject == subject
