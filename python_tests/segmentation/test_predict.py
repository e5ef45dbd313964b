# SPDX-License-Identifier: Apache-2.0
"""Segmenting whole volumes: values, grid, batches and memory."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from fastproto.data import Preprocessing, Volume
from fastproto.errors import ArgumentError, CheckpointError
from fastproto.nn import FewShotUNet, PrototypeNet
from fastproto.segmentation import predict, register, segment_volume
from fastproto.segmentation.predict import _split_classes

NAMES = {7: "spleen", 300: "tumour"}


@pytest.fixture
def task(grey_model, scan, preprocessing):
    return register(grey_model, *scan, labels=NAMES, preprocessing=preprocessing)


def reorient(volume: Volume, axes: str) -> Volume:
    """The same scan with its axes stored in another order."""
    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing(volume.spacing)
    image.SetOrigin(volume.origin)
    image.SetDirection(volume.direction)
    turned = sitk.DICOMOrient(image, axes)
    return Volume(
        array=sitk.GetArrayFromImage(turned),
        spacing=turned.GetSpacing(),
        origin=turned.GetOrigin(),
        direction=turned.GetDirection(),
        path=None,
    )


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


@pytest.mark.parametrize("axes", ["RAS", "PSR", "ASL"])
def test_any_stored_orientation_gives_the_same_anatomy(grey_model, task, scan, axes):
    image, label = (reorient(volume, axes) for volume in scan)
    result = segment_volume(grey_model, task, image)
    assert result.labels.shape == image.array.shape
    assert agreement(result.labels, label.array) > 0.95


def test_small_label_values_stay_uint8(grey_model, scan, preprocessing):
    image, label = scan
    label = dataclasses.replace(label, array=(label.array > 0).astype(np.uint8))
    task = register(grey_model, image, label, preprocessing=preprocessing)
    assert segment_volume(grey_model, task, image).labels.dtype == np.uint8


def test_probabilities_sum_to_at_most_one_and_agree_with_the_labels(grey_model, task, scan):
    image, _ = scan
    result = segment_volume(grey_model, task, image, probabilities=True)
    assert result.probabilities is not None
    assert list(result.probabilities) == [7, 300]
    for value, probability in result.probabilities.items():
        assert probability.dtype == np.float32
        assert probability.shape == image.array.shape
        assert probability[result.labels == value].min() > 1 / 3 - 1e-5
    total = sum(result.probabilities.values())
    assert total.min() >= -1e-5
    assert total.max() <= 1 + 1e-5
    assert total[result.labels == 0].max() < 2 / 3 + 1e-5


def test_batch_size_changes_nothing(grey_model, task, scan):
    image, _ = scan
    results = [segment_volume(grey_model, task, image, batch_size=n).labels for n in (1, 3, 10)]
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
    assert set(grey_model.batches) == {1, 3, 10}
    with pytest.raises(ArgumentError, match="batch_size"):
        segment_volume(grey_model, task, image, batch_size=0)


def test_progress_counts_slices(grey_model, task, scan):
    calls: list[tuple[int, int]] = []
    segment_volume(
        grey_model, task, scan[0], batch_size=4, progress=lambda *call: calls.append(call)
    )
    assert calls == [(4, 10), (8, 10), (10, 10)]


def test_refuses_a_task_of_another_model(grey_model, task, scan):
    with torch.no_grad():
        grey_model.weight.add_(1)
    with pytest.raises(CheckpointError, match="another model"):
        segment_volume(grey_model, task, scan[0])


@pytest.mark.parametrize("network", [FewShotUNet, PrototypeNet])
def test_decoding_classes_in_groups_changes_nothing(network, scan, preprocessing, monkeypatch):
    torch.manual_seed(0)
    model = network(encoder="resnet18").eval()
    image, label = scan
    four = label.array + (image.array == 0) * np.eye(40, 32, dtype=np.uint16) * 9
    label = dataclasses.replace(label, array=four)
    task = register(model, image, label, preprocessing=preprocessing, slices=2)
    whole = segment_volume(model, task, image, batch_size=5, probabilities=True)
    monkeypatch.setattr(predict, "DECODER_MAPS", 2)
    assert [part.num_classes for part in _split_classes(task.prototypes)] == [2, 2]
    split = segment_volume(model, task, image, batch_size=5, probabilities=True)
    assert whole.probabilities is not None
    assert split.probabilities is not None
    for value in (7, 9, 300):
        np.testing.assert_allclose(
            whole.probabilities[value], split.probabilities[value], atol=1e-5
        )


def test_restoring_in_pieces_changes_nothing(grey_model, task, scan, monkeypatch):
    image, _ = scan
    whole = segment_volume(grey_model, task, image, batch_size=10).labels
    monkeypatch.setattr(predict, "RESTORED_VALUES", 1)
    assert np.array_equal(segment_volume(grey_model, task, image, batch_size=10).labels, whole)


def test_numpy_memory_is_flat_in_the_number_of_slices(grey_model, task):
    """Beyond the volume and the result; tracemalloc sees numpy's allocations."""
    small = dataclasses.replace(task.preprocessing, image_size=16)
    task = dataclasses.replace(task, preprocessing=small)
    peaks = []
    for slices in (150, 600):
        volume = Volume(
            array=np.zeros((slices, 128, 128), dtype=np.float32),
            spacing=(1.0, 1.0, 2.0),
            origin=(0.0, 0.0, 0.0),
            direction=(1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0),
            path=None,
        )
        tracemalloc.start()
        segment_volume(grey_model, task, volume)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    bytes_per_voxel = (peaks[1] - peaks[0]) / (450 * 128 * 128)
    assert bytes_per_voxel < 2.1, "more than the uint16 result grows"


def test_the_networks_run_end_to_end(scan):
    torch.manual_seed(0)
    preprocessing = Preprocessing("mr", image_size=64)
    model = FewShotUNet(encoder="resnet18").eval()
    for network in (model, PrototypeNet.from_unet(model)):
        task = register(network, *scan, labels=NAMES, preprocessing=preprocessing)
        result = segment_volume(network, task, scan[0])
        assert result.labels.shape == scan[0].array.shape
        assert set(np.unique(result.labels)) <= {0, 7, 300}
