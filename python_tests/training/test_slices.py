# SPDX-License-Identifier: Apache-2.0
"""The slice store keeps what is needed, compactly, and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from fastproto.data import Preprocessing, open_dataset, read_label, read_volume
from fastproto.errors import DatasetError
from fastproto.training.slices import SliceStore

PREPROCESSING = Preprocessing("ct", image_size=32, mean=-50.0, std=100.0)


def test_slices_are_those_of_the_prepared_volume(phantom: Path):
    dataset = open_dataset(phantom)
    case = dataset.cases[0]
    store = SliceStore.build(dataset, [case], PREPROCESSING)
    prepared = PREPROCESSING.prepare(read_volume(case.image))
    (kept,) = store.cases
    assert kept.numbers == list(range(len(prepared)))
    assert len(store) == 16
    assert kept.images.dtype == torch.float16
    assert kept.labels is not None
    assert kept.labels.dtype == torch.uint8
    torch.testing.assert_close(
        kept.images.float(), prepared.images(0, 16)[:, 0], atol=2e-3, rtol=1e-3
    )
    assert case.label is not None
    assert torch.equal(kept.labels, prepared.labels(read_label(case.label)))


def test_only_wanted_slices_are_kept(phantom: Path):
    dataset = open_dataset(phantom)
    whole = SliceStore.build(dataset, dataset.cases, PREPROCESSING)
    wanted, unwanted = [1], [2]
    some = SliceStore.build(dataset, dataset.cases, PREPROCESSING, holding=wanted, without=unwanted)
    for before, after in zip(whole.cases, some.cases, strict=True):
        expected = [
            number
            for number, labels in zip(before.numbers, before.labels, strict=True)
            if (labels == 1).any() and not (labels == 2).any()
        ]
        assert after.numbers == expected
        assert 0 < len(expected) < len(before.numbers)
        assert torch.equal(after.images, before.images[expected])
        assert not (after.labels == 2).any()


def test_without_labels_none_are_kept(phantom: Path):
    dataset = open_dataset(phantom)
    store = SliceStore.build(dataset, dataset.cases[:1], PREPROCESSING, False, without=[2])
    assert store.cases[0].labels is None
    assert len(store) < 16


def test_missing_labels_and_empty_stores_are_errors(phantom: Path):
    dataset = open_dataset(phantom)
    unlabelled = dataclasses.replace(dataset.cases[0], label=None)
    assert len(SliceStore.build(dataset, [unlabelled], PREPROCESSING, False)) == 16
    with pytest.raises(DatasetError, match=f"case {unlabelled.id}: found no label map"):
        SliceStore.build(dataset, [unlabelled], PREPROCESSING)
    with pytest.raises(DatasetError, match="no slice that can be used"):
        SliceStore.build(dataset, dataset.cases, PREPROCESSING, holding=[250])
