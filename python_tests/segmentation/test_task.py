# SPDX-License-Identifier: Apache-2.0
"""Task files and model files: what is kept, what is refused."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastproto.errors import CheckpointError
from fastproto.nn.weights import read_safetensors, write_safetensors
from fastproto.segmentation import Task, load_model, segment_volume
from fastproto.segmentation import task as task_module

NAMES = {7: "spleen", 300: "tumour"}


@pytest.fixture
def path(task, tmp_path):
    task.save(tmp_path / "organs.task")
    return tmp_path / "organs.task"


@pytest.mark.parametrize("prior", ["box", "affine"])
def test_round_trip(grey_model, teach, scan, make, tmp_path, prior):
    taught = teach(*scan, prior=prior)
    weights = {"decoder.head.bias": torch.randn(1).half()}
    task = replace(taught, weights=weights, adapted_steps=7)
    task.save(tmp_path / "organs.task")
    again = Task.load(tmp_path / "organs.task")
    assert again.labels == task.labels == NAMES
    for one, other in zip(again.organs, task.organs, strict=True):
        assert torch.equal(one.prototypes.protos, other.prototypes.protos)
        assert torch.equal(one.prototypes.offsets, other.prototypes.offsets)
        assert replace(one, prototypes=other.prototypes) == other
    assert again.preprocessing == task.preprocessing
    assert again.fingerprint == task.fingerprint
    assert again.adapted_steps == 7
    assert again.weights.keys() == weights.keys()
    assert torch.equal(again.weights["decoder.head.bias"], weights["decoder.head.bias"])
    (parts, described), (tensors, expected) = (each.atlas.to_parts() for each in (again, task))
    assert described == expected
    assert parts.keys() == tensors.keys()
    assert all(torch.equal(parts[name], tensors[name]) for name in parts)
    for one, other in zip(again.atlas.maps, task.atlas.maps, strict=True):
        assert np.array_equal(one.values, other.values)
    assert len(again.atlas.pictures) == (0 if prior == "box" else 2)
    one, other = (
        segment_volume(grey_model, each, make(4)[0], probabilities=True, prior="box")
        for each in (taught, replace(again, weights={}))
    )
    assert np.array_equal(one.labels, other.labels)
    assert all(np.array_equal(one.probabilities[v], other.probabilities[v]) for v in NAMES)


def test_the_file_is_plain_json_and_numbers_without_path_or_time(teach, scan, path, tmp_path):
    named = [replace(volume, path=tmp_path / "DOE^JANE.nii") for volume in scan]
    teach(*named).save(tmp_path / "again.task")
    content = path.read_bytes()
    assert b"DOE" not in content
    assert str(tmp_path).encode() not in content
    assert (tmp_path / "again.task").read_bytes() == content
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
    adapted = replace(task, weights={"weight": torch.tensor([3.0]).half()}).adapted(grey_model)
    assert adapted.weight.item() == 3.0
    assert adapted.weight.dtype == torch.float32
    assert grey_model.weight.item() == 1.0


def test_the_ready_network_is_kept_until_weights_change(task, network):
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


def without(name):
    return lambda tensors, header: (header if name in header else tensors).pop(name)


def organ(field, value):
    return lambda tensors, header: header["organs"][0].update({field: value})


def offsets(change):
    return lambda tensors, _: tensors.update({"offsets.0": change(tensors["offsets.0"])})


PARTS = ["organs", "preprocessing", "atlas", "fingerprint", "adapted_steps"]
PARTS += ["protos.1", "offsets.0", "atlas.distance.1"]
SENSELESS = {"side": (-1.0, None), "bias": ("much",), "slices": ([1], "few"), "colour": ("red",)}
SENSELESS["value"] = (0, 70000, 8)
DAMAGE = {
    **{f"no {name}": without(name) for name in PARTS},
    **{f"{name} {bad}": organ(name, bad) for name, all_ in SENSELESS.items() for bad in all_},
    "organs: none": lambda tensors, header: header["organs"].clear(),
    "offsets descend": offsets(lambda x: torch.cat([x[:1], x[2:3] + 1, x[2:]])),
    "offsets beyond": offsets(lambda x: torch.cat([x[:-1], x[-1:] + 1])),
    "offsets of another number": offsets(lambda x: x[:-1]),
    "offsets of another type": offsets(lambda x: x.long()),
}


class TestDamage:
    def refused(self, path, *words: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            Task.load(path)
        assert caught.value.subject == str(path)
        for word in words:
            assert word in str(caught.value)

    def test_what_is_no_task(self, task, path, tmp_path):
        bare = tmp_path / "prototypes.safetensors"
        task.organs[0].prototypes.save(bare, extra={})
        self.refused(bare, "kind 'prototypes'", "task file")
        tensors, header = read_safetensors(path)
        write_safetensors(path, tensors, {**header, "kind": "fastproto-task-1"})
        self.refused(path, "fastproto-task-1", "fastproto learn")
        path.write_bytes(pickle.dumps({"protos": [1.0]}))
        self.refused(path)
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

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_contents_that_do_not_fit(self, path, damage):
        tensors, header = read_safetensors(path)
        DAMAGE[damage](tensors, header)
        write_safetensors(path, tensors, header)
        missing = damage.removeprefix("no ") if damage.startswith("no ") else ""
        self.refused(path, "unusable contents", missing.removeprefix("atlas."))


MEANT = {"--model": "as --model", "--task": "as --task", "--example": "--example SCAN MASK"}
WRONG = {  # file -> what it is called, and what is said for a model and for a task
    "scan.nii.gz": ("an image or label map", "--example", "--example"),
    "scan.NRRD": ("an image or label map", "--example", "--example"),
    "organs.task": ("a task file", "--task", None),
    "run": ("the folder of a training", None, "--model"),
    "run/model.safetensors": ("a model", None, "--model"),
    "killed": ("the folder of a training", "without a model.safetensors", "--model"),
    "killed/state.safetensors": ("the state of a training", "", ""),
    "killed/config.json": ("a file that fastproto did not write", "", ""),
    "nothing": ("a folder", "without a model.safetensors", ""),
    "nowhere": ("no such file", "", ""),
    "empty.task": ("an empty file", "", ""),
    "cut.task": ("a truncated or damaged file", "", ""),
    "pointer.task": ("a Git LFS pointer", "", ""),
    "weights.pth": ("a pickle or a checkpoint of PyTorch", "", ""),
    "list.pkl": ("a pickle or a checkpoint of PyTorch", "", ""),
    "theirs.safetensors": ("a safetensors file of another program", "", ""),
    "prototypes.safetensors": ("a file of kind 'prototypes'", "", ""),
    "old.task": ("a task file of another version (fastproto-task-1)", "", ""),
    "notes.txt": ("a file that fastproto did not write", "", ""),
}


class TestWrongFiles:
    """What is given for a model or a task and is none is named in the user's words."""

    @pytest.fixture
    def folder(self, task, path, tmp_path, network, preprocessing):
        folder = tmp_path / "given"
        for name in ("run", "killed", "nothing"):
            (folder / name).mkdir(parents=True)
        content = path.read_bytes()
        (folder / "organs.task").write_bytes(content)
        (folder / "cut.task").write_bytes(content[: len(content) // 2])
        for name in ("scan.nii.gz", "scan.NRRD", "notes.txt", "killed/config.json"):
            (folder / name).write_bytes(
                b'{"labels": "of something else, long enough for a header"}'
            )
        (folder / "empty.task").write_bytes(b"")
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
        (folder / "pointer.task").write_text(pointer)
        torch.save({"w": torch.ones(3)}, folder / "weights.pth")
        (folder / "list.pkl").write_bytes(pickle.dumps([1, 2]))
        save_file({"w": torch.ones(3)}, folder / "theirs.safetensors")
        task.organs[0].prototypes.save(folder / "prototypes.safetensors")
        tensors, header = read_safetensors(path)
        write_safetensors(folder / "old.task", tensors, {**header, "kind": "fastproto-task-1"})
        extra = {"preprocessing": {"mr": preprocessing.to_dict()}}
        network.save(folder / "run" / "model.safetensors", extra)
        write_safetensors(folder / "killed/state.safetensors", tensors, {"kind": "training state"})
        return folder

    def test_every_one(self, folder):
        listed = {str(each.relative_to(folder)) for each in folder.rglob("*")}
        assert listed == WRONG.keys() - {"nowhere"}
        for name, (found, for_model, for_task) in WRONG.items():
            for load, hint in ((load_model, for_model), (Task.load, for_task)):
                if hint is None:
                    load(folder / name)
                    continue
                with pytest.raises(CheckpointError) as caught:
                    load(folder / name)
                assert caught.value.subject == str(folder / name)
                assert caught.value.found.startswith(found)
                made = "`fastproto learn`" if load == Task.load else "`fastproto train`"
                assert MEANT.get(hint, hint or made) in str(caught.value)
                assert len(str(caught.value).splitlines()) == 1

    def test_the_length_of_a_header_may_look_like_another_format(self, path):
        """A pickle begins with the byte 0x80."""
        tensors, header = read_safetensors(path)
        first = set()
        for padding in range(0, 256, 8):
            write_safetensors(path, tensors, {**header, "padding": "x" * padding})
            first.add(path.read_bytes()[0])
            assert Task.load(path).labels == NAMES
        assert 0x80 in first

    def test_what_may_not_be_read(self, folder, monkeypatch):
        def refuse(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("pathlib.Path.open", refuse)
        for load in (load_model, Task.load):
            with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\)"):
                load(folder / "organs.task")


class TestModels:
    def test_a_run_folder_or_its_file(self, tmp_path, preprocessing, network):
        extra = {"preprocessing": {"mr": preprocessing.to_dict()}}
        network.save(tmp_path / "model.safetensors", extra)
        for path in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
            loaded = load_model(path)
            assert not loaded.training
            assert loaded.fingerprint() == network.fingerprint()
            assert loaded.extra == extra
        assert load_model(tmp_path, backend="reference").backend == "reference"
        with pytest.raises(CheckpointError, match=r"absent: found no such file.*'base'"):
            load_model(tmp_path / "absent")

    def test_the_packages_own_by_its_name(self, tmp_path, monkeypatch, network):
        assert task_module.BASE_FILE.parts[-3:] == ("fastproto", "models", "base.safetensors")
        file = tmp_path / "models" / "base.safetensors"
        monkeypatch.setattr(task_module, "BASE_FILE", file)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CheckpointError, match="no base model in this installation"):
            load_model("base")
        half = copy.deepcopy(network).half()
        half.save(file, {"name": "base"})
        loaded = load_model("base")
        assert loaded.extra == {"name": "base"}
        assert loaded.encoder.conv1.weight.dtype == torch.float32
        assert torch.equal(loaded.encoder.conv1.weight.half(), half.encoder.conv1.weight)
        (tmp_path / "base").mkdir()  # a folder of that name needs a path
        half.save(tmp_path / "base" / "model.safetensors", {"name": "mine"})
        assert load_model("./base").extra == {"name": "mine"}
        assert load_model("base").extra == {"name": "base"}
