# SPDX-License-Identifier: Apache-2.0
"""Voxels of which the annotation says nothing: neither organ nor background."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastproto.data import Preprocessing
from fastproto.defaults import IGNORE
from fastproto.errors import LabelError
from fastproto.segmentation.adapt import AnnotatedEpisodes
from fastproto.segmentation.learn import _fit_bias, annotate, without_gaps
from fastproto.training.episodes import episode_generator

from .conftest import NAMES
from .test_learn import same_prototypes

CT = Preprocessing("ct", image_size=64, mean=50.0, std=50.0, crop=False)


@pytest.fixture
def doubtful(scan):
    """The scan with a part of spleen and background to ignore, and what its image shows there.

    Rows 20 to 39, columns 0 to 12 of all slices but 4 to 6; and all of slices 0 and 1.
    """
    image, label = scan
    part = np.zeros(label.array.shape, bool)
    part[:, 20:40, :13] = True
    part[4:7] = False
    part[:2] = True
    label = replace(label, array=np.where(part, 9, label.array))
    return image, label, part


def test_no_prototype_and_no_score_is_of_them(teach, doubtful):
    """Whatever the image shows there, the same is learned; without ignoring, it is not."""
    image, label, part = doubtful
    core = part.copy()  # pixels of the network's image are means of some voxels
    core[2:] &= np.roll(part, 2, 1)[2:] & np.roll(part, -2, 1)[2:] & np.roll(part, -2, 2)[2:]
    noise = np.random.default_rng(0).uniform(-100, 250, core.shape).astype(np.float32)
    other = replace(image, array=np.where(core, noise, image.array))
    options = {"preprocessing": CT, "ignore": 9, "classes": [7], "force": True}  # no CT's values
    one, two = (teach(each, label, **options) for each in (image, other))
    assert one.organs[0].slices == (2, 3, 4, 5, 6, 7, 8, 9)  # neither 0 nor 1
    assert same_prototypes(one, two)
    assert (one.organs[0].bias, one.organs[0].expected_dice) == (
        two.organs[0].bias,
        two.organs[0].expected_dice,
    )
    options["ignore"] = None
    one, two = (teach(each, label, **options) for each in (image, other))
    assert not same_prototypes(one, two)


def test_episodes_of_the_adaptation(doubtful):
    image, label, _ = doubtful
    organ = annotate(CT.prepare(image), label, 7, "spleen", 12, 9)
    assert not set(organ.region) & {0, 1}
    expected = organ.view.labels(label)
    for number in range(2, 10):
        labels = organ.labels(number)
        assert torch.equal(labels == IGNORE, expected[number] == 9)
        assert torch.equal(labels == 1, organ.masks[number])
    assert organ.ignored[:2].all()  # beyond the border of the slice as well
    seen = set()
    for index in range(50):
        for cut in AnnotatedEpisodes([organ], 0, size=64).draw(episode_generator(0, index)).cuts:
            seen |= set(cut.label.unique().tolist())
    assert seen == {IGNORE, 0, 1}


def test_the_bias_is_that_of_what_counts():
    scores = torch.tensor([-1.0, 1.0, 3.0, 3.0])
    assert _fit_bias(scores, torch.tensor([0, 1, 0, 0]))[1] < 0.7
    bias, dice = _fit_bias(scores, torch.tensor([0, 1, IGNORE, IGNORE]).to(torch.int8))
    assert (bias, dice) == (0, 1)


def test_for_the_place_the_nearest_voxel_that_counts_stands_for_each(teach, scan):
    """Every third slice is annotated; the organ reaches halfway to the next."""
    image, label = scan
    sparse = np.full_like(label.array, 9)
    sparse[::3] = label.array[::3]  # 7 is in slices 2 to 8: seen in 3 and 6, not in 0 and 9
    filled = without_gaps(replace(label, array=sparse), 9)
    where = np.flatnonzero((filled.array == 7).any(axis=(1, 2)))
    assert where.tolist() == [2, 3, 4, 5, 6, 7]
    assert np.array_equal(filled.array[4], label.array[3])
    assert without_gaps(label, 9) is label
    task = teach(image, replace(label, array=sparse), ignore=9)
    whole = teach(image, filled)
    for one, other in zip(task.atlas.maps, whole.atlas.maps, strict=True):
        assert np.array_equal(one.values, other.values)
    assert set(task.organs[0].slices) == {0, 3, 6, 9}


def test_they_are_no_organ(teach, doubtful):
    image, label, _ = doubtful
    assert teach(image, label, ignore=9, labels=None).labels == {
        7: "label 7",
        300: "label 300",
    }
    assert teach(image, label, ignore=9).labels == NAMES  # which do not have it
    with pytest.raises(LabelError, match="no voxel of label 9"):
        teach(image, label, ignore=9, classes=[9])
    empty = replace(label, array=np.where(label.array == 9, 9, 0))
    with pytest.raises(LabelError, match=r"no voxel but those to ignore \(9\)"):
        teach(image, empty, ignore=9)
