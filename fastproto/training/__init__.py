# SPDX-License-Identifier: Apache-2.0
"""Episodic training: ``train(TrainConfig(data=..., output=...))``.

Names are imported on first use, so that reading a configuration costs no ``import torch``.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Augmentation": "augment",
    "Episode": "episodes",
    "LabelEpisodes": "episodes",
    "SliceStore": "slices",
    "SupervoxelEpisodes": "episodes",
    "TrainConfig": "config",
    "cut_batch": "augment",
    "train": "trainer",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
