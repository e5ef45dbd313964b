# SPDX-License-Identifier: Apache-2.0
"""Segmenting whole volumes: values, places, several tasks, batches and memory."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc

import numpy as np
import pytest
import torch

from fastproto.data import Preprocessing, Volume
from fastproto.data.phantom import make_patient
from fastproto.data.preprocessing import FieldOfView
from fastproto.errors import ArgumentError, CheckpointError, LabelError
from fastproto.nn import FewShotUNet, PrototypeNet
from fastproto.segmentation import Task, predict, register, segment_volume
from fastproto.segmentation.predict import Claim, Fusion, average, decide, gather
from fastproto.segmentation.prior import locate

NAMES = {7: "spleen", 300: "tumour"}


def agreement(found: np.ndarray, truth: np.ndarray) -> float:
    """Dice over all labels together."""
    return 2 * ((found == truth) & (truth > 0)).sum() / ((found > 0).sum() + (truth > 0).sum())


def test_result_has_the_support_values_on_the_input_grid(grey_model, task, scan):
    image, label = scan
    result = segment_volume(grey_model, task, image)
    assert result.labels.shape == image.array.shape
    assert result.labels.dtype == np.uint16
    assert set(np.unique(result.labels)) == {0, 7, 300}
    assert agreement(result.labels, label.array) > 0.95
    assert result.probabilities is None
    assert result.prior.kind == "box"


@pytest.mark.parametrize("axes", ["RAS", "PSR", "ASL", "SLA"])
def test_any_stored_orientation_gives_the_same_anatomy(
    grey_model, task, scan, make, reorient, axes
):
    """Also of a scan that is not the annotated one: every window lands where its organ is."""
    for shift in (0, 9):
        upright = segment_volume(grey_model, task, make(shift)[0], probabilities=True)
        image, label = (reorient(volume, axes) for volume in make(shift))
        result = segment_volume(grey_model, task, image, probabilities=True)
        assert result.labels.shape == image.array.shape
        assert agreement(result.labels, label.array) > 0.95
        for value in NAMES:
            grid = {field: getattr(image, field) for field in ("spacing", "origin", "direction")}
            back = reorient(Volume(result.probabilities[value], **grid), "LPS")
            np.testing.assert_allclose(back.array, upright.probabilities[value], atol=1e-5)


def test_small_label_values_stay_uint8(grey_model, scan, preprocessing):
    image, label = scan
    label = dataclasses.replace(label, array=(label.array > 0).astype(np.uint8))
    task = register(grey_model, image, label, preprocessing=preprocessing, prior="box")
    assert segment_volume(grey_model, task, image).labels.dtype == np.uint8


def test_equals_the_sum_by_hand(grey_model, task, make, monkeypatch):
    """Voxel by voxel: the nearest grey value of the nearest slices, and the place."""
    monkeypatch.setattr("fastproto.segmentation.predict.correction", lambda *_: np.zeros(3))
    image, _ = make(5, 12)
    result = segment_volume(grey_model, task, image, batch_size=4, probabilities=True)
    assert result.probabilities is not None
    prior = locate(task.atlas, image)
    prepared = task.preprocessing.prepare(image)
    places = prior.slice_positions()
    best = np.zeros(image.array.shape)
    labels = np.zeros(image.array.shape, int)
    for index, organ in enumerate(task.organs):
        own = prior.only(index)
        _, (top, bottom), (left, right) = own.box()
        view = prepared.at(FieldOfView((top + bottom - 1) / 2, (left + right - 1) / 2, organ.side))
        protos, bounds = organ.prototypes.protos[:, 0].tolist(), organ.prototypes.offsets.tolist()
        bags = [
            [protos[bounds[2 * n + way] : bounds[2 * n + way + 1]] for way in range(2)]
            for n in range(len(organ.slices))
        ]
        (first, last), rows, columns = own.box(40.0)
        depth = -own.signed_distance(0, len(prepared)).numpy().min()
        trust = 1.5 if organ.value == 7 else 0.5  # of Dice 1, and without slices to spare
        for z in range(len(prepared)):
            if not first <= z < last:
                assert not result.probabilities[organ.value][z].any()
                continue
            order = sorted(range(len(bags)), key=lambda n: (abs(organ.slices[n] - places[z]), n))
            background = [bags[n][0][0] for n in order[:3] if bags[n][0]]
            inside = [bags[n][1][0] for n in order if bags[n][1]][:3]
            grey = view.images(z, z + 1)[0, 0].numpy()
            nearest = [
                np.min([(grey - p) ** 2 for p in known], axis=0) for known in (background, inside)
            ]
            scores = torch.from_numpy(100 * (nearest[0] - nearest[1])).float()
            scores = view.restore(scores[None, None], z, z + 1)[0, 0] + organ.bias
            place = -own.signed_distance(z, z + 1)[0, 0].numpy() / (0.5 * depth)
            odds = trust * scores + place.clip(-4, 4)
            half = organ.side / 2
            for y in range(odds.shape[0]):
                for x in range(odds.shape[1]):
                    looked = (
                        rows[0] <= y < rows[1]
                        and columns[0] <= x < columns[1]
                        and abs(y - view.view.row) * 1.2 <= half + 0.6
                        and abs(x - view.view.column) * 1.5 <= half + 0.75
                    )
                    found = result.probabilities[organ.value][z, y, x]
                    expected = 1 / (1 + math.exp(-odds[y, x].clip(-80, 80))) if looked else 0.0
                    assert found == pytest.approx(expected, abs=1e-4), (organ, z, y, x)
                    if looked and odds[y, x] > best[z, y, x]:
                        best[z, y, x] = odds[y, x]
                        labels[z, y, x] = organ.value
    assert (labels == result.labels).mean() > 0.999  # small pieces and holes


def test_probabilities_are_of_each_organ_against_the_background(grey_model, task, scan):
    image, _ = scan
    result = segment_volume(grey_model, task, image, probabilities=True)
    assert result.probabilities is not None
    assert list(result.probabilities) == [7, 300]
    for value, probability in result.probabilities.items():
        assert probability.dtype == np.float32
        assert probability.shape == image.array.shape
        assert probability.min() >= 0
        assert probability.max() <= 1
        assert probability[result.labels == value].min() > 0.5
        assert (probability[result.labels == 0] <= 0.5).mean() > 0.99  # small pieces are dropped
    one, other = result.probabilities.values()
    assert (one[result.labels == 7] >= other[result.labels == 7]).all()


def test_batch_size_changes_nothing(grey_model, task, scan):
    image, _ = scan
    grey_model.batches.clear()
    results = [segment_volume(grey_model, task, image, batch_size=n).labels for n in (1, 3, 10)]
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
    assert {1, 3, 10} <= set(grey_model.batches)
    with pytest.raises(ArgumentError, match="batch_size"):
        segment_volume(grey_model, task, image, batch_size=0)


def test_progress_counts_slices_of_all_organs(grey_model, task, scan, monkeypatch):
    calls: list[tuple[int, int]] = []
    segment_volume(
        grey_model, task, scan[0], batch_size=4, progress=lambda *call: calls.append(call)
    )
    done, totals = zip(*calls, strict=True)
    assert list(done) == sorted(set(done))
    assert set(totals) == {done[-1]}
    assert done[-1] == 20  # two organs, expected somewhere in all slices
    calls.clear()
    segment_volume(grey_model, [task, task], scan[0], progress=lambda *c: calls.append(c))
    assert calls[-1] == (40, 40)
    calls.clear()  # an organ that is looked at again counts again, in either task
    monkeypatch.setattr(
        "fastproto.segmentation.predict.correction", lambda *_: np.array([4.0, 0.0, 0.0])
    )
    segment_volume(grey_model, [task, task], scan[0], progress=lambda *c: calls.append(c))
    done = [now for now, _ in calls]
    assert done == sorted(set(done))
    assert calls[-1][0] == calls[-1][1] > 40


def test_refuses_a_task_of_another_model(grey_model, task, scan):
    with pytest.raises(CheckpointError, match="another model"):
        segment_volume(grey_model, task, scan[0], fingerprint="known, and another")
    with torch.no_grad():
        grey_model.weight.add_(1)
    with pytest.raises(CheckpointError, match="another model"):
        segment_volume(grey_model, task, scan[0])


class TestFusion:
    def test_log_odds_of_network_and_place_add_up(self, task):
        """The place by its distance in shares of the organ's depth, here 0.5 * 8 mm."""
        organ = dataclasses.replace(task.organs[0], bias=1.0, expected_dice=0.8)
        scores = torch.tensor([-2.0, 0.0, 3.0, 1.0])
        distance = torch.tensor([0.0, 10.0, -5.0, -8.0])
        fusion = Fusion(network=1.0, prior=2.0, blur=0.5, limit=1.5)  # trusted by half
        found = fusion(scores, distance, organ)
        assert found.tolist() == pytest.approx(
            [0.5 * -1 + 0, 0.5 * 1 - 2 * 1.5, 0.5 * 4 + 2 * 1.25, 0.5 * 2 + 2 * 1.5]
        )
        beyond = torch.tensor([3.0, 0.5])  # the organ would lie outside: 1 mm instead of a depth
        found = fusion(torch.tensor([-1.0, -1.0]), beyond, organ)
        assert found.tolist() == pytest.approx([-2 * 1.5, -2 * 1.0])

    @pytest.mark.parametrize(
        ("dice", "trust"),
        [(0.8, 0.5), (0.5, 0.125), (0.0, 0.0), (0.95, 1.5), (1.0, 1.5), (None, 0.25)],
    )
    def test_the_network_counts_by_its_dice_in_slices_left_out(self, task, dice, trust):
        organ = dataclasses.replace(task.organs[0], bias=0.0, expected_dice=dice)
        scores, distance = torch.tensor([2.0]), torch.tensor([0.0])
        assert Fusion()(scores, distance, organ).item() == pytest.approx(2 * trust, abs=1e-5)
        alone = Fusion(prior=0)(scores, distance, organ)
        assert alone.item() == 2.0  # there is nothing to weigh it against

    def test_either_can_be_left_out(self, grey_model, task, scan):
        image, label = scan
        prior, prepared = locate(task.atlas, image), task.preprocessing.prepare(image)
        found = gather(grey_model, task, prepared, prior)
        alone = decide(task, image, prepared, prior, found, Fusion(network=0))
        assert agreement(alone.labels, prior.label_map()) > 0.97
        network = decide(task, image, prepared, prior, found, Fusion(prior=0))
        assert agreement(network.labels, label.array) > 0.95
        both = segment_volume(grey_model, task, image, fusion=Fusion(prior=0))
        assert np.array_equal(both.labels, network.labels)

    def test_no_place_is_ruled_out(self, grey_model, scan, preprocessing):
        """The organ is found where the prior did not expect it, as far as it is looked for."""
        task = register(
            grey_model, *scan, labels=NAMES, classes=[7], preprocessing=preprocessing, prior="box"
        )
        image, label = scan
        prior = locate(task.atlas, image)
        moved = image.array.copy()
        truth = np.zeros_like(label.array)
        moved[label.array == 7] = 100
        moved[3:8, 30:41, 6:16], truth[3:8, 30:41, 6:16] = 200, 7
        assert prior.signed_distance(0, 10)[:, 0].numpy()[truth > 0].max() > 14
        elsewhere = dataclasses.replace(image, array=moved)
        prepared = task.preprocessing.prepare(elsewhere)
        found = gather(grey_model, task, prepared, prior)
        result = decide(task, elsewhere, prepared, prior, found, Fusion())
        assert (result.labels[truth > 0] == 7).mean() > 0.95
        expected_there = found[0].distance.numpy() < 0  # it was looked at again, there
        real = prepared.to_canonical(truth)[found[0].box] > 0
        assert expected_there[real].mean() > 0.8
        assert (prior.signed_distance(0, 10)[:, 0].numpy()[truth > 0] < 0).mean() < 0.3


