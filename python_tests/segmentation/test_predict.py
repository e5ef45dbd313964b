# SPDX-License-Identifier: Apache-2.0
"""Segmenting whole volumes: values, places, several tasks, batches and memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.special import expit

from fastproto.data import Preprocessing, Volume
from fastproto.data.phantom import make_patient
from fastproto.errors import ArgumentError, CheckpointError, LabelError
from fastproto.nn import PrototypeNet
from fastproto.segmentation import predict, register, segment_volume
from fastproto.segmentation.predict import Claim, Fusion, average, decide, expected_view, gather
from fastproto.segmentation.prior import locate

NAMES = {7: "spleen", 300: "tumour"}


def agreement(found: np.ndarray, truth: np.ndarray) -> float:
    """Dice over all labels together."""
    return 2 * ((found == truth) & (truth > 0)).sum() / ((found > 0).sum() + (truth > 0).sum())


def test_labels_and_probabilities_on_the_input_grid(grey_model, task, teach, scan):
    image, label = scan
    result = segment_volume(grey_model, task, image, probabilities=True)
    assert result.labels.shape == image.array.shape
    assert result.labels.dtype == np.uint16
    assert set(np.unique(result.labels)) == {0, 7, 300}
    assert agreement(result.labels, label.array) > 0.95
    assert result.prior.kind == "box"
    assert result.absent() == []
    assert min(result.confidence.values()) > 0.9
    assert list(result.probabilities) == [7, 300]
    for value, probability in result.probabilities.items():  # each against the background
        assert probability.dtype == np.float32
        assert probability.shape == image.array.shape
        assert probability.min() >= 0
        assert probability.max() <= 1
        assert probability[result.labels == value].min() > 0.5
        assert (probability[result.labels == 0] <= 0.5).mean() > 0.99  # small pieces are dropped
    one, other = result.probabilities.values()
    assert (one[result.labels == 7] >= other[result.labels == 7]).all()
    binary = replace(label, array=(label.array > 0).astype(np.uint8))
    result = segment_volume(grey_model, teach(image, binary, labels=None), image)
    assert result.labels.dtype == np.uint8
    assert result.probabilities is None


@pytest.mark.parametrize("axes", ["RAS", "PSR", "ASL", "SLA"])
def test_any_stored_orientation_gives_the_same_anatomy(grey_model, task, make, reorient, axes):
    """Also of a scan that is not the annotated one: every window lands where its organ is."""
    for shift in (0, 9):
        upright = segment_volume(grey_model, task, make(shift)[0], probabilities=True)
        image, label = (reorient(volume, axes) for volume in make(shift))
        result = segment_volume(grey_model, task, image, probabilities=True)
        assert result.labels.shape == image.array.shape
        assert agreement(result.labels, label.array) > 0.95
        for value in NAMES:
            back = reorient(replace(image, array=result.probabilities[value]), "LPS")
            np.testing.assert_allclose(back.array, upright.probabilities[value], atol=1e-5)


def test_equals_the_sum_by_hand(grey_model, task, make, monkeypatch):
    """Slice by slice: the nearest grey value of the nearest slices, and the place."""
    monkeypatch.setattr("fastproto.segmentation.predict.correction", lambda *_: np.zeros(3))
    image, _ = make(5, 12)
    result = segment_volume(grey_model, task, image, batch_size=4, probabilities=True)
    prior = locate(task.atlas, image)
    prepared = task.preprocessing.prepare(image)
    places = prior.slice_positions()
    best = np.zeros(image.array.shape)
    labels = np.zeros(image.array.shape, int)
    y, x = np.indices(image.array.shape[1:])
    for index, organ in enumerate(task.organs):
        own = prior.only(index)
        _, (top, bottom), (left, right) = own.box()
        row, column = (top + bottom - 1) / 2, (left + right - 1) / 2
        assert expected_view(organ, own) == (row, column, organ.side)
        view = prepared.at(expected_view(organ, own))
        greys, bounds = organ.prototypes.protos[:, 0].tolist(), organ.prototypes.offsets.tolist()
        bags = [greys[start:stop] for start, stop in pairwise(bounds)]  # two to a slice
        (first, last), rows, columns = own.box(40.0)
        looked = (rows[0] <= y) & (y < rows[1]) & (columns[0] <= x) & (x < columns[1])
        looked &= abs(y - row) * 1.2 <= organ.side / 2 + 0.6
        looked &= abs(x - column) * 1.5 <= organ.side / 2 + 0.75
        depth = -own.signed_distance(0, len(prepared)).numpy().min()
        trust = 1.5 if organ.value == 7 else 0.5  # of Dice 1, and without slices to spare
        for z, found in enumerate(result.probabilities[organ.value]):
            if not first <= z < last:
                assert not found.any()
                continue
            away = np.abs(np.array(organ.slices) - places[z])
            order = np.argsort(away, kind="stable")
            background = [grey for n in order[:3] for grey in bags[2 * n]]
            inside = [grey for n in order for grey in bags[2 * n + 1]][:3]
            image = view.images(z, z + 1)[0, 0].numpy()
            far, near = (
                np.min([(image - grey) ** 2 for grey in known], axis=0)
                for known in (background, inside)
            )
            scores = torch.from_numpy(100 * (far - near)).float()
            scores = view.restore(scores[None, None], z, z + 1)[0, 0] + organ.bias
            place = -own.signed_distance(z, z + 1)[0, 0].numpy() / (0.5 * depth)
            odds = np.where(looked, trust * scores + place.clip(-4, 4), -np.inf)
            np.testing.assert_allclose(found, expit(odds), atol=1e-4)
            wins = odds > best[z]
            best[z][wins] = odds[wins]
            labels[z][wins] = organ.value
    assert (labels == result.labels).mean() > 0.999  # small pieces and holes


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
    def calls(tasks, size=None):
        seen = []
        segment_volume(
            grey_model, tasks, scan[0], batch_size=size, progress=lambda *call: seen.append(call)
        )
        assert [done for done, _ in seen] == sorted({done for done, _ in seen})
        return seen

    assert {total for _, total in calls(task, 4)} == {20}  # two organs, somewhere in all slices
    assert calls(task, 4)[-1] == (20, 20)
    assert calls([task, task])[-1] == (40, 40)
    # An organ that is looked at again counts again, in either task.
    monkeypatch.setattr(
        "fastproto.segmentation.predict.correction", lambda *_: np.array([4.0, 0.0, 0.0])
    )
    done, total = calls([task, task])[-1]
    assert done == total > 40


class TestFusion:
    def test_log_odds_of_network_and_place_add_up(self, task):
        """The place by its distance in shares of the organ's depth, here 0.5 * 8 mm."""
        organ = replace(task.organs[0], bias=1.0, expected_dice=0.8)
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
        organ = replace(task.organs[0], bias=0.0, expected_dice=dice)
        evidence = torch.tensor([2.0]), torch.tensor([0.0])
        assert Fusion()(*evidence, organ).item() == pytest.approx(2 * trust, abs=1e-5)
        # There is nothing to weigh it against.
        assert Fusion(prior=0)(*evidence, organ).item() == 2.0

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

    def test_no_place_is_ruled_out(self, grey_model, teach, scan):
        """The organ is found where the prior did not expect it, as far as it is looked for."""
        task = teach(*scan, classes=[7])
        image, label = scan
        prior = locate(task.atlas, image)
        moved, truth = image.array.copy(), np.zeros_like(label.array)
        moved[label.array == 7] = 100
        moved[3:8, 30:41, 6:16], truth[3:8, 30:41, 6:16] = 200, 7
        expected = prior.signed_distance(0, 10)[:, 0].numpy()[truth > 0]
        assert expected.max() > 14
        assert (expected < 0).mean() < 0.3
        elsewhere = replace(image, array=moved)
        prepared = task.preprocessing.prepare(elsewhere)
        found = gather(grey_model, task, prepared, prior)
        result = decide(task, elsewhere, prepared, prior, found, Fusion())
        assert (result.labels[truth > 0] == 7).mean() > 0.95
        real = prepared.to_canonical(truth)[found[0].box] > 0
        assert (found[0].distance.numpy()[real] < 0).mean() > 0.8  # looked at again, there


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

    def test_log_odds_are_averaged(self, grey_model, task, teach, make):
        other = teach(*make(6))
        other = replace(other, organs=tuple(replace(o, bias=3.0) for o in other.organs))
        image = make(3)[0]
        fusion = Fusion(network=1e-3)  # so that little saturates
        results = [
            segment_volume(grey_model, t, image, probabilities=True, fusion=fusion).probabilities
            for t in (task, other, [task, other])
        ]
        for value in NAMES:
            found = np.stack([result[value].astype(float) for result in results])
            known = (found[:2] > 0).all(axis=0)
            assert known.mean() > 0.5
            odds = np.log(found[:, known] / (1 - found[:, known]))
            exact = (np.abs(odds) < 8).all(axis=0)  # float32 knows no probability nearer to 1
            assert exact.mean() > 0.3
            mean = (odds[0] + odds[1]) / 2
            np.testing.assert_allclose(odds[2][exact], mean[exact], atol=1e-3)

    def test_where_a_task_did_not_look_it_says_no(self):
        def claim(start: int, value: float) -> Claim:
            part = torch.full((2, 1, 1), value)
            return Claim(5, np.s_[start : start + 2, 0:1, 3:4], part, part / 2)

        (found,) = average([claim(0, 4.0), claim(1, 2.0)])
        assert found.value == 5
        assert found.box == (slice(0, 3), slice(0, 1), slice(3, 4))
        least = -Fusion().limit
        assert found.odds.flatten().tolist() == [(4 + least) / 2, (4 + 2) / 2, (2 + least) / 2]
        assert found.network.flatten().tolist() == [(2 + least) / 2, (2 + 1) / 2, (1 + least) / 2]

    def test_an_organ_that_one_task_knows(self, grey_model, teach, scan):
        parts = [teach(*scan, classes=[value]) for value in NAMES]
        result = segment_volume(grey_model, parts, scan[0])
        assert agreement(result.labels, scan[1].array) > 0.95

    def test_tasks_must_go_together(self, grey_model, task, scan):
        organs = tuple(replace(organ, name=f"my {organ.name}") for organ in task.organs)
        coronal = replace(task.preprocessing, plane="coronal")
        for tasks, error, words in (
            ([], ArgumentError, "no task"),
            ([task, replace(task, preprocessing=coronal)], ArgumentError, "prepared alike"),
            (
                [task, replace(task, organs=organs)],
                LabelError,
                "label 7 as 'spleen' and as 'my spleen'",
            ),
            (replace(task, fingerprint="another"), CheckpointError, "another model"),
        ):
            with pytest.raises(error, match=words):
                segment_volume(grey_model, tasks, scan[0])
        with pytest.raises(CheckpointError, match="another model"):
            segment_volume(grey_model, task, scan[0], fingerprint="known, and another")


