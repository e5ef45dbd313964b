# SPDX-License-Identifier: Apache-2.0
"""Pieces, holes and uncertainty."""

from __future__ import annotations

import numpy as np
import pytest

from fastproto.segmentation.postprocess import clean, uncertainty


def test_small_pieces_go_and_large_ones_stay():
    mask = np.zeros((6, 20, 20), bool)
    mask[1:5, 2:7, 2:7] = True  # 100 voxels
    mask[2:4, 12:17, 2:4] = True  # 20
    mask[2:4, 12:14, 12:16] = True  # 16
    mask[5, 19, 19] = True
    expected = mask.copy()
    expected[2:4, 12:14, 12:16] = False
    expected[5, 19, 19] = False
    before = mask.copy()
    assert np.array_equal(clean(mask), expected)
    assert np.array_equal(mask, before)
    assert not clean(np.zeros((2, 3, 4), bool)).any()


def test_holes_of_a_slice_are_filled():
    mask = np.zeros((3, 10, 10), bool)
    mask[1, 2:8, 2:8] = True
    mask[1, 4:6, 4:6] = False
    mask[1, 2, 2:4] = False  # a notch is no hole
    expected = mask.copy()
    expected[1, 4:6, 4:6] = True
    assert np.array_equal(clean(mask), expected)


def test_uncertainty_of_one_organ_is_the_binary_entropy():
    p = np.array([0.0, 1e-3, 0.25, 0.5, 0.9, 1.0], np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.nan_to_num(-p * np.log2(p) - (1 - p) * np.log2(1 - p))
    found = uncertainty([p])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found[0] == 0
    assert found[3] == pytest.approx(1)


def test_uncertainty_of_several_organs_is_that_of_all_of_them():
    """Of log odds a and b against the background: softmax over (0, a, b)."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 3, (2, 4, 5, 6))
    shares = np.exp(np.stack([np.zeros_like(a), a, b]))
    shares /= shares.sum(axis=0)
    expected = -(shares * np.log2(shares)).sum(axis=0)
    found = uncertainty((1 / (1 + np.exp(-x))).astype(np.float32) for x in (a, b))
    assert found.shape == (4, 5, 6)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    even = np.full(3, 0.5, np.float32)
    np.testing.assert_allclose(uncertainty([even] * 3), 2, atol=1e-5)


def test_certain_organs_leave_no_doubt():
    one = np.ones((2, 2), np.float32)
    assert uncertainty([one, 0 * one]).max() < 1e-3
    assert np.isfinite(uncertainty([one, one])).all()