class TestSeveralTasks:
    def test_one_task_twice_is_that_task(self, grey_model, task, scan):
        once = segment_volume(grey_model, task, scan[0], probabilities=True)
        for tasks in ([task], [task, task]):
            result = segment_volume(grey_model, tasks, scan[0], probabilities=True)
            assert np.array_equal(result.labels, once.labels)
            assert result.confidence == pytest.approx(once.confidence)
            for value in NAMES:
                np.testing.assert_allclose(
                    result.probabilities[value], once.probabilities[value], atol=1e-6
                )

    def test_log_odds_are_averaged(self, grey_model, scan, make, preprocessing):
        tasks = [
            register(grey_model, *pair, labels=NAMES, preprocessing=preprocessing, prior="box")
            for pair in (scan, make(6))
        ]
        tasks[1] = dataclasses.replace(
            tasks[1], organs=tuple(dataclasses.replace(o, bias=3.0) for o in tasks[1].organs)
        )
        image = make(3)[0]
        fusion = Fusion(network=1e-3)  # so that little saturates
        results = [
            segment_volume(grey_model, t, image, probabilities=True, fusion=fusion).probabilities
            for t in (*tasks, tasks)
        ]
        for value in NAMES:
            one, other, both = (result[value].astype(float) for result in results)
            known = (one > 0) & (other > 0)
            assert known.mean() > 0.5
            odds = np.stack([np.log(p[known] / (1 - p[known])) for p in (one, other, both)])
            exact = (np.abs(odds) < 8).all(axis=0)  # float32 knows no probability nearer to 1
            assert exact.mean() > 0.3
            mean = (odds[0] + odds[1]) / 2
            np.testing.assert_allclose(odds[2][exact], mean[exact], atol=1e-3)

    def test_where_a_task_did_not_look_it_says_no(self):
        def claim(start: int, value: float) -> dict[int, Claim]:
            box = (slice(start, start + 2), slice(0, 1), slice(3, 4))
            part = torch.full((2, 1, 1), value)
            return {5: Claim(5, box, part, part / 2)}

        (found,) = average([claim(0, 4.0), claim(1, 2.0)])
        assert found.value == 5
        assert found.box == (slice(0, 3), slice(0, 1), slice(3, 4))
        least = -Fusion().limit
        assert found.odds.flatten().tolist() == [(4 + least) / 2, (4 + 2) / 2, (2 + least) / 2]
        assert found.network.flatten().tolist() == [(2 + least) / 2, (2 + 1) / 2, (1 + least) / 2]

    def test_an_organ_that_one_task_knows(self, grey_model, scan, preprocessing):
        options = {"labels": NAMES, "preprocessing": preprocessing, "prior": "box"}
        parts = [register(grey_model, *scan, classes=[value], **options) for value in NAMES]
        result = segment_volume(grey_model, parts, scan[0])
        assert agreement(result.labels, scan[1].array) > 0.95

    def test_tasks_must_go_together(self, grey_model, task, scan):
        renamed = dataclasses.replace(
            task, organs=tuple(dataclasses.replace(o, name=f"my {o.name}") for o in task.organs)
        )
        with pytest.raises(LabelError, match="label 7 as 'spleen' and as 'my spleen'"):
            segment_volume(grey_model, [task, renamed], scan[0])
        coronal = dataclasses.replace(
            task, preprocessing=dataclasses.replace(task.preprocessing, plane="coronal")
        )
        with pytest.raises(ArgumentError, match="prepared alike"):
            segment_volume(grey_model, [task, coronal], scan[0])
        with pytest.raises(ArgumentError, match="no task"):
            segment_volume(grey_model, [], scan[0])


