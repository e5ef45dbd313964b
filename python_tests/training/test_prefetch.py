# SPDX-License-Identifier: Apache-2.0
"""Episodes prepared by other processes are the same episodes, in the same order."""

from __future__ import annotations

import gc
import multiprocessing
import re
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from fastproto.errors import DatasetError
from fastproto.training.episodes import Episode, SupervoxelEpisodes
from fastproto.training.prefetch import ahead, prefetch
from fastproto.training.slices import CaseSlices, SliceStore


@pytest.fixture
def source(pieces: CaseSlices) -> SupervoxelEpisodes:
    return SupervoxelEpisodes(SliceStore([pieces]), seed=3, size=16)


def test_processes_give_what_the_main_process_gives(source):
    alone, helped = (list(prefetch(source, 2, range(3, 9), workers)) for workers in (0, 2))
    assert len(alone) == 6
    for one, other in zip(alone, helped, strict=True):
        assert one.description == other.description
        for name, value in one.tensors().items():
            assert torch.equal(value, getattr(other, name))
    assert alone[0].description.startswith("episode 4:")


def test_nothing_is_prepared_before_it_is_asked_for(source):
    made = []
    original = source.draw
    source.draw = lambda generator: made.append(1) or original(generator)
    batches = prefetch(source, 2, range(1, 100), 0)
    assert made == []
    next(batches)
    assert len(made) == 2


def test_a_gpu_gets_the_next_batch_before_it_works_on_this_one(
    source, monkeypatch, pretended_streams
):
    done = []
    monkeypatch.setattr(Episode, "to", lambda self, device: done.append("copy") or self)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    batches = prefetch(source, 1, range(1, 4), 0)
    episodes = ahead(batches, SimpleNamespace(type="cuda"))  # type: ignore[arg-type]
    found = []
    for episode in episodes:
        done.append("step")
        found.append(episode.description)
    assert done == ["copy", "copy", "step", "copy", "step", "step"]
    assert found == [batch.description for batch in prefetch(source, 1, range(1, 4), 0)]
    assert list(batches) == []  # closed


def test_a_cpu_has_nothing_copied(source):
    (batch,) = ahead(prefetch(source, 1, range(1, 2), 0), torch.device("cpu"))
    assert batch.query_images.device.type == "cpu"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_source_arrives_as_it_is(source, workers, monkeypatch):
    error = DatasetError("scans", found="nothing", allowed="something", fix="Add some.")
    monkeypatch.setattr(source, "batch", Mock(side_effect=error))
    with pytest.raises(DatasetError, match=rf"^{re.escape(str(error))}$"):
        next(prefetch(source, 1, range(1, 9), workers))
    assert not multiprocessing.active_children()


def test_closing_ends_the_processes(source):
    batches = prefetch(source, 2, range(1, 100), 2)
    next(batches)
    assert multiprocessing.active_children()
    batches.close()
    gc.collect()
    assert not multiprocessing.active_children()
