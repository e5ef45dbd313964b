# SPDX-License-Identifier: Apache-2.0
"""The program with the tiny encoder, for torchrun: ``train_tiny.py train ...``.

TINY_POISON=RANK:EPISODE spoils an episode of a rank, TINY_PAUSE=STEP holds all ranks there, once a
process id is in each file ``pid-RANK`` of the current folder. TINY_DOUBLE=1 computes in float64.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastproto.cli import main
from fastproto.nn import FewShotUNet
from fastproto.nn.encoders.registry import ENCODERS, Entry
from fastproto.training import trainer
from fastproto.training.episodes import Episode
from fastproto.training.episodes.source import EpisodeSource
from support.tiny_encoder import TinyEncoder

RANK = os.environ.get("RANK", "0")


class _Double(FewShotUNet):
    """In float64: training enlarges a rounding of float32 to percents within 20 steps."""

    def __init__(self, *given: Any, **more: Any):
        super().__init__(*given, **more)
        self.double()


def _use_double() -> None:
    move = Episode.to

    def to(self: Episode, device: torch.device) -> Episode:
        moved = move(self, device)
        images = moved.support_images.double(), moved.query_images.double()
        return replace(moved, support_images=images[0], query_images=images[1])

    Episode.to = to  # type: ignore[method-assign]
    trainer.FewShotUNet = _Double  # type: ignore[misc]


def _poison(rank: str, number: str) -> None:
    batch = EpisodeSource.batch

    def poisoned(self: EpisodeSource, indices: Sequence[int]) -> Episode:
        episode = batch(self, indices)
        if int(number) in indices and rank == RANK:
            episode.query_images[..., 5, 5] = math.nan
        return episode

    EpisodeSource.batch = poisoned  # type: ignore[method-assign]


def _pause(at: int) -> None:
    take = trainer._Run.step

    def pausing(self: trainer._Run, step: int) -> float:
        if step == at:
            Path(f"pid-{RANK}").write_text(str(os.getpid()), encoding="utf-8")
            if RANK != "0":  # which waits for the others in its step
                time.sleep(60)
        return take(self, step)

    trainer._Run.step = pausing  # type: ignore[method-assign]


if __name__ == "__main__":
    ENCODERS["tiny"] = Entry(TinyEncoder)
    if os.environ.get("TINY_DOUBLE"):
        _use_double()
    if poison := os.environ.get("TINY_POISON"):
        _poison(*poison.split(":"))
    if pause := os.environ.get("TINY_PAUSE"):
        _pause(int(pause))
    sys.exit(main())
