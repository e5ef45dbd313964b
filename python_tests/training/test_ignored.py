# SPDX-License-Identifier: Apache-2.0
"""Pixels of a label to ignore, in episodes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastproto.defaults import IGNORE
from fastproto.errors import ArgumentError
from fastproto.training.slices import SliceStore

from .test_episodes import COUNT, draws, labels_source, origin


def test_what_is_ignored_is_neither_class_nor_background(store: SliceStore):
    """Class 2 of the store is ignored; its squares lie in slices 2 to 9, rows 20 to 27."""
    source = labels_source(store, [1, 3], ignore=2, names={1: "one"})
    for draw in draws(source):
        for cut in draw.cuts:
            patient, position = origin(cut)
            truth = store.cases[patient].labels[position]
            assert torch.equal(cut.label == IGNORE, truth == 2)
            chosen = 3 if "class 3" in draw.description else 1
            assert torch.equal(cut.label == 1, truth == chosen)
            assert ((cut.label == 0) | (cut.label == 1) | (cut.label == IGNORE)).all()
    episode = source.batch(range(COUNT))
    for masks in (episode.support_masks, episode.query_masks):
        assert masks.dtype == torch.int64
        assert set(masks.unique().tolist()) == {IGNORE, 0, 1}
    # As far as anything is drawn by the labels, the ignored ones do not matter.
    bare = SliceStore(
        [dataclasses.replace(c, labels=c.labels.where(c.labels != 2, 0)) for c in store.cases]
    )
    same = labels_source(bare, [1, 3], names={1: "one"}).batch(range(COUNT))
    assert same.description == episode.description
    assert torch.equal(same.query_images, episode.query_images)
    assert torch.equal(same.query_masks == 1, episode.query_masks == 1)
    with pytest.raises(ArgumentError, match="neither held out nor ignored"):
        labels_source(store, [1, 2], ignore=2)