class TestAbsentOrgans:
    def test_what_is_there_is_not_absent(self, grey_model, task, scan):
        result = segment_volume(grey_model, task, scan[0])
        assert result.absent() == []
        assert min(result.confidence.values()) > 0.9

    def test_an_empty_result_is(self, grey_model, task, make):
        image, label = make(2)
        image.array[label.array == 300] = 100
        result = segment_volume(grey_model, task, image)
        assert not (result.labels == 300).any()
        assert result.confidence[300] == 0
        assert result.absent() == [300]

    def test_a_result_that_only_the_place_supports_is(self, grey_model, task, make):
        image, _ = make(2)
        fusion = Fusion(network=1e-4)
        result = segment_volume(grey_model, task, image, fusion=fusion)
        assert result.absent() == []
        image.array[image.array == 0] = 100
        result = segment_volume(grey_model, task, image, fusion=fusion)
        assert (result.labels == 300).any()
        assert result.confidence[300] < predict.ABSENT
        assert result.absent() == [300]

    def test_phantom_without_bone(self, grey_model):
        """All that is brighter than water turned into water; and the patient as he was."""
        preprocessing = Preprocessing("ct", image_size=48, mean=0.0, std=100.0)
        annotated, other = (make_patient(n, shape=(16, 64, 64), seed=1)[0] for n in (0, 2))
        bone = dataclasses.replace(annotated, array=(annotated.array > 220).astype(np.uint8))
        task = register(
            grey_model, annotated, bone, labels={1: "bone"}, preprocessing=preprocessing
        )
        result = segment_volume(grey_model, task, other)
        assert result.labels.any()
        assert result.absent() == []
        without = dataclasses.replace(other, array=other.array.clip(max=0))
        assert segment_volume(grey_model, task, without).absent() == [1]


