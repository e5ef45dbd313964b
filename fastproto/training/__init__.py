# SPDX-License-Identifier: Apache-2.0
"""Episodic training: ``train(TrainConfig(data=..., output=...))``.

Names are imported on first use, so that reading a configuration costs no ``import torch``.
"""

from __future__ import annotations

from fastproto import _lazy

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

__getattr__ = _lazy.attributes(__name__, _HOMES)
