# SPDX-License-Identifier: Apache-2.0
"""Task files and model files: what is kept, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch

from fastproto.errors import CheckpointError
from fastproto.nn import FewShotUNet
from fastproto.nn.weights import read_safetensors, write_safetensors
from fastproto.segmentation import Task, load_model, register
from fastproto.segmentation import task as task_module

NAMES = {7: "spleen", 300: "tumour"}


@pytest.mark.parametrize("prior", ["box", "affine"])
def test_round_trip(grey_model, scan, preprocessing, tmp_path, prior):
    task = register(grey_model, *scan, labels=NAMES, preprocessing=preprocessing, prior=prior)
    weights = {"decoder.head.bias": torch.randn(1).half()}
    task = dataclasses.replace(task, weights=weights, adapted_steps=7)
    path = tmp_path / "organs.task"
    task.save(path)
    again = Task.load(path)
    assert again.labels == task.labels == NAMES
    for one, other in zip(again.organs, task.organs, strict=True):
        assert torch.equal(one.prototypes.protos, other.prototypes.protos)
        assert torch.equal(one.prototypes.offsets, other.prototypes.offsets)
        for field in dataclasses.fields(one):
            if field.name != "prototypes":
                assert getattr(one, field.name) == getattr(other, field.name), field.name
    assert again.preprocessing == task.preprocessing
    assert again.fingerprint == task.fingerprint
    assert again.adapted_steps == 7
    assert again.weights.keys() == weights.keys()
    assert torch.equal(again.weights["decoder.head.bias"], weights["decoder.head.bias"])
    (parts, fields), (tensors, expected) = (each.atlas.to_parts() for each in (again, task))
    assert fields == expected
    assert parts.keys() == tensors.keys()
    assert all(torch.equal(parts[name], tensors[name]) for name in parts)
    for one, other in zip(again.atlas.maps, task.atlas.maps, strict=True):
        assert np.array_equal(one.values, other.values)
    assert len(again.atlas.pictures) == (0 if prior == "box" else 2)


def test_the_file_holds_no_path_and_no_time(task, scan, grey_model, preprocessing, tmp_path):
    named = [dataclasses.replace(volume, path=tmp_path / "DOE^JANE.nii") for volume in scan]
    path = tmp_path / "organs.task"
    register(grey_model, *named, labels=NAMES, preprocessing=preprocessing, prior="box").save(path)
    content = path.read_bytes()
    assert b"DOE" not in content
    assert str(tmp_path).encode() not in content
    task.save(tmp_path / "again.task")
    assert (tmp_path / "again.task").read_bytes() == content


def test_metadata_is_plain_json(task, tmp_path):
    path = tmp_path / "organs.task"
    task.save(path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert "__metadata__" in json.loads(content[8 : 8 + size])


def test_a_task_refuses_another_model(task, grey_model):
    task.check_model(grey_model)
    with torch.no_grad():
        grey_model.weight.add_(1)
    with pytest.raises(CheckpointError, match=r"organs\.task: found prototypes of another model"):
        task.check_model(grey_model, name="organs.task")


def test_adapted_weights_go_into_a_copy(task, grey_model):
    assert task.adapted(grey_model) is grey_model
    task = dataclasses.replace(task, weights={"weight": torch.tensor([3.0]).half()})
    adapted = task.adapted(grey_model)
    assert adapted.weight.item() == 3.0
    assert adapted.weight.dtype == torch.float32
    assert grey_model.weight.item() == 1.0


class TestDamage:
    @pytest.fixture
    def path(self, task, tmp_path):
        task.save(tmp_path / "organs.task")
        return tmp_path / "organs.task"

    def refused(self, path, *words: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            Task.load(path)
        assert caught.value.subject == str(path)
        for word in words:
            assert word in str(caught.value)

    def change(self, path, *, drop: str = "", header: dict | None = None, **tensors):
        known, fields = read_safetensors(path)
        known = {name: value for name, value in known.items() if name != drop}
        write_safetensors(path, known | tensors, {**fields, **(header or {})})

    def test_what_is_no_task(self, task, path, tmp_path):
        bare = tmp_path / "prototypes.safetensors"
        task.organs[0].prototypes.save(bare, extra={})
        self.refused(bare, "kind 'prototypes'", "task file")
        self.change(path, header={"kind": "fastproto-task-1"})
        self.refused(path, "fastproto-task-1", "fastproto learn")
        pickled = tmp_path / "evil.task"
        pickled.write_bytes(pickle.dumps({"protos": [1.0]}))
        self.refused(pickled)
        self.refused(tmp_path / "absent.task", "no such file")

    def test_cut_off_and_flipped(self, path):
        content = path.read_bytes()
        for size in (0, 100, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            self.refused(path)
        flipped = bytearray(content)
        flipped[-5] ^= 4
        path.write_bytes(flipped)
        self.refused(path, "checksum")

    @pytest.mark.parametrize(
        "field", ["organs", "preprocessing", "atlas", "fingerprint", "adapted_steps"]
    )
    def test_a_field_is_missing(self, path, field):
        tensors, header = read_safetensors(path)
        del header[field]
        write_safetensors(path, tensors, header)
        self.refused(path, field)

    @pytest.mark.parametrize("name", ["protos.1", "offsets.0", "atlas.distance.1"])
    def test_a_tensor_is_missing(self, path, name):
        self.change(path, drop=name)
        self.refused(path, "unusable contents")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("value", 0), ("value", 70000), ("value", 8), ("side", -1.0), ("side", None),
            ("bias", "much"), ("slices", [1]), ("slices", "few"),
            ("colour", "red"),
        ],
    )  # fmt: skip
    def test_an_organ_that_makes_no_sense(self, path, field, value):
        _, header = read_safetensors(path)
        organs = header["organs"]
        organs[0] = {**organs[0], field: value}
        self.change(path, header={"organs": organs})
        self.refused(path, "unusable contents")

    def test_no_organ_at_all(self, path):
        self.change(path, header={"organs": []})
        self.refused(path, "unusable contents")

    @pytest.mark.parametrize("change", ["descending", "beyond", "odd", "other type"])
    def test_offsets_that_do_not_fit(self, path, change):
        offsets = read_safetensors(path)[0]["offsets.0"].clone()
        if change == "descending":
            offsets[1] = offsets[2] + 1
        elif change == "beyond":
            offsets[-1] += 1
        elif change == "odd":
            offsets = offsets[:-1]
        else:
            offsets = offsets.long()
        self.change(path, **{"offsets.0": offsets})
        self.refused(path, "unusable contents")


class TestModels:
    def test_a_run_folder_or_its_file(self, tmp_path, preprocessing):
        model = FewShotUNet(encoder="resnet18")
        extra = {"preprocessing": {"mr": preprocessing.to_dict()}}
        model.save(tmp_path / "model.safetensors", extra)
        for path in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
            loaded = load_model(path)
            assert not loaded.training
            assert loaded.fingerprint() == model.fingerprint()
            assert loaded.extra == extra
        assert load_model(tmp_path, backend="reference").backend == "reference"
        with pytest.raises(CheckpointError, match=r"absent: found no such file.*'base'"):
            load_model(tmp_path / "absent")

    def test_the_packages_own_by_its_name(self, tmp_path, monkeypatch):
        file = tmp_path / "models" / "base.safetensors"
        monkeypatch.setattr(task_module, "BASE_FILE", file)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CheckpointError, match="no base model in this installation"):
            load_model("base")
        torch.manual_seed(0)
        model = FewShotUNet(encoder="resnet18").half()
        model.save(file, {"name": "base"})
        loaded = load_model("base")
        assert loaded.extra == {"name": "base"}
        assert loaded.encoder.conv1.weight.dtype == torch.float32
        assert torch.equal(loaded.encoder.conv1.weight.half(), model.encoder.conv1.weight)
        (tmp_path / "base").mkdir()  # a folder of that name needs a path
        other = FewShotUNet(encoder="resnet18")
        other.save(tmp_path / "base" / "model.safetensors", {"name": "mine"})
        assert load_model("./base").extra == {"name": "mine"}
        assert load_model("base").extra == {"name": "base"}

    def test_it_is_looked_for_in_the_package(self):
        assert task_module.BASE_FILE.parts[-3:] == ("fastproto", "models", "base.safetensors")


def test_the_ready_network_is_kept_until_weights_change(task) -> None:
    torch.manual_seed(0)
    network = FewShotUNet("resnet18").eval()
    ready = task.ready(network)
    assert task.ready(network) is ready
    size = len(pickle.dumps(task))
    task._ready.clear()
    assert len(pickle.dumps(task)) == size  # it does not travel
    assert task.ready(network) is not ready
    task.weights["decoder.head.bias"] = torch.tensor([5.0])
    assert task.ready(network).decoder.head.bias.item() == 5
    task.weights["decoder.head.bias"].fill_(7.0)
    assert task.ready(network).decoder.head.bias.item() == 7
    assert len(task._ready) == 1
    assert copy.deepcopy(task).ready(network).decoder.head.bias.item() == 7
