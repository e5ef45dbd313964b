# SPDX-License-Identifier: Apache-2.0
"""Episodes prepared by other processes are the same episodes, in the same order."""

from __future__ import annotations

import gc
import multiprocessing
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch

from fastproto.errors import DatasetError
from fastproto.training.episodes import Episode, SupervoxelEpisodes
from fastproto.training.prefetch import ahead, prefetch
from fastproto.training.slices import CaseSlices, SliceStore


def source() -> SupervoxelEpisodes:
    """One scan of two blocks."""
    regions = torch.zeros(6, 32, 32, dtype=torch.int32)
    regions[:, 4:16, 4:16] = 1
    regions[:, 18:30, 18:30] = 2
    images = torch.rand(6, 32, 32, generator=torch.Generator().manual_seed(1)).half() + regions
    case = CaseSlices("a", list(range(6)), images, None, (2.0, 1.0, 1.0), regions, parents)
    return SupervoxelEpisodes(SliceStore([case]), seed=3, size=16)


parents = torch.arange(3)[None].numpy()


def test_processes_give_what_the_main_process_gives():
    steps = range(3, 9)
    alone = list(prefetch(source(), 2, steps, 0))
    helped = list(prefetch(source(), 2, steps, 2))
    assert len(alone) == len(helped) == len(steps)
    for one, other in zip(alone, helped, strict=True):
        assert one.description == other.description
        for name in ("support_images", "support_masks", "query_images", "query_masks"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert alone[0].description.startswith("episode 4:")


def test_nothing_is_prepared_before_it_is_asked_for():
    made = []
    episodes = source()
    original = episodes.draw
    episodes.draw = lambda generator: made.append(1) or original(generator)  # type: ignore[method-assign]
    batches = prefetch(episodes, 2, range(1, 100), 0)
    assert made == []
    next(batches)
    assert len(made) == 2


def test_a_gpu_gets_the_next_batch_before_it_works_on_this_one(monkeypatch, pretended_streams):
    done = []
    monkeypatch.setattr(Episode, "to", lambda self, device: done.append("copy") or self)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    batches = prefetch(source(), 1, range(1, 4), 0)
    episodes = ahead(batches, SimpleNamespace(type="cuda"))  # type: ignore[arg-type]
    found = []
    for episode in episodes:
        done.append("step")
        found.append(episode.description)
    assert done == ["copy", "copy", "step", "copy", "step", "step"]
    assert found == [batch.description for batch in prefetch(source(), 1, range(1, 4), 0)]
    assert list(batches) == []  # closed


def test_a_cpu_has_nothing_copied():
    (batch,) = ahead(prefetch(source(), 1, range(1, 2), 0), torch.device("cpu"))
    assert batch.query_images.device.type == "cpu"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_source_arrives_as_it_is(workers):
    batches = prefetch(Failing(), 1, range(1, 9), workers)
    with pytest.raises(
        DatasetError, match=r"^scans: found nothing; allowed: something\. Add some\.$"
    ):
        next(batches)
    assert not multiprocessing.active_children()


def test_closing_ends_the_processes():
    batches = prefetch(source(), 2, range(1, 100), 2)
    next(batches)
    assert multiprocessing.active_children()
    batches.close()
    gc.collect()
    assert not multiprocessing.active_children()


class Failing:
    def batch(self, numbers: range) -> NoReturn:
        raise DatasetError("scans", found="nothing", allowed="something", fix="Add some.")
