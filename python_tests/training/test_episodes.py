# SPDX-License-Identifier: Apache-2.0
"""Episodes: right slices, right classes, right fields of view, the same every time."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch

from fastproto.errors import ArgumentError, DatasetError, LabelError
from fastproto.training.augment import Augmentation, Cut
from fastproto.training.episodes import (
    Draw,
    Episode,
    EpisodeSource,
    LabelEpisodes,
    MixedEpisodes,
    SupervoxelEpisodes,
    episode_generator,
    field_of_view,
)
from fastproto.training.slices import CaseSlices, SliceStore

COUNT = 60
SIZE = 32


def labels_source(store: SliceStore, classes: list[int], seed: int = 0, **options) -> LabelEpisodes:
    return LabelEpisodes(store, classes, seed, size=SIZE, **options)


def pieces_source(case: CaseSlices, seed: int = 0, **options) -> SupervoxelEpisodes:
    options = {"same_slice": 0, **options}
    return SupervoxelEpisodes(SliceStore([case]), seed, size=SIZE, **options)


def chance(source: EpisodeSource, what: str, count: int = 400) -> float:
    """How often a description has this part."""
    return sum(what in draw.description for draw in draws(source, count)) / count


def draws(source: EpisodeSource, count: int = COUNT) -> list[Draw]:
    return [source.draw(episode_generator(source.seed, index)) for index in range(count)]


def origin(cut: Cut) -> tuple[int, int]:
    """(patient, position) of a slice of ``store``."""
    return divmod(int(cut.image[0, 0]), 100)


def equal(a: Episode, b: Episode) -> bool:
    pairs = zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def test_an_episode_is_a_function_of_seed_and_index(store: SliceStore, pieces: CaseSlices):
    for make in (
        lambda seed: labels_source(store, [1, 2, 3], seed, augmentation=Augmentation()),
        lambda seed: pieces_source(pieces, seed, augmentation=Augmentation()),
    ):
        first, again = make(0), make(0)
        later = first.episode(7)
        assert equal(first.episode(3), again.episode(3))
        assert equal(again.episode(7), later)
        assert not equal(first.episode(3), later)
        assert not equal(first.episode(3), make(1).episode(3))


def test_generators_of_neighbouring_episodes_differ():
    seeds = {episode_generator(s, i).initial_seed() for s in range(3) for i in range(300)}
    assert len(seeds) == 900


def test_a_batch_is_its_episodes_side_by_side(store: SliceStore):
    options = {"shots": 2, "queries": 2, "names": {1: "liver"}, "augmentation": Augmentation()}
    source = labels_source(store, [1], **options)
    batch = source.batch([4, 9])
    assert re.match(r"episode 4: class 1 \(liver\), support [abc] slice \d", batch.description)
    assert batch.support_images.shape == (2, 2, 3, SIZE, SIZE)
    assert batch.query_masks.shape == (2, 2, SIZE, SIZE)
    assert torch.equal(batch.support_images[:, :, 0], batch.support_images[:, :, 2])
    for i, index in enumerate((4, 9)):
        alone = source.episode(index)
        assert torch.equal(batch.support_images[i], alone.support_images[0])
        assert torch.equal(batch.query_masks[i], alone.query_masks[0])
        assert alone.description in batch.description


class TestFieldOfView:
    @staticmethod
    def drawn(label: torch.Tensor, row: float, column: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Centres and sides of 400 fields of view around a label map."""
        case = CaseSlices("p", [0], torch.zeros(1, *label.shape), None, (3.0, row, column))
        views = [field_of_view(case, label, episode_generator(0, i)) for i in range(400)]
        return torch.tensor([centre for centre, _ in views]), torch.tensor([s for _, s in views])

    def test_sides_are_two_to_eight_diameters(self):
        label = torch.zeros(400, 300, dtype=torch.uint8)
        label[100:160, 50:80] = 1  # 60 mm by 60 mm
        diameter = 2 * math.sqrt(60 * 60 / math.pi)
        centres, sides = self.drawn(label, 1.0, 2.0)
        assert 2 * diameter <= sides.min() < 2.05 * diameter
        assert 7.8 * diameter < sides.max() <= 8 * diameter
        # as often from two to four diameters as from four to eight
        assert (sides < 4 * diameter).float().mean() == pytest.approx(0.5, abs=0.08)
        away = (centres - torch.tensor([130.0, 130.0])) / sides[:, None]
        assert -0.25 - 1e-5 <= away.min() < -0.24
        assert 0.24 < away.max() <= 0.25 + 1e-5

    def test_sides_have_24_stored_pixels_at_least_and_a_tenth_more_than_the_slice_at_most(self):
        dot = torch.zeros(400, 300, dtype=torch.uint8)
        dot[100, 50] = 1
        assert self.drawn(dot, 1.0, 2.0)[1].unique().tolist() == [24 * 2.0]
        full = torch.ones(100, 50, dtype=torch.uint8)
        assert self.drawn(full, 1.0, 1.5)[1].tolist() == pytest.approx([110.0] * 400)

    def test_without_foreground_it_lies_in_the_middle(self):
        centres, sides = self.drawn(torch.zeros(100, 60, dtype=torch.uint8), 1.0, 1.5)
        assert (centres - torch.tensor([50.0, 45.0])).abs().max() <= 0.25 * sides.max()

    def test_views_of_an_episode_share_scale_and_nearly_place_and_hardly_leave_the_slice(
        self, pieces: CaseSlices
    ):
        for draw in draws(pieces_source(pieces, shots=2, queries=2, planes=False)):
            (side,) = {cut.side for cut in draw.cuts}
            assert {cut.extent for cut in draw.cuts} == {(80.0, 64.0)}
            centres = np.array([cut.centre for cut in draw.cuts])
            assert np.abs(centres - centres[0]).max() <= 2 * 0.1 * side + 1e-4
            low, high = np.sort([[side / 2, side / 2], [80 - side / 2, 64 - side / 2]], axis=0)
            assert np.array_equal(centres.clip(low - 1e-3, high + 1e-3), centres)


