# SPDX-License-Identifier: Apache-2.0
"""Learning from one annotated scan: names, slices, fields of view, self-check, adaptation."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastproto.data import Preprocessing
from fastproto.errors import ArgumentError, CheckpointError, GeometryError, LabelError
from fastproto.nn import FewShotUNet
from fastproto.segmentation import Task, learn, register, segment_volume
from fastproto.segmentation.adapt import AnnotatedEpisodes, adapt_model
from fastproto.segmentation.learn import AUTO_STEPS, _fit_bias, annotate
from fastproto.segmentation.slices import split, spread
from fastproto.training.episodes import episode_generator

NAMES = {7: "spleen", 300: "tumour"}


def draw_in(scan, preprocessing, value=7, slices=12):
    image, label = scan
    return annotate(preprocessing.prepare(image), label, value, NAMES[value], slices)


class TestLabels:
    def test_every_organ_and_its_surroundings(self, task):
        assert task.labels == NAMES
        for organ in task.organs:
            assert organ.prototypes.num_classes == 2
            assert organ.prototypes.episodes == len(organ.slices)
            counts = np.array(organ.prototypes.counts())
            assert counts[:, 0].all()
            assert counts[:, 1].any()

    def test_unchosen_labels_are_background(self, grey_model, scan, preprocessing):
        options = {"labels": NAMES, "classes": [7], "preprocessing": preprocessing}
        task = register(grey_model, *scan, **options)
        assert task.labels == {7: "spleen"}
        image, label = scan
        alone = np.where(label.array == 7, label.array, 0)
        other = register(grey_model, image, dataclasses.replace(label, array=alone), **options)
        assert torch.equal(task.organs[0].prototypes.protos, other.organs[0].prototypes.protos)

    def test_labels_are_named_where_nobody_did(self, grey_model, scan, preprocessing):
        task = register(grey_model, *scan, preprocessing=preprocessing)
        assert task.labels == {7: "label 7", 300: "label 300"}

    def test_the_models_own_preprocessing(self, grey_model, scan, preprocessing):
        with pytest.raises(CheckpointError, match="preprocessing"):
            register(grey_model, *scan)
        grey_model.extra = {"preprocessing": {"mr": preprocessing.to_dict()}}
        assert register(grey_model, *scan).preprocessing == preprocessing
        ct = Preprocessing("ct", image_size=64, mean=0.0, std=1.0)
        grey_model.extra = {"preprocessing": {"ct": ct.to_dict()}}
        with pytest.raises(CheckpointError, match=r"trained on CT alone.* looks like MR"):
            register(grey_model, *scan)
        image, label = scan
        hounsfield = dataclasses.replace(image, array=image.array - 1000)
        assert register(grey_model, hounsfield, label).preprocessing == ct

    def test_an_empty_mask(self, grey_model, scan, preprocessing):
        image, label = scan
        empty = dataclasses.replace(label, array=np.zeros_like(label.array))
        with pytest.raises(LabelError, match="empty label map"):
            register(grey_model, image, empty, preprocessing=preprocessing)

    def test_a_mask_on_another_grid(self, grey_model, scan, preprocessing):
        image, label = scan
        moved = dataclasses.replace(label, origin=(0.0, 0.0, 0.0))
        with pytest.raises(GeometryError):
            register(grey_model, image, moved, preprocessing=preprocessing)

    def test_a_mask_in_other_axes(self, grey_model, scan, preprocessing, task, reorient):
        image, label = scan
        turned = register(
            grey_model, image, reorient(label, "PSR"), labels=NAMES, preprocessing=preprocessing,
            prior="box",
        )  # fmt: skip
        for one, other in zip(task.organs, turned.organs, strict=True):
            assert torch.equal(one.prototypes.protos, other.prototypes.protos)

    def test_labels_without_a_name(self, grey_model, scan, preprocessing):
        with pytest.raises(LabelError, match="unknown labels 300"):
            register(grey_model, *scan, labels={7: "spleen"}, preprocessing=preprocessing)

    def test_labels_that_are_not_drawn(self, grey_model, scan, preprocessing):
        with pytest.raises(LabelError, match="no voxel of label 5"):
            register(
                grey_model, *scan, labels={5: "liver"}, classes=[5], preprocessing=preprocessing
            )

    def test_a_label_that_vanishes_in_resampling(self, grey_model, scan, preprocessing):
        image, label = scan
        thin = np.zeros_like(label.array)
        thin[5, 20, ::2] = 7  # between the rows of the network's image
        coarse = dataclasses.replace(preprocessing, image_size=4)
        with pytest.raises(LabelError, match="vanishes at 4 pixels"):
            register(
                grey_model, image, dataclasses.replace(label, array=thin), preprocessing=coarse
            )


class TestFieldOfView:
    def test_four_diameters_around_the_largest_slice(self, preprocessing, scan, make):
        image, label = make()
        array = np.zeros_like(label.array)
        array[3:7, 20:24, 10:14] = 7  # 4.8 x 6 mm
        array[4, 19:25, 10:14] = 7  # 7.2 x 6 mm: the largest slice
        organ = draw_in((image, dataclasses.replace(label, array=array)), preprocessing)
        # 4 diameters of 7.4 mm are less than the organ and 30 mm on every side,
        # and both are more than the slice, 57.6 by 48 mm
        assert organ.view.view.side == pytest.approx(57.6)
        assert organ.view.view.row == pytest.approx((19 + 24) / 2)
        assert organ.view.view.column == pytest.approx((10 + 13) / 2)

    @pytest.mark.parametrize(
        ("size", "expected"),
        [
            (10, 10 * 1.5 + 60),  # a margin of 30 mm
            (40, 4 * 2 * math.sqrt(60 * 60 / math.pi)),  # four diameters
            (100, 300.0),  # no more than is seen without an organ
        ],
    )
    def test_sides(self, preprocessing, size, expected):
        from fastproto.data import Volume

        label = np.zeros((6, 200, 200), np.uint8)
        label[2:4, 100 - size // 2 : 100 + size // 2, 100 - size // 2 : 100 + size // 2] = 7
        volume, mask = (
            Volume(array, spacing=(1.5, 1.5, 4.0)) for array in (label.astype(np.float32), label)
        )
        organ = draw_in((volume, mask), preprocessing)
        assert organ.view.view.side == pytest.approx(expected, rel=1e-6)
        assert organ.view.view.row == pytest.approx(99.5)

    def test_the_masks_are_those_of_the_view(self, preprocessing, scan):
        organ = draw_in(scan, preprocessing)
        expected = organ.view.labels(scan[1]) == 7
        assert torch.equal(organ.masks, expected)


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

    def test_slices_beyond_the_ends_come_on_top(self, preprocessing, make):
        scan = make(0, 20)
        organ = draw_in(scan, preprocessing, slices=3)  # in slices 2 to 8
        assert organ.inside == [3, 5, 7]
        assert organ.slices == (0, 3, 5, 7, 10, 12)  # each two slices from the next; none at -2
        tumour = draw_in(scan, preprocessing, value=300)  # in slices 4 and 5
        assert tumour.slices == (2, 3, 4, 5, 6, 7)

    def test_numbers_of_slices_are_taken_as_they_are(self, preprocessing, scan):
        organ = draw_in(scan, preprocessing, slices=[9, 5, 3, 5])
        assert organ.slices == (3, 5, 9)
        assert organ.inside == [3, 5]

    @pytest.mark.parametrize("slices", [[0, 1, 9], [5, 10], [-1, 5], []])
    def test_numbers_of_slices_that_cannot_be_used(self, preprocessing, scan, slices):
        with pytest.raises(ArgumentError, match=r"slices.*'spleen' among them: 2, 3, 4, 5"):
            draw_in(scan, preprocessing, slices=slices)

    def test_no_slices(self, grey_model, scan, preprocessing):
        with pytest.raises(ArgumentError, match="slices"):
            register(grey_model, *scan, slices=0, preprocessing=preprocessing)


class TestSelfCheck:
    def test_every_third_slice_between_the_first_and_the_last_is_left_out(
        self, preprocessing, scan
    ):
        organ = draw_in(scan, preprocessing)
        assert organ.inside == [2, 3, 4, 5, 6, 7, 8]
        assert split(organ) == ((0, 1, 2, 4, 5, 7, 8, 9), (3, 6))
        few = draw_in(scan, preprocessing, slices=3)
        assert split(few) == (few.slices, ())

    def test_a_good_organ_and_one_without_slices_to_spare(self, task):
        spleen, tumour = task.organs
        assert spleen.expected_dice > 0.95
        assert spleen.slices == tuple(range(10))  # what was left out teaches in the end
        assert tumour.expected_dice is None
        assert tumour.bias == 0

    def test_an_organ_that_looks_like_all_else(self, grey_model, scan, preprocessing):
        image, label = scan
        noise = np.random.default_rng(0).normal(0, 1, image.array.shape).astype(np.float32)
        task = register(
            grey_model, dataclasses.replace(image, array=noise), label, preprocessing=preprocessing
        )
        assert task.organs[0].expected_dice < 0.7

    @pytest.mark.parametrize("shift", [0.0, -2.5, 3.25])
    def test_the_bias_undoes_a_shift(self, shift):
        generator = torch.Generator().manual_seed(0)
        truth = torch.rand(3, 20, 20, generator=generator) < 0.3
        scores = torch.where(truth, 0.1, -0.1) + shift
        bias, dice = _fit_bias(scores, truth)
        assert bias == -shift
        assert dice == 1.0

    def test_of_equal_biases_the_smallest_is_taken(self):
        truth = torch.tensor([[[True, True, False]]])
        bias, dice = _fit_bias(torch.tensor([[[3.0, 3.0, -3.0]]]), truth)
        assert (bias, dice) == (0.0, 1.0)
        bias, dice = _fit_bias(torch.tensor([[[3.0, -1.0, -3.0]]]), truth)
        assert (bias, dice) == (1.25, 1.0)

    def test_the_bias_moves_the_result(self, grey_model, task, scan):
        organs = tuple(dataclasses.replace(organ, bias=-1e4) for organ in task.organs)
        nothing = dataclasses.replace(task, organs=organs)
        assert not segment_volume(grey_model, nothing, scan[0]).labels.any()


@pytest.fixture(scope="module")
def network() -> FewShotUNet:
    torch.manual_seed(0)
    return FewShotUNet("resnet18").eval()


@pytest.fixture
def small() -> Preprocessing:
    return Preprocessing("mr", image_size=32, crop=False)


class TestAdaptation:
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

    @pytest.mark.parametrize("parts", ["decoder", "all"])
    def test_only_some_weights_change(self, network, scan, small, parts):
        before = {name: value.clone() for name, value in network.state_dict().items()}
        adapted, weights = adapt_model(network, [draw_in(scan, small)], 1, parts=parts)
        for name, value in network.state_dict().items():
            assert torch.equal(value, before[name]), name  # the model stays as it is
        assert not adapted.training
        changed = {
            name
            for name, value in adapted.state_dict().items()
            if not torch.equal(value, before[name])
        }
        assert changed
        assert changed <= weights.keys()  # the statistics of normalisation stay
        wanted = {
            "decoder": lambda name: name.startswith("decoder."),
            "all": lambda name: True,
        }[parts]
        parameters = [name for name, _ in network.named_parameters()]
        assert weights.keys() == {name for name in parameters if wanted(name)}
        assert {value.dtype for value in weights.values()} == {torch.float16}

    def test_it_goes_through_the_file(self, network, scan, small, tmp_path, monkeypatch):
        dice = iter([0.9, 0.1])  # afterwards and before
        monkeypatch.setattr(learn, "_expected", lambda organs: next(dice))
        task = register(network, *scan, labels=NAMES, preprocessing=small, adapt=2)
        assert task.adapted_steps == 2
        assert task.weights
        assert task.fingerprint == network.fingerprint()
        task.save(tmp_path / "organs.task")
        again = Task.load(tmp_path / "organs.task")
        assert again.adapted_steps == 2
        assert again.weights.keys() == task.weights.keys()
        for name, value in task.weights.items():
            assert torch.equal(again.weights[name], value)
            assert torch.equal(again.adapted(network).state_dict()[name], value.float())
        plain = dataclasses.replace(task, weights={})
        results = [
            segment_volume(network, t, scan[0], probabilities=True).probabilities[7]
            for t in (task, again, plain)
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

    def test_it_is_spared_where_nothing_could_judge_it(
        self, grey_model, scan, preprocessing, monkeypatch
    ):
        monkeypatch.setattr(learn, "adapt_model", lambda *_, **__: pytest.fail("adapted"))
        task = register(grey_model, *scan, slices=3, preprocessing=preprocessing, adapt=5)
        assert task.adapted_steps == 0

    @pytest.mark.parametrize("adapt", [-1, 1.5, "much", None])
    def test_steps_are_checked(self, grey_model, scan, preprocessing, adapt):
        with pytest.raises(ArgumentError, match="adapt"):
            register(grey_model, *scan, preprocessing=preprocessing, adapt=adapt)


class TestAnnotatedEpisodes:
    @pytest.fixture
    def source(self, scan, preprocessing) -> AnnotatedEpisodes:
        organs = [draw_in(scan, preprocessing, value) for value in NAMES]
        return AnnotatedEpisodes(organs, 0, size=64)

    def test_slices_and_masks_are_those_of_the_organ(self, source):
        seen = Counter()
        away = drawn = 0
        for index in range(300):
            draw = source.draw(episode_generator(0, index))
            name, slices = draw.description.split(", slices ")
            seen[name] += 1
            organ = next(organ for organ in source.organs if organ.name == name)
            numbers = list(map(int, slices.split(", ")))
            assert len(numbers) == len(draw.cuts) == source.shots + source.queries
            assert set(numbers[: source.shots]) <= set(organ.inside)
            assert set(numbers) <= set(organ.region)
            for cut, number in zip(draw.cuts, numbers, strict=True):
                assert torch.equal(cut.label.bool(), organ.masks[number])
                assert torch.equal(cut.image, organ.view.images(number, number + 1)[0, 0])
            if name == "spleen":  # 3 of its 10 slices are outside
                away += sum(number not in organ.inside for number in numbers[source.shots :])
                drawn += source.queries
        assert seen.keys() == {"spleen", "tumour"}
        assert away / drawn == pytest.approx(0.3 * 3 / 10, abs=0.04)

    def test_a_region_is_the_organ_and_what_lies_within_30_mm(self, preprocessing, make):
        organ = draw_in(make(0, 30), preprocessing, slices=3)  # 2 to 8, of 4 mm
        assert organ.slices == (0, 3, 5, 7, 10, 12)
        assert organ.region == [0, 1, 3, 5, 7, *range(9, 17)]  # no slice that was left out

    def test_the_view_moves_and_scales_a_little(self, source):
        sides, moves = [], []
        for index in range(300):
            draw = source.draw(episode_generator(1, index))
            side = draw.cuts[0].extent[0]
            assert {cut.extent for cut in draw.cuts} == {(side, side)}
            assert len({cut.side for cut in draw.cuts}) == 1
            sides.append(draw.cuts[0].side / side)
            moves += [(place / side) - 0.5 for cut in draw.cuts for place in cut.centre]
        assert 0.8 <= min(sides) < 0.82
        assert 1.22 < max(sides) <= 1.25
        assert -0.1 <= min(moves) < -0.095
        assert 0.095 < max(moves) <= 0.1
