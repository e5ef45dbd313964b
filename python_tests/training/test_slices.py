# SPDX-License-Identifier: Apache-2.0
"""The slice store keeps what is needed, compactly, and nothing else."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproto.data import Preprocessing, Volume, open_dataset, read_label, read_volume
from fastproto.errors import DatasetError
from fastproto.training.slices import CaseSlices, SliceStore
from fastproto.training.supervoxels import Supervoxels

PREPROCESSING = Preprocessing("ct", image_size=32, mean=-50.0, std=100.0)


def test_slices_are_those_of_the_prepared_volume(phantom: Path):
    dataset = open_dataset(phantom)
    case = dataset.cases[0]
    store = SliceStore.build(dataset, [case], PREPROCESSING)
    prepared = PREPROCESSING.prepare(read_volume(case.image))
    (kept,) = store.cases
    assert kept.numbers == list(range(len(prepared)))
    assert len(kept) == 16
    assert (kept.images.dtype, kept.labels.dtype) == (torch.float16, torch.uint8)
    torch.testing.assert_close(
        kept.images.float(), prepared.images(0, 16)[:, 0], atol=2e-3, rtol=1e-3
    )
    assert torch.equal(kept.labels, prepared.labels(read_label(case.label)))
    assert kept.spacing == (prepared.spacing[0], prepared.pixel_size, prepared.pixel_size)
    assert kept.extent == pytest.approx((prepared.view.side, prepared.view.side))


def test_no_pixel_is_finer_than_the_scans_own(phantom: Path):
    dataset = open_dataset(phantom)
    case = dataset.cases[0]
    fine = dataclasses.replace(PREPROCESSING, image_size=512)
    (kept,) = SliceStore.build(dataset, [case], fine).cases
    native = read_volume(case.image).spacing[0]
    assert kept.images.shape[1] == kept.images.shape[2] <= 64
    assert native * 0.97 < kept.spacing[1] <= native * 1.001


def test_only_wanted_slices_are_kept(phantom: Path):
    dataset = open_dataset(phantom)
    whole = SliceStore.build(dataset, dataset.cases, PREPROCESSING)
    some = SliceStore.build(dataset, dataset.cases, PREPROCESSING, holding=[1], without=[2])
    for before, after in zip(whole.cases, some.cases, strict=True):
        one, two = ((before.labels == label).flatten(1).any(1) for label in (1, 2))
        expected = (one & ~two).nonzero().flatten().tolist()
        assert after.numbers == expected
        assert 0 < len(expected) < len(before.numbers)
        assert torch.equal(after.images, before.images[expected])
        assert torch.equal(after.labels, before.labels[expected])


def test_labels_are_needed_unless_nothing_asks_for_them(phantom: Path):
    dataset = open_dataset(phantom)
    labelled, bare = dataset.cases[0], dataclasses.replace(dataset.cases[1], label=None)
    store = SliceStore.build(dataset, [labelled], PREPROCESSING, labels=False, without=[2])
    assert store.cases[0].labels is None
    assert len(store.cases[0]) < 16
    assert len(SliceStore.build(dataset, [bare], PREPROCESSING, labels=False).cases[0]) == 16
    for labels, without in ((True, []), (False, [2])):
        with pytest.raises(DatasetError, match=f"case {bare.id}: found no label map"):
            SliceStore.build(dataset, [bare], PREPROCESSING, labels=labels, without=without)
    with pytest.raises(DatasetError, match="no slice that can be used"):
        SliceStore.build(dataset, [labelled], PREPROCESSING, holding=[250])


def test_supervoxels_are_found_in_whole_scans(phantom: Path):
    dataset = open_dataset(phantom)
    seen = {}

    def halves(volumes: Mapping[str, tuple[np.ndarray, object]]) -> dict[str, Supervoxels]:
        """The upper and the lower half of every slice."""
        seen.update(volumes)
        finest = np.ones((16, 32, 32), np.int16)
        finest[:, 16:] = 2
        found = Supervoxels(finest, np.array([[0, 1, 2], [0, 1, 1]], np.int16), (1.0, 2.0))
        return dict.fromkeys(volumes.keys() - {"ct_001"}, found)  # as where none can be found

    store = SliceStore.build(
        dataset, dataset.cases, PREPROCESSING, labels=False, find_regions=halves, without=[2]
    )
    assert [case.id for case in store.cases] == ["ct_000", "ct_002"]
    for case in store.cases:
        image, spacing = seen[case.id]
        assert image.shape == (16, 32, 32)
        assert spacing == case.spacing
        assert len(case.regions) == len(case) < 16
        assert case.region(0, 0).unique().tolist() == [1, 2]
        assert case.region(1, 0).unique().tolist() == [1]


def test_areas_count_the_pixels_of_every_supervoxel(pieces: CaseSlices):
    fine, coarse = pieces.areas
    assert fine.shape == (24, 5)
    assert coarse.shape == (24, 3)
    for position, scale in itertools.product((0, 2, 11, 12, 19, 20), (0, 1)):
        labels = pieces.region(scale, position).flatten()
        areas = pieces.areas[scale][position]
        assert areas.tolist() == torch.bincount(labels, minlength=len(areas)).tolist()


@pytest.mark.parametrize("plane", ["coronal", "sagittal"])
def test_other_planes_look_like_slices_prepared_in_them(plane: str):
    rng = np.random.default_rng(0)
    volume = Volume(rng.random((20, 20, 20), np.float32), spacing=(2.0, 2.0, 2.0))
    labels = torch.from_numpy((volume.array > 0.5).astype(np.uint8))
    axial, other = (
        Preprocessing("mr", image_size=20, crop=False, plane=p).prepare(volume)
        for p in ("axial", plane)
    )
    images = axial.images(0, 20)[:, 0]
    case = CaseSlices("a", list(range(20)), images, labels, (2.0, 2.0, 2.0), labels, np.eye(2))
    first, *rest = case.planes()
    assert first is case
    (view,) = (each for each in rest if each.id == f"a {plane}")
    assert view.upside_down
    assert len(view) == 20
    expected = other.images(0, 20)[:, 0]
    truth = other.labels(dataclasses.replace(volume, array=labels.numpy()))
    for number in range(20):
        assert torch.equal(view.upright(view.images[number]), expected[number])
        assert torch.equal(view.upright(view.labels[number]), truth[number])
        assert torch.equal(view.upright(view.regions[number]), truth[number])


def test_planes_keep_their_spacing_and_need_voxels_that_allow_them():
    def case(spacing: tuple[float, float, float], numbers: list[int]) -> CaseSlices:
        return CaseSlices("a", numbers, torch.zeros(4, 5, 6), None, spacing)

    _, coronal, sagittal = case((2.5, 1.0, 1.5), [0, 1, 2, 3]).planes()
    assert (coronal.images.shape, coronal.spacing) == ((5, 4, 6), (1.0, 2.5, 1.5))
    assert (sagittal.images.shape, sagittal.spacing) == ((6, 4, 5), (1.5, 2.5, 1.0))
    assert coronal.extent == (10.0, 9.0)
    assert len(list(case((2.6, 1.0, 1.5), [0, 1, 2, 3]).planes())) == 1
    assert len(list(case((2.5, 1.0, 1.5), [0, 1, 2, 5]).planes())) == 1
