# SPDX-License-Identifier: Apache-2.0
"""The episodes of the next steps, prepared and copied while a GPU works on this one."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from fastproto.errors import FastprotoError
from fastproto.training.episodes import Episode, EpisodeSource

_AHEAD = 3  # batches that each process keeps ready


def prefetch(
    source: EpisodeSource,
    size: int,
    steps: Sequence[int],
    workers: int,
    rank: int = 0,
    ranks: int = 1,
) -> Generator[Episode]:
    """The batches of some steps in their order: step n has the episodes (n - 1) size to n size - 1.

    Several ranks share out those of one with batches of ``ranks * size``.

    Closing it ends the processes.

    Args:
        source: Of the episodes; an episode is the same whichever process draws it.
        size: Episodes in a step.
        steps: Numbers of the steps, from 1.
        workers: Processes, forked, so that the scans are in memory once; 0 for none, and every
            batch is made when its turn comes.
        rank: Which of them this is, from 0.
        ranks: How many there are.

    Raises:
        FastprotoError: What the source raised, in whichever process.
    """

    def batch_of(step: Any) -> Episode | FastprotoError:
        try:
            begin = ((step - 1) * ranks + rank) * size
            return source.batch(range(begin, begin + size))
        except FastprotoError as error:  # raised here, it would reach the reader as a RuntimeError
            return error

    loader: DataLoader[Any] = DataLoader(
        steps,  # type: ignore[arg-type]  # any sequence will do
        batch_size=None,
        collate_fn=batch_of,
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        pin_memory=workers > 0 and torch.cuda.is_available(),
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # the global one is part of a run's state
    )
    for batch in loader:
        if isinstance(batch, FastprotoError):
            raise batch
        yield batch


def ahead(episodes: Generator[Episode], device: torch.device) -> Generator[Episode]:
    """The same episodes on ``device``; a GPU is sent the next one while it works on this one.

    Closing it closes ``episodes``.
    """
    with contextlib.closing(episodes):
        if device.type != "cuda":
            yield from episodes
            return
        stream = torch.cuda.Stream(device)
        before: Episode | None = None
        for episode in episodes:
            with torch.cuda.stream(stream):
                copied = episode.to(device)
            if before is not None:
                yield before
            # Its step waits for this copy, not for the next. (Step waits for a stream of its own.)
            work = torch.cuda.current_stream(device)
            work.wait_stream(stream)
            for tensor in copied.tensors().values():
                tensor.record_stream(work)
            before = copied
        if before is not None:
            yield before
