# SPDX-License-Identifier: Apache-2.0
"""The way from an organ's expected place to the place where the network sees it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastproto.segmentation.correction import correction

SPACING = (3.0, 2.0, 1.0)
SHAPE = (24, 40, 60)
CENTRE = (36.0, 40.0, 30.0)
RADIUS = 12.0


def ball(centre: tuple[float, ...]) -> Tensor:
    """Signed distance to a ball of radius 12 mm."""
    axes = [torch.arange(n) * side for n, side in zip(SHAPE, SPACING, strict=True)]
    places = torch.meshgrid(*axes, indexing="ij")
    return sum((x - c) ** 2 for x, c in zip(places, centre, strict=True)).sqrt() - RADIUS


def scores_of(distance: Tensor) -> Tensor:
    """A network that is sure, and right."""
    return torch.where(distance < 0, 6.0, -6.0)


@pytest.mark.parametrize("way", [(12, 0, 0), (-9, 8, -12), (0, -16, 8), (3, 0, 24)])
def test_it_follows_the_network(way: tuple[int, ...]):
    seen = ball(tuple(c + w for c, w in zip(CENTRE, way, strict=True)))
    found = correction(scores_of(seen), ball(CENTRE), SPACING)
    cells = [3, 4, 4]  # a third of 12 mm, in whole voxels
    assert (np.abs(found - way) <= cells).all()


FLAT = ball(CENTRE)[12:13, :, :30]


@pytest.mark.parametrize(
    ("scores", "distance"),
    [
        pytest.param(scores_of(ball(CENTRE)), ball(CENTRE), id="seen at its place"),
        pytest.param(torch.full(SHAPE, -8.0), ball(CENTRE), id="nothing seen"),
        pytest.param(torch.zeros(SHAPE), ball(CENTRE), id="a network that does not know"),
        pytest.param(torch.zeros(SHAPE), ball(CENTRE) + 40, id="a place beyond the scan"),
        pytest.param(scores_of(FLAT), FLAT, id="a scan of one slice"),
    ],
)
def test_an_organ_stays(scores: Tensor, distance: Tensor):
    assert not correction(scores, distance, SPACING).any()


def test_a_little_more_agreement_is_not_worth_a_long_way():
    """A quarter of the organ's volume is seen at its place, a little more far away."""
    near, far = ball(CENTRE), ball((36.0, 40.0, 56.0))
    scores = torch.full(SHAPE, -6.0)
    scores[near + RADIUS < 8.0] = 6.0
    scores[far + RADIUS < 8.2] = 6.0
    assert np.abs(correction(scores, near, SPACING)).max() < 5
