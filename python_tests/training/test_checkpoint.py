# SPDX-License-Identifier: Apache-2.0
"""A checkpoint restores everything to the bit, and survives everything that can go wrong."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from torch import nn

import fastproto.nn.weights
from fastproto.errors import CheckpointError, OutputError
from fastproto.training.checkpoint import load_metadata, load_state, save_state


def trained(width: int = 3, steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(width)
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 1, 3))
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    advance(model, optimizer, steps)
    return model, optimizer


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps on random input, so that the random state counts too."""
    for _ in range(steps):
        optimizer.zero_grad()
        images = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
        model(images).square().mean().backward()
        optimizer.step()


def test_a_restored_run_goes_on_to_the_same_bits(tmp_path: Path):
    """Moments lie in memory as their parameters: the fused optimiser reads both side by side."""
    model, optimizer = trained()
    save_state(tmp_path / "state.safetensors", model, optimizer, {"step": 2, "note": "é"})
    advance(model, optimizer, 3)

    other, other_optimizer = trained(steps=0)
    torch.manual_seed(99)
    metadata = load_state(tmp_path / "state.safetensors", other, other_optimizer)
    assert metadata == load_metadata(tmp_path / "state.safetensors") == {"step": 2, "note": "é"}
    moments = other_optimizer.state[other[0].weight]
    for name in ("exp_avg", "exp_avg_sq"):
        assert moments[name].stride() == other[0].weight.stride()
    assert moments["step"].shape == ()
    advance(other, other_optimizer, 3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_state_before_the_first_step_has_no_moments(tmp_path: Path):
    model, optimizer = trained(steps=0)
    save_state(tmp_path / "s.safetensors", model, optimizer, {})
    load_state(tmp_path / "s.safetensors", *trained(steps=0))
    advance(*trained(), 1)


def test_another_model_is_refused(tmp_path: Path):
    save_state(tmp_path / "s.safetensors", *trained(3), {})
    with pytest.raises(CheckpointError, match="shape"):
        load_state(tmp_path / "s.safetensors", *trained(5))


def test_damaged_files_are_refused(tmp_path: Path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(CheckpointError):
        load_metadata(path)
    save_state(path, *trained(), {})
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\x80\x04K\x01.", whole[:-1] + b"\x7f"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load_metadata(path)
    fastproto.nn.weights.write_safetensors(path, {"a": torch.zeros(1)}, {"kind": "task"})
    with pytest.raises(CheckpointError, match="of kind 'task'"):
        load_metadata(path)


def test_a_full_disk_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "s.safetensors"
    save_state(path, *trained(), {"step": 1})

    def full(tensors: object, name: Path, **_: object) -> None:
        name.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fastproto.nn.weights, "save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        save_state(path, *trained(), {"step": 2})
    assert load_metadata(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]