def test_numpy_memory_is_that_of_the_result(grey_model, task):
    """Beyond the volume: labels, the best log odds, and masks; tracemalloc sees numpy's part."""
    small = dataclasses.replace(task.preprocessing, image_size=16)
    task = dataclasses.replace(task, preprocessing=small)
    peaks = []
    for slices in (150, 600):
        volume = Volume(np.zeros((slices, 128, 128), dtype=np.float32), spacing=(1.0, 1.0, 2.0))
        tracemalloc.start()
        segment_volume(grey_model, task, volume)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    bytes_per_voxel = (peaks[1] - peaks[0]) / (450 * 128 * 128)
    assert bytes_per_voxel < 9, "more than uint16, float32 and three masks"


def test_the_networks_run_end_to_end(scan):
    torch.manual_seed(0)
    preprocessing = Preprocessing("mr", image_size=64)
    model = FewShotUNet(encoder="resnet18").eval()
    for network in (model, PrototypeNet.from_unet(model)):
        task = register(network, *scan, labels=NAMES, preprocessing=preprocessing)
        result = segment_volume(network, task, scan[0])
        assert result.labels.shape == scan[0].array.shape
        assert set(np.unique(result.labels)) <= {0, 7, 300}


@pytest.mark.parametrize("prior", ["box", "affine"])
def test_a_task_from_its_file_gives_the_same_bits(grey_model, scan, make, tmp_path, prior):
    preprocessing = Preprocessing("mr", image_size=64)
    task = register(grey_model, *scan, labels=NAMES, preprocessing=preprocessing, prior=prior)
    task.save(tmp_path / "organs.task")
    again = Task.load(tmp_path / "organs.task")
    results = [segment_volume(grey_model, t, make(4)[0], probabilities=True) for t in (task, again)]
    assert np.array_equal(results[0].labels, results[1].labels)
    for value in NAMES:
        one, other = (result.probabilities[value] for result in results)
        assert np.array_equal(one, other)