class TestAbsentOrgans:
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
        assert segment_volume(grey_model, task, image, fusion=fusion).absent() == []
        image.array[image.array == 0] = 100
        result = segment_volume(grey_model, task, image, fusion=fusion)
        assert (result.labels == 300).any()
        assert result.confidence[300] < predict.ABSENT
        assert result.absent() == [300]

    def test_phantom_without_bone(self, grey_model, teach):
        """All that is brighter than water turned into water; and the patient as he was."""
        ct = Preprocessing("ct", image_size=48, mean=0.0, std=100.0)
        annotated, other = (make_patient(n, shape=(16, 64, 64), seed=1)[0] for n in (0, 2))
        bone = replace(annotated, array=(annotated.array > 220).astype(np.uint8))
        task = teach(annotated, bone, labels={1: "bone"}, preprocessing=ct)
        result = segment_volume(grey_model, task, other)
        assert result.labels.any()
        assert result.absent() == []
        without = replace(other, array=other.array.clip(max=0))
        assert segment_volume(grey_model, task, without).absent() == [1]


def test_numpy_memory_is_that_of_the_result(grey_model, task):
    """Beyond the volume: labels, the best log odds, and masks; tracemalloc sees numpy's part."""
    task = replace(task, preprocessing=replace(task.preprocessing, image_size=16))
    peaks = []
    for slices in (150, 600):
        volume = Volume(np.zeros((slices, 128, 128), dtype=np.float32), spacing=(1.0, 1.0, 2.0))
        volume.array[0, 0, 0] = 0.5  # a constant scan is refused, and so is a label map
        tracemalloc.start()
        segment_volume(grey_model, task, volume)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    bytes_per_voxel = (peaks[1] - peaks[0]) / (450 * 128 * 128)
    assert bytes_per_voxel < 9, "more than uint16, float32 and three masks"


def test_the_networks_run_end_to_end(network, scan):
    preprocessing = Preprocessing("mr", image_size=64)
    for model, prior in ((network, "deformable"), (PrototypeNet.from_unet(network), "box")):
        task = register(model, *scan, labels=NAMES, preprocessing=preprocessing, prior=prior)
        result = segment_volume(model, task, scan[0])
        assert result.labels.shape == scan[0].array.shape
        assert set(np.unique(result.labels)) <= {0, 7, 300}
