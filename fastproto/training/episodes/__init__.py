# SPDX-License-Identifier: Apache-2.0
"""Episodes: small few-shot tasks drawn from labels or from supervoxels."""

from __future__ import annotations

from fastproto.training.episodes.labels import LabelEpisodes
from fastproto.training.episodes.source import (
    Draw,
    Episode,
    EpisodeSource,
    MixedEpisodes,
    choice,
    episode_generator,
)
from fastproto.training.episodes.supervoxels import SupervoxelEpisodes
from fastproto.training.episodes.views import field_of_view

__all__ = [
    "Draw",
    "Episode",
    "EpisodeSource",
    "LabelEpisodes",
    "MixedEpisodes",
    "SupervoxelEpisodes",
    "choice",
    "episode_generator",
    "field_of_view",
]
