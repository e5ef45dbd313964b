# SPDX-License-Identifier: Apache-2.0
"""The program with the tiny encoder, for torchrun: ``train_tiny.py train ...``.

TINY_POISON=RANK:EPISODE spoils an episode of a rank, TINY_PAUSE=STEP holds all ranks there, once a
process id is in each file ``pid-RANK`` of the current folder.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fastproto.cli import main
from fastproto.nn.encoders.registry import ENCODERS, Entry
from fastproto.training import trainer
from fastproto.training.episodes import Episode
from fastproto.training.episodes.source import EpisodeSource
from support.tiny_encoder import TinyEncoder

RANK = os.environ["RANK"]


def _poison(rank: str, number: str) -> None:
    batch = EpisodeSource.batch

    def poisoned(self: EpisodeSource, indices: Sequence[int]) -> Episode:
        episode = batch(self, indices)
        if int(number) in indices and rank == RANK:
            episode.query_images[..., 5, 5] = math.nan
        return episode

    EpisodeSource.batch = poisoned  # type: ignore[method-assign]


def _pause(at: int) -> None:
    step = trainer._Run.step

    def pausing(self: trainer._Run, now: int) -> float:
        if now == at:
            Path(f"pid-{RANK}").write_text(str(os.getpid()), encoding="utf-8")
            if RANK != "0":  # which waits for the others in its step
                time.sleep(60)
        return step(self, now)

    trainer._Run.step = pausing  # type: ignore[method-assign]


if __name__ == "__main__":
    ENCODERS["tiny"] = Entry(TinyEncoder)
    if poison := os.environ.get("TINY_POISON"):
        _poison(*poison.split(":"))
    if pause := os.environ.get("TINY_PAUSE"):
        _pause(int(pause))
    sys.exit(main())
