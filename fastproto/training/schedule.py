# SPDX-License-Identifier: Apache-2.0
"""The learning rate over a run, and over what a run is lengthened by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastproto.training.config import LENGTH, TrainConfig


class Schedule(NamedTuple):
    """Where warm-up and fall of the learning rate begin: at 0, or where a run was lengthened."""

    step: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig, saved: Mapping[str, Any] | None) -> Schedule:
        """That of a run that goes on from a checkpoint with this metadata; None for a new run."""
        if saved is None:
            return cls()
        if any(saved["config"].get(name) != getattr(config, name) for name in LENGTH):
            return cls(saved["step"], saved["seconds"])
        return cls(*saved.get("schedule", ()))

    def progress(self, config: TrainConfig, step: int, seconds: float) -> float:
        """Share of the schedule that is done after so many steps and seconds of the whole run."""
        done = _share(step, self.step, config.steps)
        if config.minutes is None:
            return done
        return max(done, _share(seconds, self.seconds, config.minutes * 60))


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Rate at ``progress`` (above 0, 1 at the end): linear warm-up, then half a cosine."""
    if progress <= config.warmup_fraction:
        return config.learning_rate * progress / config.warmup_fraction
    falling = (progress - config.warmup_fraction) / max(1 - config.warmup_fraction, 1e-9)
    share = 0.5 * (1 + math.cos(math.pi * min(falling, 1.0)))
    final = config.final_learning_rate
    return config.learning_rate * (final + (1 - final) * share)


def _share(now: float, begin: float, end: float) -> float:
    return 1.0 if now >= end else (now - begin) / (end - begin)
