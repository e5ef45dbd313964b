# SPDX-License-Identifier: Apache-2.0
"""Episodes: right slices, right classes, the same every time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastproto.errors import ArgumentError, DatasetError, LabelError
from fastproto.training.augment import Augmentation
from fastproto.training.episodes import (
    Episode,
    LabelEpisodes,
    MixedEpisodes,
    SuperpixelEpisodes,
    episode_generator,
)
from fastproto.training.slices import CaseSlices, SliceStore

COUNT = 60


def origins(images: torch.Tensor) -> list[tuple[int, int]]:
    """(patient, position) of each slice of an unaugmented [1, n, 3, H, W]."""
    values = images[0, :, 0, 0, 0].int().tolist()
    return [divmod(value, 100) for value in values]


def equal(a: Episode, b: Episode) -> bool:
    pairs = zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@pytest.fixture
def textured() -> SliceStore:
    """One patient whose slices hold a body of four tissues, growing slice by slice, and noise."""
    generator = torch.Generator().manual_seed(0)
    images = 0.01 * torch.randn(6, 64, 64, generator=generator)
    for i in range(1, 6):
        images[i, 8:32, 8 : 30 + i] += 1
        images[i, 8:32, 30 + i : 56] += 2
        images[i, 32:56, 8 : 30 + i] += 3
        images[i, 32:56, 30 + i : 56] += 4
    return SliceStore([CaseSlices("p", list(range(6)), images.half(), None, threshold=0.5)])


def test_an_episode_is_a_function_of_seed_and_index(store: SliceStore):
    def source(seed: int) -> LabelEpisodes:
        return LabelEpisodes(store, [1, 2, 3], seed, augmentation=Augmentation())

    first, again, other = source(0), source(0), source(1)
    later = first.episode(7)
    for index in (3, 7):
        assert equal(first.episode(index), again.episode(index))
    assert equal(first.episode(7), later)
    assert not equal(first.episode(3), first.episode(7))
    assert not equal(first.episode(3), other.episode(3))


def test_generators_of_neighbouring_episodes_differ():
    seeds = {episode_generator(s, i).initial_seed() for s in range(3) for i in range(300)}
    assert len(seeds) == 900


def test_a_batch_is_its_episodes_side_by_side(store: SliceStore):
    source = LabelEpisodes(store, [1, 2], 0, shots=2, queries=2, augmentation=Augmentation())
    batch = source.batch([4, 9])
    assert batch.support_images.shape == (2, 2, 3, 48, 48)
    assert batch.query_masks.shape == (2, 2, 48, 48)
    for i, index in enumerate((4, 9)):
        alone = source.episode(index)
        assert torch.equal(batch.support_images[i], alone.support_images[0])
        assert torch.equal(batch.query_masks[i], alone.query_masks[0])
        assert alone.description in batch.description


def test_support_and_query_are_of_different_patients_where_there_are_two(store: SliceStore):
    source = LabelEpisodes(store, [1, 2, 3], 0)
    seen = set()
    for index in range(COUNT):
        episode = source.episode(index)
        ((patient, position),) = origins(episode.support_images)
        ((other, query_position),) = origins(episode.query_images)
        label = int(episode.description.split("class ")[1].split(",")[0])
        seen.add((label, patient, other))
        if label == 3:
            assert (patient, other) == (2, 2)
            assert position != query_position
        else:
            assert patient != other
        # a slice of the class, and its mask is that class and nothing else
        assert position in range(label, label + 8)
        expected = store.cases[patient].labels[position] == label
        assert torch.equal(episode.support_masks[0, 0], expected.long())
    assert len({label for label, _, _ in seen}) == 3
    assert {(a, b) for _, a, b in seen if a != b} == {
        (a, b) for a in range(3) for b in range(3) if a != b
    }


def test_query_lies_within_a_sixth_of_the_extent(store: SliceStore):
    source = LabelEpisodes(store, [1], 0)
    distances = []
    for index in range(COUNT):
        episode = source.episode(index)
        ((_, position),) = origins(episode.support_images)
        ((_, query_position),) = origins(episode.query_images)
        distances.append(abs(position - query_position))
    assert max(distances) <= 8 / 6 + 1
    assert len(set(distances)) > 1


def test_shots_are_spread_over_the_extent(store: SliceStore):
    source = LabelEpisodes(store, [1], 0, shots=4)
    for index in range(10):
        positions = [position for _, position in origins(source.episode(index).support_images)]
        assert [(position - 1) // 2 for position in positions] == [0, 1, 2, 3]


def test_more_ways_share_the_support_patient(store: SliceStore):
    source = LabelEpisodes(store, [1, 2, 3], 0, ways=3, shots=2, queries=3)
    for index in range(10):
        episode = source.episode(index)
        assert episode.num_classes == 4
        assert episode.support_images.shape[1] == 6
        assert {patient for patient, _ in origins(episode.support_images)} == {2}
        assert episode.support_masks.unique().tolist() == [0, 1, 2, 3]
        assert 1 in episode.query_masks


def test_ways_are_renumbered_in_the_order_of_the_description(store: SliceStore):
    source = LabelEpisodes(store, [1, 2], 0, ways=2)
    orders = set()
    for index in range(20):
        episode = source.episode(index)
        chosen = episode.description.split("class ")[1].split(", support")[0]
        orders.add(chosen)
        (patient, position), _ = origins(episode.support_images)
        labels = store.cases[patient].labels[position].long()
        expected = torch.zeros_like(labels)
        for number, label in enumerate(map(int, chosen.split(", ")), start=1):
            expected[labels == label] = number
        assert torch.equal(episode.support_masks[0, 0], expected)
    assert orders == {"1, 2", "2, 1"}


def test_held_out_classes_are_never_foreground(store: SliceStore):
    with pytest.raises(ArgumentError, match="held out"):
        LabelEpisodes(store, [1, 2], 0, excluded=[2])
    source = LabelEpisodes(store, [1, 3], 0, excluded=[2])
    for index in range(COUNT):
        episode = source.episode(index)
        for masks, images in (
            (episode.support_masks, episode.support_images),
            (episode.query_masks, episode.query_images),
        ):
            ((patient, position),) = origins(images)
            held_out = store.cases[patient].labels[position] == 2
            assert not masks[0, 0][held_out].any()


def test_classes_without_slices_enough_are_left_out(store: SliceStore):
    assert LabelEpisodes(store, [1, 4], 0).classes == [1]
    assert LabelEpisodes(store, [1, 3], 0, shots=8).classes == [1]
    with pytest.raises(LabelError, match="none of"):
        LabelEpisodes(store, [4], 0)
    with pytest.raises(LabelError, match="81 pixels"):
        LabelEpisodes(store, [1, 2], 0, min_pixels=81)
    assert LabelEpisodes(store, [1, 2], 0, min_pixels=80).classes == [1, 2]


def test_arguments_are_checked(store: SliceStore):
    with pytest.raises(ArgumentError, match="at most 3"):
        LabelEpisodes(store, [1, 2, 3], 0, ways=4)
    with pytest.raises(ArgumentError, match="shots: "):
        LabelEpisodes(store, [1], 0, shots=0)
    with pytest.raises(ArgumentError, match="foreground labels"):
        LabelEpisodes(store, [0, 1], 0)
    with pytest.raises(ArgumentError, match="source: "):
        SuperpixelEpisodes(store, 0, source="volume")


def test_names_and_slice_numbers_are_in_the_description(store: SliceStore):
    description = LabelEpisodes(store, [1], 0, names={1: "liver"}).episode(0).description
    assert description.startswith("episode 0: class 1 (liver), support ")
    assert " slice " in description


def test_every_superpixel_is_drawn_and_the_empty_slice_never(textured: SliceStore):
    source = SuperpixelEpisodes(textured, 0)
    case = textured.cases[0]
    drawn = set()
    for index in range(1500):
        draw = source.draw(episode_generator(0, index))
        number, position = (
            int(draw.description.split(word)[1].split(",")[0]) for word in ("superpixel ", "slice ")
        )
        drawn.add((position, number))
        expected = (case.superpixels(position) == number).to(torch.uint8)
        assert torch.equal(draw.labels, torch.stack([expected, expected]))
    assert drawn == {
        (position, number)
        for position in range(1, 6)
        for number in range(1, int(case.superpixels(position).max()) + 1)
    }
    assert not case.superpixels(0).any()


def test_support_and_query_of_one_slice_are_augmented_differently(textured: SliceStore):
    episode = SuperpixelEpisodes(textured, 0, augmentation=Augmentation()).episode(0)
    assert not torch.equal(episode.support_images, episode.query_images)
    assert not torch.equal(episode.support_masks, episode.query_masks)


def test_neighbours_are_one_supervoxel(textured: SliceStore):
    source = SuperpixelEpisodes(textured, 0, source="neighbours", ways=2)
    steps = set()
    for index in range(COUNT):
        episode = source.episode(index)
        support, query = (
            int(part.split("slice ")[1]) for part in episode.description.split(", query ")
        )
        steps.add(query - support)
        for label in (1, 2):
            mine = episode.support_masks[0, 0] == label
            theirs = episode.query_masks[0, 0] == label
            assert (mine & theirs).sum() / (mine | theirs).sum() > 0.5
    assert steps == {-1, 1}


def test_slices_that_are_not_adjacent_are_no_neighbours(textured: SliceStore):
    textured.cases[0].numbers = [0, 2, 4, 6, 8, 10]
    with pytest.raises(DatasetError, match="100 slices in a row"):
        SuperpixelEpisodes(textured, 0, source="neighbours").episode(0)
    with pytest.raises(DatasetError, match="fewer than 50"):
        SuperpixelEpisodes(textured, 0, ways=50).episode(0)


def test_superpixels_are_computed_once(textured: SliceStore):
    case = textured.cases[0]
    assert case.superpixels(3) is case.superpixels(3)


def test_mixed_episodes_come_from_both_in_proportion(store: SliceStore, textured: SliceStore):
    labels = LabelEpisodes(store, [1, 2], 5)
    mixed = MixedEpisodes(labels, SuperpixelEpisodes(textured, 5), 0.25)
    descriptions = [mixed.draw(episode_generator(5, i)).description for i in range(200)]
    share = sum("superpixel" in text for text in descriptions) / 200
    assert 0.15 < share < 0.35
    assert MixedEpisodes(labels, labels, 0.0).seed == 5
