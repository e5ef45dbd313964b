# SPDX-License-Identifier: Apache-2.0
"""Episodes: small few-shot tasks drawn from labels or from supervoxels."""

from __future__ import annotations

from fastproto.training.episodes.labels import LabelEpisodes as LabelEpisodes
from fastproto.training.episodes.source import Draw as Draw
from fastproto.training.episodes.source import Episode as Episode
from fastproto.training.episodes.source import EpisodeSource as EpisodeSource
from fastproto.training.episodes.source import MixedEpisodes as MixedEpisodes
from fastproto.training.episodes.source import choice as choice
from fastproto.training.episodes.source import episode_generator as episode_generator
from fastproto.training.episodes.supervoxels import SupervoxelEpisodes as SupervoxelEpisodes
from fastproto.training.episodes.views import field_of_view as field_of_view
