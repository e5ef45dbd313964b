# SPDX-License-Identifier: Apache-2.0
"""Clipping and normalising CT and MR."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastproto.data import Preprocessing, Volume
from fastproto.data.intensity import upper_value
from fastproto.errors import ArgumentError


def test_ct_is_clipped_and_normalised_and_padded_with_air():
    array = np.tile(np.array([-1000, -125, 10, 110, 275, 3000], np.int16), (1, 10, 1))
    images = Preprocessing("ct", 10, 10.0, 100.0, crop=False).prepare(Volume(array)).images(0, 1)
    expected = torch.tensor([-1.35, -1.35, -1.35, -1.35, 0, 1, 2.65, 2.65, -1.35, -1.35])
    torch.testing.assert_close(images[0, 0], expected.expand(10, 10))


def test_mr_zscore_after_clipping_the_top():
    array = np.random.default_rng(0).gamma(2, 100, (20, 30, 40)).astype(np.float32)
    array[3, 4, 5] = 1.7e6
    clipped = np.minimum(array, np.quantile(array, 0.995, method="inverted_cdf"))
    expected = (clipped - clipped.mean(dtype=float)) / clipped.std(dtype=float)
    images = Preprocessing("mr", 40, crop=False).prepare(Volume(array)).images(0, 20)
    inside = images[:, 0, 5:35, :].numpy()
    np.testing.assert_allclose(inside, expected, atol=1e-4)


@pytest.mark.parametrize("value", [0, -3, 1234.567])
def test_constant_mr_becomes_zero(value: float):
    array = np.full((3, 10, 7), value, np.float32)
    images = Preprocessing("mr", 16).prepare(Volume(array)).images(0, 3)
    assert torch.equal(images, torch.zeros(3, 1, 16, 16))


def test_fit_is_mean_and_deviation_of_all_clipped_voxels():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-1024, 2000, (4, 5, 6)).astype(np.int16) for _ in range(3)]
    arrays.append(rng.normal(0, 200, (7, 8, 9)).astype(np.float32))
    pooled = np.clip(np.concatenate([a.ravel() for a in arrays]).astype(float), -125, 275)
    fitted = Preprocessing.fit((Volume(a) for a in arrays), "ct", 64, plane="coronal")
    assert fitted.mean == pytest.approx(pooled.mean())
    assert fitted.std == pytest.approx(pooled.std())
    assert (fitted.image_size, fitted.plane) == (64, "coronal")
    assert Preprocessing.fit(iter([]), "mr", 64) == Preprocessing("mr", 64)


@pytest.mark.parametrize("volumes", [[], [Volume(np.full((3, 3, 3), 5000))]])
def test_fit_needs_a_spread(volumes: list[Volume]):
    with pytest.raises(ArgumentError, match="volumes"):
        Preprocessing.fit(volumes, "ct")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=60),
    st.floats(0.01, 1),
)
def test_upper_value_is_the_quantile(values: list[float], fraction: float):
    array = np.array(values, np.float32).reshape(1, 1, -1)
    expected = np.quantile(array, fraction, method="inverted_cdf")
    assert upper_value(array, fraction) == expected


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64])
def test_upper_value_of_other_types_and_many_blocks(dtype: type):
    array = np.random.default_rng(0).integers(0, 200, (12, 400, 500)).astype(dtype)
    array = array[:, ::-1].transpose(2, 0, 1)
    assert upper_value(array, 0.995) == np.quantile(array, 0.995, method="inverted_cdf")