class TestLabelEpisodes:
    def test_support_and_query_are_of_different_patients_where_there_are_two(
        self, store: SliceStore
    ):
        seen = set()
        for draw in draws(labels_source(store, [1, 2, 3])):
            support, query = draw.cuts
            (patient, position), (other, query_position) = origin(support), origin(query)
            label = int(draw.description.split("class ")[1].split(",")[0])
            seen.add((label, patient, other))
            assert (patient == other == 2) == (label == 3)
            assert position != query_position or patient != other
            # a slice of the class, and its mask is that class and nothing else
            assert position in range(label, label + 8)
            expected = store.cases[patient].labels[position] == label
            assert torch.equal(support.label, expected.to(torch.uint8))
        assert {label for label, _, _ in seen} == {1, 2, 3}
        others = set(itertools.permutations(range(3), 2))
        assert {(a, b) for _, a, b in seen} == others | {(2, 2)}

    def test_the_class_is_in_the_field_of_view(self, store: SliceStore):
        episodes = labels_source(store, [1, 2, 3]).batch(range(COUNT))
        for masks in (episodes.support_masks, episodes.query_masks):
            assert masks.eq(1).flatten(1).sum(1).min() > 10

    def test_query_lies_within_a_sixth_of_the_extent(self, store: SliceStore):
        pairs = [map(origin, draw.cuts) for draw in draws(labels_source(store, [1]))]
        distances = [abs(position - other) for (_, position), (_, other) in pairs]
        assert max(distances) <= 8 / 6 + 1
        assert len(set(distances)) > 1

    def test_shots_are_spread_over_the_extent(self, store: SliceStore):
        for draw in draws(labels_source(store, [1], shots=4), 10):
            positions = [origin(cut)[1] for cut in draw.cuts[:4]]
            assert [(position - 1) // 2 for position in positions] == [0, 1, 2, 3]

    def test_more_ways_share_the_support_patient(self, store: SliceStore):
        source = labels_source(store, [1, 2, 3], ways=3, shots=2, queries=3)
        for draw in draws(source, 10):
            support, query = draw.cuts[:6], draw.cuts[6:]
            assert {origin(cut)[0] for cut in support} == {2}
            assert torch.stack([cut.label for cut in support]).unique().tolist() == [0, 1, 2, 3]
            assert len(query) == 3
            assert any((cut.label == 1).any() for cut in query)
        assert source.episode(0).num_classes == 4

    def test_ways_are_renumbered_in_the_order_of_the_description(self, store: SliceStore):
        orders = set()
        for draw in draws(labels_source(store, [1, 2], ways=2), 20):
            chosen = draw.description.split("class ")[1].split(", support")[0]
            orders.add(chosen)
            patient, position = origin(draw.cuts[0])
            labels = store.cases[patient].labels[position]
            expected = torch.zeros_like(labels)
            for number, label in enumerate(map(int, chosen.split(", ")), start=1):
                expected[labels == label] = number
            assert torch.equal(draw.cuts[0].label, expected)
        assert orders == {"1, 2", "2, 1"}

    def test_held_out_classes_are_never_foreground(self, store: SliceStore):
        with pytest.raises(ArgumentError, match="held out"):
            labels_source(store, [1, 2], excluded=[2])
        for draw in draws(labels_source(store, [1, 3], excluded=[2])):
            for cut in draw.cuts:
                patient, position = origin(cut)
                assert not cut.label[store.cases[patient].labels[position] == 2].any()

    def test_classes_without_slices_enough_are_left_out(self, store: SliceStore):
        assert labels_source(store, [1, 4]).classes == [1]
        assert labels_source(store, [1, 3], shots=8).classes == [1]
        with pytest.raises(LabelError, match="too few slices with 30 pixels of 4;"):
            labels_source(store, [4])
        with pytest.raises(LabelError, match="81 pixels"):
            labels_source(store, [1, 2], min_pixels=81)
        assert labels_source(store, [1, 2], min_pixels=80).classes == [1, 2]

    def test_arguments_are_checked(self, store: SliceStore, pieces: CaseSlices):
        with pytest.raises(ArgumentError, match="at most 3"):
            labels_source(store, [1, 2, 3], ways=4)
        with pytest.raises(ArgumentError, match="shots: "):
            labels_source(store, [1], shots=0)
        with pytest.raises(ArgumentError, match="foreground labels"):
            labels_source(store, [0, 1])
        with pytest.raises(DatasetError, match="slices without labels"):
            labels_source(SliceStore([pieces]), [1])


def parse(draw: Draw) -> tuple[int, int, list[int], list[int]]:
    """Supervoxel, scale, support and query slices of the description; one way."""
    pattern = r"supervoxel (\d+) of (\d+), support .* slice ([\d, ]+), query .* slice ([\d, ]+)"
    number, scale, *slices = re.fullmatch(pattern, draw.description).groups()
    return int(number), int(scale), *([int(n) for n in part.split(", ")] for part in slices)


def set_of_steps(source: SupervoxelEpisodes, count: int = COUNT) -> set[int]:
    """Slices from the support to the query, over some episodes."""
    parsed = map(parse, draws(source, count))
    return {query - support for *_, (support,), (query,) in parsed}


class TestSupervoxelEpisodes:
    def test_every_supervoxel_is_drawn_in_every_slice_that_shows_it(self, pieces: CaseSlices):
        source = pieces_source(pieces, planes=False)
        drawn = Counter()
        for draw in draws(source, 3000):
            number, scale, (support,), (query,) = parse(draw)
            drawn[scale, number, support] += 1
            for cut, position in zip(draw.cuts, (support, query), strict=True):
                expected = pieces.region(scale, position) == number
                assert torch.equal(cut.label, expected.to(torch.uint8))
                assert cut.image.eq(position).all()
        extents = {1: (2, 20), 2: (2, 20), 3: (2, 12), 4: (12, 20)}
        expected = {(0, n, z) for n, extent in extents.items() for z in range(*extent)}
        expected |= {(1, n, z) for n in (1, 2) for z in range(2, 20)}
        assert drawn.keys() == expected
        # Scales are drawn alike, and so are the supervoxels of one.
        share = Counter()
        for (scale, number, _), count in drawn.items():
            share[scale, number] += count / 3000
        assert [share[0, n] for n in range(1, 5)] == pytest.approx([1 / 8] * 4, abs=0.03)
        assert [share[1, n] for n in (1, 2)] == pytest.approx([1 / 4] * 2, abs=0.03)

    def test_a_slice_that_hardly_shows_it_is_no_support(self, pieces: CaseSlices):
        assert pieces.regions is not None
        pieces.regions[19, 4:20, 4:16] = 0
        pieces.regions[19, 4:10, 4:13] = 1  # 54 of 192 pixels, 0.28
        pieces.regions[18, 4:20, 4:16] = 0
        pieces.regions[18, 4:10, 4:14] = 1  # 60 pixels, 0.31
        seen = set()
        for draw in draws(pieces_source(pieces, planes=False, absent=0), 1500):
            number, scale, support, query = parse(draw)
            if (number, scale) == (1, 0):
                seen |= {*support, *query}
        assert 18 in seen
        assert 19 not in seen

    @pytest.mark.parametrize(
        ("spacing", "gap", "reach"),
        [(4.0, 10.0, 2), (4.0, 12.0, 3), (2.0, 10.0, 5), (9.0, 10.0, 2)],
    )
    def test_support_and_query_lie_within_the_gap_or_two_slices(
        self, pieces: CaseSlices, spacing: float, gap: float, reach: int
    ):
        case = dataclasses.replace(pieces, spacing=(spacing, 2.0, 2.0))
        steps = set_of_steps(pieces_source(case, planes=False, absent=0, gap=gap), 300)
        assert steps == set(range(-reach, reach + 1)) - {0}

    def test_distances_are_those_of_the_scan_where_slices_were_dropped(self, pieces: CaseSlices):
        case = pieces.only(torch.arange(24) % 3 == 0)  # 12 mm between those that are left
        assert set_of_steps(pieces_source(case, absent=0)) == {0}
        assert set_of_steps(pieces_source(case, absent=0, gap=12.0)) == {-3, 3}

    @pytest.mark.parametrize("absent", [0.0, 0.4, 1.0])
    def test_a_share_of_the_queries_is_any_slice_of_the_scan(
        self, pieces: CaseSlices, absent: float
    ):
        far, without = [], []
        for draw in draws(pieces_source(pieces, planes=False, absent=absent, queries=2), 500):
            _, _, (support,), queries = parse(draw)
            far += [abs(query - support) > 2 for query in queries]
            without += [not cut.label.any() for cut in draw.cuts[1:]]
        # Of 24 slices some 20 are further than two slices away.
        assert np.mean(far) == pytest.approx(absent * 19.5 / 24, abs=0.05)
        assert np.mean(without) > 0.3 or absent < 1
        assert not any(without) or absent > 0

    @pytest.mark.parametrize("same", [0.0, 0.3, 1.0])
    def test_a_share_of_the_others_is_the_support_slice(self, pieces: CaseSlices, same: float):
        source = pieces_source(pieces, planes=False, absent=0, same_slice=same)
        found = [support == query for *_, (support,), (query,) in map(parse, draws(source, 500))]
        assert np.mean(found) == pytest.approx(same, abs=0.07)

    def test_clouds_of_pixels_are_not_drawn(self, pieces: CaseSlices):
        assert pieces.regions is not None
        scattered = torch.rand(24, 16, 12, generator=episode_generator(0, 0)) < 0.5
        pieces.regions[:, 4:20, 4:16][scattered] = 2  # supervoxel 1 is a cloud now
        drawn = {parse(draw)[:2] for draw in draws(pieces_source(pieces, planes=False), 400)}
        assert (1, 0) not in drawn
        assert {(3, 0), (4, 0), (1, 1), (2, 1)} <= drawn

    def test_supervoxels_of_dropped_slices_are_not_drawn(self, pieces: CaseSlices):
        case = pieces.only(torch.arange(24) < 12)  # without any of supervoxel 4
        for draw in draws(pieces_source(case, planes=False), 200):
            assert parse(draw)[:2] != (4, 0)
            assert draw.cuts[0].label.any()

    def test_more_shots_and_ways(self, pieces: CaseSlices):
        source = pieces_source(pieces, planes=False, ways=2, shots=2, absent=0)
        for draw in draws(source, 30):
            what = draw.description.removeprefix("supervoxel ").split(" of ")[0]
            assert len(set(what.split(", "))) == 2
            assert draw.cuts[0].label.unique().tolist() == [0, 1, 2]
            positions = [int(cut.image[0, 0]) for cut in draw.cuts]
            assert len(positions) == 5
            assert all(abs(p - positions[0]) <= 2 for p in positions)
        episode = source.episode(0)
        assert episode.support_masks.shape == (1, 4, SIZE, SIZE)
        assert episode.num_classes == 3

    def test_too_few_supervoxels_are_an_error(self, pieces: CaseSlices):
        with pytest.raises(DatasetError, match="fewer than 50"):
            pieces_source(pieces, ways=50).episode(0)
        empty = dataclasses.replace(
            pieces, regions=torch.zeros_like(pieces.regions), parents=np.zeros((1, 1), np.int16)
        )
        with pytest.raises(DatasetError, match="1000 slices in a row"):
            pieces_source(empty).episode(0)

    def test_support_and_query_are_augmented_differently(self, pieces: CaseSlices):
        single = pieces.only(torch.arange(24) == 5)
        support, query = pieces_source(single, absent=0).draw(episode_generator(0, 0)).cuts
        assert torch.equal(support.label, query.label)
        assert support.centre != query.centre
        episode = pieces_source(single, absent=0, augmentation=Augmentation()).episode(0)
        assert not torch.equal(episode.support_images, episode.query_images)
        assert not torch.equal(episode.support_masks, episode.query_masks)

    def test_all_planes_are_drawn_upright(self):
        """A patient whose head is bright: in the other planes it is on top."""
        images = torch.arange(30.0).view(30, 1, 1).expand(30, 30, 30).half()
        regions = torch.zeros(30, 30, 30, dtype=torch.int16)
        regions[4:26, 4:26, 4:26] = 1
        regions[20:26, 4:26, 4:26] = 2
        parents = np.array([[0, 1, 2]], np.int16)
        case = CaseSlices("p", list(range(30)), images, None, (2.0, 2.0, 2.0), regions, parents)
        planes = Counter()
        for draw in draws(pieces_source(case, absent=0), 300):
            plane = draw.description.split("support p ")[1].split(" ")[0].replace("slice", "axial")
            planes[plane] += 1
            for cut in draw.cuts if plane != "axial" else ():
                assert cut.image[0, 0] == 29
                assert cut.image[-1, 0] == 0
                # the supervoxel in the head is on top, and within the field of view
                row = (cut.label == 1).any(dim=1).nonzero().float().mean() * 2
                assert (row < 20) == draw.description.startswith("supervoxel 2")
                assert abs(row - cut.centre[0]) <= 0.5 * cut.side + 1
        assert planes.keys() == {"axial", "coronal", "sagittal"}
        assert min(planes.values()) > 300 / 3 * 0.7
        assert chance(pieces_source(case, planes=False), "al slice", COUNT) == 0

    def test_a_case_with_three_planes_is_drawn_as_often_as_one_with_one(self, pieces: CaseSlices):
        thick = dataclasses.replace(pieces, id="thick", spacing=(8.0, 2.0, 2.0))
        source = SupervoxelEpisodes(SliceStore([pieces, thick]), 0, size=SIZE)
        assert chance(source, "support thick") == pytest.approx(0.5, abs=0.07)


def test_mixed_episodes_come_from_all_by_their_weights(store: SliceStore, pieces: CaseSlices):
    labels = labels_source(store, [1, 2], 5, queries=2, augmentation=Augmentation())
    regions = pieces_source(pieces, 5, queries=2, augmentation=Augmentation())
    mixed = MixedEpisodes([labels, regions], [3.0, 1.0])
    assert chance(mixed, "supervoxel") == pytest.approx(0.25, abs=0.06)
    for name in ("seed", "size", "shots", "ways", "queries", "augmentation", "device"):
        assert getattr(mixed, name) == getattr(labels, name), name
    assert mixed.batch(range(4)).query_images.shape == (4, 2, 3, SIZE, SIZE)
    assert chance(MixedEpisodes([labels, regions], [0.0, 2.0]), "supervoxel", COUNT) == 1
