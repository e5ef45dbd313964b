# SPDX-License-Identifier: Apache-2.0
"""Registering one annotated scan, and the file that comes of it."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastproto.errors import ArgumentError, CheckpointError, GeometryError, LabelError
from fastproto.nn import FewShotUNet, Prototypes
from fastproto.segmentation import Task, load_model, register
from fastproto.segmentation.task import choose_slices, class_indices

NAMES = {7: "spleen", 300: "tumour"}


@pytest.fixture
def task(grey_model, scan, preprocessing) -> Task:
    return register(grey_model, *scan, labels=NAMES, preprocessing=preprocessing)


def test_register_keeps_one_bag_per_label_and_the_background(task):
    assert task.labels == NAMES
    assert task.prototypes.num_classes == 3
    background, spleen, tumour = task.prototypes.protos[:, 0].tolist()
    assert background < spleen < tumour
    assert task.label_values.tolist() == [0, 7, 300]
    assert task.label_values.dtype == np.uint16


def test_register_also_learns_from_slices_without_organs(grey_model, scan, preprocessing):
    image, label = scan
    bright = image.array.copy()
    bright[~label.array.any(axis=(1, 2))] = 500
    image = dataclasses.replace(image, array=bright)
    seen = []
    encode_support = grey_model.encode_support
    grey_model.encode_support = lambda images, masks, **options: (
        seen.append((images, masks)) or encode_support(images, masks, **options)
    )
    register(grey_model, image, label, slices=3, preprocessing=preprocessing)
    ((images, masks),) = seen
    with_organ = masks[0].flatten(1).any(dim=1)
    assert with_organ.tolist() == [True, True, True, False, False, False]
    assert images[0, 3:].mean() > images[0, :3].mean()


def test_register_counts_unchosen_labels_as_background(grey_model, scan, preprocessing):
    task = register(
        grey_model, *scan, labels=NAMES, classes=[7], slices=3, preprocessing=preprocessing
    )
    assert task.labels == {7: "spleen"}
    assert task.prototypes.num_classes == 2


def test_register_names_labels_where_nobody_did(grey_model, scan, preprocessing):
    task = register(grey_model, *scan, preprocessing=preprocessing)
    assert task.labels == {7: "label 7", 300: "label 300"}


def test_register_takes_the_models_own_preprocessing(grey_model, scan, preprocessing):
    with pytest.raises(CheckpointError, match="preprocessing"):
        register(grey_model, *scan)
    grey_model.extra = {"preprocessing": preprocessing.to_dict()}
    assert register(grey_model, *scan).preprocessing == preprocessing


def test_register_refuses_an_empty_mask(grey_model, scan, preprocessing):
    image, label = scan
    empty = dataclasses.replace(label, array=np.zeros_like(label.array))
    with pytest.raises(LabelError, match="empty label map"):
        register(grey_model, image, empty, preprocessing=preprocessing)


def test_register_refuses_a_mask_on_another_grid(grey_model, scan, preprocessing):
    image, label = scan
    moved = dataclasses.replace(label, origin=(0.0, 0.0, 0.0))
    with pytest.raises(GeometryError):
        register(grey_model, image, moved, preprocessing=preprocessing)


def test_register_refuses_labels_without_a_name(grey_model, scan, preprocessing):
    with pytest.raises(LabelError, match="unknown labels 300"):
        register(grey_model, *scan, labels={7: "spleen"}, preprocessing=preprocessing)


def test_register_refuses_labels_that_are_not_drawn(grey_model, scan, preprocessing):
    with pytest.raises(LabelError, match="no voxel of label 5"):
        register(grey_model, *scan, labels={5: "liver"}, classes=[5], preprocessing=preprocessing)


def test_register_refuses_a_label_that_vanishes_in_resampling(grey_model, scan, preprocessing):
    image, label = scan
    dot = np.zeros_like(label.array)
    dot[5, 20, 15] = 7
    dot[5, 0, 0] = 300
    coarse = dataclasses.replace(preprocessing, image_size=4)
    with pytest.raises(LabelError, match="vanishes at 4 pixels"):
        register(grey_model, image, dataclasses.replace(label, array=dot), preprocessing=coarse)


def test_register_refuses_no_slices(grey_model, scan, preprocessing):
    with pytest.raises(ArgumentError, match="slices"):
        register(grey_model, *scan, slices=0, preprocessing=preprocessing)


def test_task_file_round_trip(task, tmp_path):
    path = tmp_path / "organs.task"
    task.save(path)
    again = Task.load(path)
    assert torch.equal(again.prototypes.protos, task.prototypes.protos)
    assert torch.equal(again.prototypes.offsets, task.prototypes.offsets)
    assert again.labels == task.labels
    assert again.preprocessing == task.preprocessing
    assert again.fingerprint == task.fingerprint


def test_task_file_holds_no_path_and_no_time(task, scan, grey_model, preprocessing, tmp_path):
    named = [dataclasses.replace(volume, path=tmp_path / "DOE^JANE.nii") for volume in scan]
    path = tmp_path / "organs.task"
    register(grey_model, *named, labels=NAMES, preprocessing=preprocessing).save(path)
    content = path.read_bytes()
    assert b"DOE" not in content
    assert str(tmp_path).encode() not in content
    task.save(tmp_path / "again.task")
    assert (tmp_path / "again.task").read_bytes() == content


def test_task_refuses_another_model(task, grey_model):
    task.check_model(grey_model)
    with torch.no_grad():
        grey_model.weight.add_(1)
    with pytest.raises(CheckpointError, match="another model"):
        task.check_model(grey_model)


def test_load_refuses_what_is_no_task(task, tmp_path):
    bare = tmp_path / "prototypes.safetensors"
    task.prototypes.save(bare, extra={})
    with pytest.raises(CheckpointError, match="task file"):
        Task.load(bare)
    pickled = tmp_path / "evil.task"
    pickled.write_bytes(pickle.dumps({"protos": [1.0]}))
    with pytest.raises(CheckpointError):
        Task.load(pickled)
    with pytest.raises(CheckpointError):
        Task.load(tmp_path / "absent.task")


@pytest.mark.parametrize("missing", ["labels", "preprocessing", "fingerprint"])
def test_load_refuses_unusable_metadata(task, tmp_path, missing):
    path = tmp_path / "organs.task"
    task.save(path)
    prototypes, extra = Prototypes.load(path)
    prototypes.save(path, {name: value for name, value in extra.items() if name != missing})
    with pytest.raises(CheckpointError, match=missing):
        Task.load(path)


def test_load_refuses_labels_that_do_not_fit_the_bags(task, tmp_path):
    path = tmp_path / "organs.task"
    dataclasses.replace(task, labels={7: "spleen"}).save(path)
    with pytest.raises(CheckpointError, match="3 bags for 1 labels"):
        Task.load(path)
    dataclasses.replace(task, labels={0: "spleen", 300: "tumour"}).save(path)
    with pytest.raises(CheckpointError, match="labels 0, 300"):
        Task.load(path)


def test_register_refuses_more_labels_than_fit(grey_model, scan, preprocessing):
    image, label = scan
    many = np.arange(label.array.size, dtype=np.uint16).reshape(label.array.shape) % 257
    with pytest.raises(LabelError, match="256 labels"):
        register(
            grey_model, image, dataclasses.replace(label, array=many), preprocessing=preprocessing
        )


def test_load_model_takes_a_run_folder_or_its_file(tmp_path, preprocessing):
    model = FewShotUNet(encoder="resnet18")
    model.save(tmp_path / "model.safetensors", {"preprocessing": preprocessing.to_dict()})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        loaded = load_model(path)
        assert not loaded.training
        assert loaded.fingerprint() == model.fingerprint()
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(tmp_path / "absent")


def test_choose_slices_is_even_and_reaches_every_class():
    present = np.zeros((100, 2), dtype=bool)
    present[10:90, 0] = True
    present[95, 1] = True
    assert choose_slices(present[:, :1], 4) == [20, 40, 60, 80]
    assert choose_slices(present, 5) == [20, 40, 60, 80, 95]
    assert choose_slices(present, 1) == [50, 95]
    assert choose_slices(present, 4) == [23, 50, 76, 95]
    present[50:, 1] = True
    assert len(choose_slices(present, 9)) == 9


@given(
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5).filter(any), min_size=1, max_size=6),
    st.integers(1, 12),
)
def test_choose_slices_properties(columns, budget):
    present = np.array(columns).T
    chosen = choose_slices(present, budget)
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= max(budget, present.shape[1])
    assert present[chosen].any(axis=0).all()
    assert present[chosen].any(axis=1).all()


def test_class_indices_renumber_and_drop_the_rest():
    labels = torch.tensor([[0, 300, 7], [5, 7, 0]])
    assert class_indices(labels, [7, 300]).tolist() == [[0, 2, 1], [0, 1, 0]]


def test_metadata_is_plain_json(task, tmp_path):
    path = tmp_path / "organs.task"
    task.save(path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert "__metadata__" in json.loads(content[8 : 8 + size])
