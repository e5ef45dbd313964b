# SPDX-License-Identifier: Apache-2.0
"""Weights from files: what is read, what is refused, and that nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import os
import pickle
import urllib.error
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastproto.errors import ArgumentError, CheckpointError, OutputError
from fastproto.nn import FewShotUNet, Prototypes, ResNetEncoder, weights
from fastproto.nn.encoders import ENCODERS
from fastproto.nn.weights import (
    checksum,
    load_encoder_weights,
    load_state,
    read_safetensors,
    write_safetensors,
)


class Payload:
    """Unpickling this makes a folder: the trace a test looks for."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("kind", ["bare", "zip"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".pkl", ""])
def test_a_pickle_never_runs(tmp_path: Path, kind: str, suffix: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / f"weights{suffix}"
    bare = pickle.dumps({"conv1.weight": Payload(trace)}, protocol=2)
    if kind == "bare":
        path.write_bytes(bare)
    else:
        torch.save({"conv1.weight": Payload(trace)}, path)
        assert zipfile.is_zipfile(path)
    with pytest.raises(CheckpointError) as caught:
        load_encoder_weights(ResNetEncoder("resnet18"), path)
    assert caught.value.subject == str(path)
    for reader in (FewShotUNet.load, Prototypes.load, read_safetensors):
        with pytest.raises(CheckpointError):
            reader(path)
    assert not trace.exists()
    pickle.loads(bare)  # The danger is real.
    assert trace.is_dir()


@pytest.fixture(scope="module")
def torchvision_state() -> dict[str, torch.Tensor]:
    """What torchvision's file of resnet18 holds: with a classifier, without batch counters."""
    torch.manual_seed(1)
    state = ResNetEncoder("resnet18").state_dict()
    state = {key: value for key, value in state.items() if "num_batches" not in key}
    return {**state, "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvision_file(tmp_path, torchvision_state, suffix) -> None:
    path = tmp_path / f"resnet18{suffix}"
    (torch.save if suffix == ".pth" else save_file)(torchvision_state, path)
    torch.manual_seed(2)
    model = FewShotUNet("resnet18", weights=path)
    state = model.encoder.state_dict()
    for key, value in torchvision_state.items():
        if not key.startswith("fc."):
            assert torch.equal(state[key], value), key


def test_wrong_encoder_files(tmp_path: Path, torchvision_state: dict[str, torch.Tensor]) -> None:
    encoder = ResNetEncoder("resnet34")
    state = encoder.state_dict()
    before = checksum(state)
    save_file(torchvision_state, tmp_path / "18.safetensors")
    save_file({**state, "conv1.weight": torch.zeros(64, 1, 7, 7)}, tmp_path / "grey.safetensors")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    (tmp_path / "folder.pth").mkdir()
    for name, match in (
        ("18.safetensors", r"missing \(layer1\.2\.conv1\.weight.*another architecture"),
        ("grey.safetensors", r"conv1.weight of shape \[64, 1, 7, 7\].*another architecture"),
        ("list.pth", "state dict"),
        ("absent.pth", "no such file"),
        ("folder.pth", "a folder"),
    ):
        with pytest.raises(CheckpointError, match=match):
            load_encoder_weights(encoder, tmp_path / name)
    assert checksum(encoder.state_dict()) == before


def test_truncated_pth(tmp_path: Path, torchvision_state: dict[str, torch.Tensor]) -> None:
    torch.save(torchvision_state, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    path = tmp_path / "weights.pth"
    for size in (0, 10, len(content) // 2, len(content) - 100):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            load_encoder_weights(ResNetEncoder("resnet18"), path)


def test_damaged_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    tensors = {"a": torch.arange(12.0).view(3, 4), "n": torch.tensor(3)}
    write_safetensors(path, tensors, {"kind": "test"})
    found, header = read_safetensors(path)
    assert header == {"kind": "test"}
    assert torch.equal(found["a"], tensors["a"])
    content = path.read_bytes()
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            read_safetensors(path)
    for position in (len(content) - 1, len(content) - 20):  # a flipped bit among the values
        damaged = bytearray(content)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="checksum"):
            read_safetensors(path)
    for metadata in (None, {"fastproto": "[1]"}):
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(CheckpointError, match="header"):
            read_safetensors(path)


def test_checksum_sees_names_shapes_types_and_values() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    different = [
        {"a": torch.zeros(3, 2), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3), "c": torch.ones(2)},
        {"a": torch.zeros(2, 3), "b": torch.ones(2).bfloat16()},
        {"a": torch.zeros(2, 3), "b": torch.tensor([1.0, 1.0000001])},
    ]
    assert checksum(dict(reversed(base.items()))) == checksum(base)
    assert len({checksum(state) for state in [base, *different]}) == 5


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.safetensors"
    write_safetensors(path, {"a": torch.ones(1)}, {})
    before = path.read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise weights.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        write_safetensors(path, {"a": torch.zeros(1)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ArgumentError, match="JSON"):
        write_safetensors(path, {}, {"extra": {"path": tmp_path}})


def test_load_state_says_which_keys() -> None:
    with pytest.raises(CheckpointError, match=r"1 missing \(bias\) and 1 unknown \(scale\) keys"):
        load_state(nn.Linear(2, 2), {"weight": torch.ones(2, 2), "scale": torch.ones(2)}, "file")


def test_load_state_refuses_another_kind_of_number() -> None:
    module = nn.BatchNorm1d(3)
    for name, value in (("weight", torch.ones(3, dtype=torch.int8)), ("num_batches_tracked", 1.0)):
        with pytest.raises(CheckpointError, match=rf"file: found {name} of shape .*torch\."):
            load_state(module, {**module.state_dict(), name: torch.as_tensor(value)}, "file")


def test_a_model_in_half_precision_is_float32_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FewShotUNet("resnet18").half()
    model.save(tmp_path / "half.safetensors")
    loaded = FewShotUNet.load(tmp_path / "half.safetensors").state_dict()
    assert {value.dtype for value in loaded.values()} == {torch.float32, torch.int64}
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name].to(value.dtype), value), name


@pytest.mark.parametrize(
    "file",
    [
        "resnet18-f37072fd.pth",
        "resnet34-b627a593.pth",
        "resnet50-0676ba61.pth",
        "resnet101-63fe2227.pth",
    ],
)
def test_imagenet_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    asked = []

    def no_network(url: str, timeout: float) -> None:
        asked.append(url)
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setenv("FASTPROTO_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as caught, torch.device("meta"):
        FewShotUNet(file.partition("-")[0], weights="imagenet")
    url = f"https://download.pytorch.org/models/{file}"
    assert asked == [url]
    for what in (url, str(tmp_path / file), "FASTPROTO_CACHE"):
        assert what in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_imagenet_download_and_cache(tmp_path, monkeypatch, torchvision_state) -> None:
    server, cache = tmp_path / "server", tmp_path / "cache"
    server.mkdir()
    torch.save(torchvision_state, server / "file")
    digest = hashlib.sha256((server / "file").read_bytes()).hexdigest()
    name = f"resnet18-{digest[:8]}.pth"
    (server / "file").rename(server / name)
    monkeypatch.setenv("FASTPROTO_CACHE", str(cache))
    monkeypatch.setitem(ENCODERS, "resnet18", ENCODERS["resnet18"]._replace(imagenet=name))
    monkeypatch.setattr(weights, "IMAGENET_URL", f"{server.as_uri()}/")
    encoder = ResNetEncoder("resnet18")
    load_encoder_weights(encoder, "imagenet")
    assert torch.equal(encoder.conv1.weight, torchvision_state["conv1.weight"])
    assert [path.name for path in cache.iterdir()] == [name]

    (server / name).unlink()  # from now on only the cache can answer
    load_encoder_weights(ResNetEncoder("resnet18"), "imagenet")

    (cache / name).write_bytes(b"tampered")
    with pytest.raises(CheckpointError, match="SHA-256") as caught:
        load_encoder_weights(encoder, "imagenet")
    assert caught.value.subject == str(cache / name)

    (cache / name).unlink()
    (server / name).write_bytes(b"tampered")
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_encoder_weights(encoder, "imagenet")
    assert list(cache.iterdir()) == []  # a wrong download never gets into the cache
