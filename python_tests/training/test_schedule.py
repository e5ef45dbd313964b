# SPDX-License-Identifier: Apache-2.0
"""The learning rate and the Dice that go into the log."""

from __future__ import annotations

import math

import pytest
import torch

from fastproto.defaults import IGNORE
from fastproto.training import TrainConfig
from fastproto.training.schedule import learning_rate
from fastproto.training.trainer import episode_dice


def test_the_learning_rate_rises_and_falls():
    config = TrainConfig(data="d", output="o", warmup_fraction=0.1, learning_rate=2.0)
    rates = [learning_rate(config, step / 100) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == 2.0
    assert rates[54] == pytest.approx(2.0 * (0.01 + 0.99 * 0.5))
    assert rates[-1] == pytest.approx(0.02)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert learning_rate(config, 1.2) == pytest.approx(0.02)


def test_episode_dice():
    target = torch.tensor([0, 0, 1, 1, 2, 2]).view(1, 1, 1, 6)
    predicted = torch.tensor([0, 1, 1, 1, 0, 0]).view(1, 1, 1, 6)
    logits = torch.nn.functional.one_hot(predicted, 4).movedim(-1, 2).float()
    assert episode_dice(logits, target) == pytest.approx((4 / 5 + 0) / 2)
    assert math.isnan(episode_dice(logits, torch.zeros_like(target)))
    target[..., 1] = IGNORE  # where a 1 was found
    assert episode_dice(logits, target) == pytest.approx((1 + 0) / 2)
    target[..., 4:] = IGNORE
    assert episode_dice(logits, target) == 1
