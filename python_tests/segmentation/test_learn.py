# SPDX-License-Identifier: Apache-2.0
"""Learning from one annotated scan: names, slices, fields of view, self-check, adaptation."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastproto.data import Preprocessing, Volume
from fastproto.errors import (
    ArgumentError,
    CheckpointError,
    FastprotoWarning,
    GeometryError,
    LabelError,
    VolumeError,
)
from fastproto.segmentation import Task, learn, register, segment_volume
from fastproto.segmentation.adapt import AnnotatedEpisodes, adapt_model
from fastproto.segmentation.learn import AUTO_STEPS, _fit_bias, annotate
from fastproto.segmentation.slices import split, spread
from fastproto.training.episodes import episode_generator

NAMES = {7: "spleen", 300: "tumour"}


def draw_in(scan, preprocessing, value=7, slices=12):
    image, label = scan
    return annotate(preprocessing.prepare(image), label, value, NAMES[value], slices)


def same_prototypes(one: Task, other: Task) -> bool:
    pairs = zip(one.organs, other.organs, strict=True)
    return all(torch.equal(a.prototypes.protos, b.prototypes.protos) for a, b in pairs)


class TestLabels:
    def test_every_organ_and_its_surroundings(self, task):
        assert task.labels == NAMES
        for organ in task.organs:
            assert organ.prototypes.num_classes == 2
            assert organ.prototypes.episodes == len(organ.slices)
            counts = np.array(organ.prototypes.counts())
            assert counts[:, 0].all()
            assert counts[:, 1].any()

    def test_unchosen_labels_are_background(self, teach, scan):
        image, label = scan
        task = teach(image, label, classes=[7])
        assert task.labels == {7: "spleen"}
        alone = replace(label, array=np.where(label.array == 7, label.array, 0))
        assert same_prototypes(task, teach(image, alone, classes=[7]))

    def test_the_models_own_preprocessing_and_labels_that_nobody_named(
        self, grey_model, scan, preprocessing
    ):
        with pytest.raises(CheckpointError, match="preprocessing"):
            register(grey_model, *scan)
        grey_model.extra = {"preprocessing": {"mr": preprocessing.to_dict()}}
        task = register(grey_model, *scan)
        assert task.preprocessing == preprocessing
        assert task.labels == {7: "label 7", 300: "label 300"}
        ct = Preprocessing("ct", image_size=64, mean=0.0, std=1.0)
        grey_model.extra = {"preprocessing": {"ct": ct.to_dict()}}
        with pytest.raises(VolumeError, match=r"none of them of air or fat.*Hounsfield"):
            register(grey_model, *scan)
        with pytest.warns(FastprotoWarning, match="as forced"):
            assert register(grey_model, *scan, force=True).preprocessing == ct
        image, label = scan
        hounsfield = replace(image, array=10.4 * image.array - 1000)  # air, and water at 40
        assert register(grey_model, hounsfield, label).preprocessing == ct

    def test_a_mask_in_other_axes(self, teach, scan, task, reorient):
        image, label = scan
        assert same_prototypes(task, teach(image, reorient(label, "PSR")))

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"labels": {7: "spleen"}}, LabelError, "unknown labels 300"),
            ({"labels": {5: "liver"}, "classes": [5]}, LabelError, "no voxel of label 5"),
            ({"slices": 0}, ArgumentError, "slices"),
            *(({"adapt": steps}, ArgumentError, "adapt") for steps in (-1, 1.5, "much", None)),
            *(
                ({"slices": numbers}, ArgumentError, r"slices.*'spleen' among them: 2, 3, 4, 5")
                for numbers in ([0, 1, 9], [5, 10], [-1, 5], [])
            ),
        ],
        ids=str,
    )
    def test_options_that_cannot_be_used(self, teach, scan, options, error, words):
        with pytest.raises(error, match=words):
            teach(*scan, **options)

    def test_masks_that_cannot_be_used(self, teach, scan, preprocessing):
        image, label = scan
        nothing = np.zeros_like(label.array)
        with pytest.raises(LabelError, match="empty label map"):
            teach(image, replace(label, array=nothing))
        with pytest.raises(GeometryError):
            teach(image, replace(label, origin=(0.0, 0.0, 0.0)))
        thin = nothing.copy()
        thin[5, 20, ::2] = 7  # between the rows of the network's image
        coarse = replace(preprocessing, image_size=4)
        with pytest.raises(LabelError, match="vanishes at 4 pixels"):
            teach(image, replace(label, array=thin), preprocessing=coarse)


@pytest.mark.parametrize(
    ("shape", "boxes", "side", "centre"),
    [
        # 10 pixels of 1.5 mm and a margin of 30 mm
        ((200, 200), [np.s_[2:4, 95:105, 95:105]], 10 * 1.5 + 60, (99.5, 99.5)),
        # four diameters of the largest slice
        (
            (200, 200),
            [np.s_[2:4, 80:120, 80:120], np.s_[4:5, 80:90, 80:120]],
            4 * 2 * math.sqrt(60 * 60 / math.pi),
            (99.5, 99.5),
        ),
        # no more than is seen without an organ
        ((200, 200), [np.s_[2:4, 50:150, 50:150]], 300.0, (99.5, 99.5)),
        ((40, 30), [np.s_[2:3, 20:24, 9:13], np.s_[3:4, 18:23, 10:14]], 60.0, (20.5, 11.0)),
    ],
)
def test_the_field_of_view_is_around_the_organ(preprocessing, shape, boxes, side, centre):
    label = np.zeros((6, *shape), np.uint8)
    for box in boxes:
        label[box] = 7
    volume, mask = (Volume(each, (1.5, 1.5, 4.0)) for each in (label.astype(np.float32), label))
    organ = draw_in((volume, mask), preprocessing)
    view = organ.view.view
    assert view.side == pytest.approx(side, rel=1e-6)
    assert (view.row, view.column) == pytest.approx(centre)
    assert torch.equal(organ.masks, organ.view.labels(mask) == 7)


class TestSlices:
    def test_spread_takes_the_middles_of_equal_parts(self):
        assert spread(np.arange(10, 90), 4) == [20, 40, 60, 80]
        assert spread(np.arange(10, 90), 1) == [50]
        assert spread(np.array([3, 4, 9]), 5) == [3, 4, 9]

    @given(st.sets(st.integers(0, 60), min_size=1), st.integers(1, 12))
    def test_spread_properties(self, present, number):
        chosen = spread(np.array(sorted(present)), number)
        assert chosen == sorted(set(chosen))
        assert set(chosen) <= present
        assert len(chosen) == min(number, len(present))

    def test_slices_beyond_the_ends_come_on_top_unless_there_are_numbers(self, preprocessing, make):
        scan = make(0, 20)
        organ = draw_in(scan, preprocessing, slices=3)  # in slices 2 to 8
        assert organ.inside == [3, 5, 7]
        assert organ.slices == (0, 3, 5, 7, 10, 12)  # each two slices from the next; none at -2
        tumour = draw_in(scan, preprocessing, value=300)  # in slices 4 and 5
        assert tumour.slices == (2, 3, 4, 5, 6, 7)
        organ = draw_in(scan, preprocessing, slices=[9, 5, 3, 5])
        assert organ.slices == (3, 5, 9)
        assert organ.inside == [3, 5]

    def test_a_region_is_the_organ_and_what_lies_within_30_mm(self, preprocessing, make):
        organ = draw_in(make(0, 30), preprocessing, slices=3)  # 2 to 8, of 4 mm
        assert organ.slices == (0, 3, 5, 7, 10, 12)
        assert organ.region == [0, 1, 3, 5, 7, *range(9, 17)]  # no slice that was left out


class TestSelfCheck:
    def test_every_third_slice_between_the_first_and_the_last_is_left_out(
        self, preprocessing, scan
    ):
        organ = draw_in(scan, preprocessing)
        assert organ.inside == [2, 3, 4, 5, 6, 7, 8]
        assert split(organ) == ((0, 1, 2, 4, 5, 7, 8, 9), (3, 6))
        few = draw_in(scan, preprocessing, slices=3)
        assert split(few) == (few.slices, ())

    def test_organs_that_are_clear_that_look_like_all_else_and_without_slices_to_spare(
        self, task, teach, scan
    ):
        spleen, tumour = task.organs
        assert spleen.expected_dice > 0.95
        assert spleen.slices == tuple(range(10))  # what was left out teaches in the end
        assert tumour.expected_dice is None
        assert tumour.bias == 0
        image, label = scan
        noise = np.random.default_rng(0).normal(0, 1, image.array.shape).astype(np.float32)
        assert teach(replace(image, array=noise), label).organs[0].expected_dice < 0.7

    @pytest.mark.parametrize("shift", [0.0, -2.5, 3.25])
    def test_the_bias_undoes_a_shift(self, shift):
        truth = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.3
        assert _fit_bias(torch.where(truth, 0.1, -0.1) + shift, truth) == (-shift, 1.0)

    def test_of_equal_biases_the_smallest_is_taken(self):
        truth = torch.tensor([[[True, True, False]]])
        assert _fit_bias(torch.tensor([[[3.0, 3.0, -3.0]]]), truth) == (0.0, 1.0)
        assert _fit_bias(torch.tensor([[[3.0, -1.0, -3.0]]]), truth) == (1.25, 1.0)


class TestAdaptation:
    @pytest.fixture
    def small(self) -> Preprocessing:
        return Preprocessing("mr", image_size=32, crop=False)

    def test_it_is_a_function_of_the_seed(self, network, scan, small):
        organs = [draw_in(scan, small, value) for value in NAMES]
        calls = []
        one, again, other = (
            adapt_model(network, organs, 2, seed=seed, progress=lambda *c: calls.append(c))[1]
            for seed in (0, 0, 1)
        )
        assert one.keys() == again.keys()
        assert all(torch.equal(one[name], again[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)
        assert [call[:2] for call in calls] == [(1, 2), (2, 2)] * 3
        assert all(math.isfinite(loss) and loss > 0 for _, _, loss in calls)

    @pytest.mark.parametrize(("parts", "prefix"), [("decoder", "decoder."), ("all", "")])
    def test_only_some_weights_change(self, network, scan, small, parts, prefix):
        before = {name: value.clone() for name, value in network.state_dict().items()}
        adapted, weights = adapt_model(network, [draw_in(scan, small)], 1, parts=parts)
        assert not adapted.training
        changed = set()
        for name, value in adapted.state_dict().items():
            assert torch.equal(network.state_dict()[name], before[name]), name  # it stays as it is
            if not torch.equal(value, before[name]):
                changed.add(name)
        assert changed
        assert changed <= weights.keys()  # the statistics of normalisation stay
        parameters = dict(network.named_parameters())
        assert weights.keys() == {name for name in parameters if name.startswith(prefix)}
        assert {value.dtype for value in weights.values()} == {torch.float16}

    def test_it_goes_through_the_file(self, network, scan, small, tmp_path, monkeypatch):
        dice = iter([0.9, 0.1])  # afterwards and before
        monkeypatch.setattr(learn, "_expected", lambda organs: next(dice))
        task = register(network, *scan, labels=NAMES, preprocessing=small, adapt=2, prior="box")
        assert task.adapted_steps == 2
        assert task.weights
        assert task.fingerprint == network.fingerprint()
        task.save(tmp_path / "organs.task")
        again = Task.load(tmp_path / "organs.task")
        adapted = again.adapted(network).state_dict()
        for name, value in task.weights.items():
            assert torch.equal(again.weights[name], value)
            assert torch.equal(adapted[name], value.float())
        results = [
            segment_volume(network, t, scan[0], probabilities=True).probabilities[7]
            for t in (task, again, replace(task, weights={}))
        ]
        assert np.array_equal(results[0], results[1])
        assert not np.array_equal(results[0], results[2])

    @pytest.mark.parametrize("better", [True, False])
    def test_it_is_kept_where_it_helps(self, grey_model, scan, preprocessing, monkeypatch, better):
        weights = {"weight": torch.full((1,), 2.0).half()}
        good, bad = grey_model, type(grey_model)()
        bad.segment = lambda images, bags: -good.segment(images, bags)
        before, after = (bad, good) if better else (good, bad)
        seen = []

        def adapt(model, organs, steps, **options):
            assert model is before
            seen.append((steps, [organ.slices for organ in organs]))
            return after, weights

        monkeypatch.setattr(learn, "adapt_model", adapt)
        options = {"preprocessing": preprocessing, "labels": NAMES, "prior": "box"}
        task = register(before, *scan, adapt="auto", **options)
        assert seen == [(AUTO_STEPS["cpu"], [(0, 1, 2, 4, 5, 7, 8, 9), (2, 3, 4, 5, 6, 7)])]
        if better:
            assert (task.weights, task.adapted_steps) == (weights, AUTO_STEPS["cpu"])
            assert task.organs[0].expected_dice > 0.95
        else:
            assert (task.weights, task.adapted_steps) == ({}, 0)
            unadapted = register(before, *scan, **options)
            assert task.organs[0].expected_dice == unadapted.organs[0].expected_dice

    def test_it_is_spared_where_nothing_could_judge_it(self, teach, scan, monkeypatch):
        monkeypatch.setattr(learn, "adapt_model", lambda *_, **__: pytest.fail("adapted"))
        assert teach(*scan, slices=3, adapt=5).adapted_steps == 0

    def test_episodes_show_the_organs_in_a_view_that_moves_and_scales_a_little(
        self, scan, preprocessing
    ):
        organs = [draw_in(scan, preprocessing, value) for value in NAMES]
        source = AnnotatedEpisodes(organs, 0, size=64)
        seen, sides, moves = Counter(), [], []
        away = drawn = 0
        for index in range(300):
            draw = source.draw(episode_generator(0, index))
            name, slices = draw.description.split(", slices ")
            seen[name] += 1
            organ = next(organ for organ in organs if organ.name == name)
            numbers = list(map(int, slices.split(", ")))
            assert len(numbers) == len(draw.cuts) == source.shots + source.queries
            assert set(numbers[: source.shots]) <= set(organ.inside)
            assert set(numbers) <= set(organ.region)
            side = organ.view.view.side
            for cut, number in zip(draw.cuts, numbers, strict=True):
                assert torch.equal(cut.label.bool(), organ.masks[number])
                assert torch.equal(cut.image, organ.view.images(number, number + 1)[0, 0])
                assert cut.extent == (side, side)
                assert cut.side == draw.cuts[0].side
                moves += [place / side - 0.5 for place in cut.centre]
            sides.append(draw.cuts[0].side / side)
            if name == "spleen":  # 3 of its 10 slices are outside
                away += sum(number not in organ.inside for number in numbers[source.shots :])
                drawn += source.queries
        assert seen.keys() == {"spleen", "tumour"}
        assert away / drawn == pytest.approx(0.3 * 3 / 10, abs=0.04)
        assert 0.8 <= min(sides) < 0.82
        assert 1.22 < max(sides) <= 1.25
        assert -0.1 <= min(moves) < -0.095
        assert 0.095 < max(moves) <= 0.1
