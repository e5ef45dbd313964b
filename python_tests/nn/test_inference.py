# SPDX-License-Identifier: Apache-2.0
"""The network for inference against the one it was made from."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastproto.errors import ArgumentError
from fastproto.nn import FewShotUNet, PrototypeNet, Prototypes, base, inference
from fastproto.nn.inference import _fold_convolutions


def trained(kind: type, encoder: str = "resnet18", output_stride: int = 16) -> nn.Module:
    """A network whose normalisations have statistics, scales and shifts of their own."""
    torch.manual_seed(0)
    model = kind(encoder, output_stride=output_stride)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model.eval()


def support(model: nn.Module) -> tuple[Tensor, Prototypes]:
    images, masks = torch.randn(1, 3, 3, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.long)
    masks[..., 8:40, 16:48] = 1
    with torch.no_grad():
        return images, model.encode_support(images, masks).trim()


@pytest.mark.parametrize(
    ("kind", "encoder", "output_stride"),
    [
        (FewShotUNet, "resnet18", 16),
        (FewShotUNet, "resnet18", 8),
        (FewShotUNet, "resnet50", 16),
        (PrototypeNet, "resnet18", 8),
    ],
)
def test_folding_changes_nothing(kind: type, encoder: str, output_stride: int) -> None:
    model = trained(kind, encoder, output_stride).double()
    images, prototypes = support(model.float())
    model, prototypes = model.double(), prototypes.to(dtype=torch.float64)
    fast = model.for_inference(torch.float64)
    with torch.no_grad():
        want = model.segment(images.double(), prototypes)
        got = fast.segment(images.double(), prototypes)
    assert (got - want).abs().max() < 1e-8 * want.abs().max()
    left = [name for name, part in fast.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert all("norm_skip" in name for name in left)


class Named(nn.Module):
    """``layers`` one after the other, under their names."""

    def __init__(self, layers: str) -> None:
        super().__init__()
        for name in layers.split():
            layer = nn.BatchNorm2d(4) if name[0] in "bn" else nn.Conv2d(4, 4, 3, padding=1)
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("layers", "left"),
    [
        ("conv1 bn1 conv2 bn2", 0),
        ("bn1 conv1 bn2 conv2", 2),  # each belongs to the convolution after it
        ("conv norm", 1),
        ("conv1 conv2 bn1", 1),
        ("bn", 1),
    ],
)
@torch.no_grad()
def test_only_what_follows_its_convolution_is_folded(layers: str, left: int) -> None:
    module = Named(layers).eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
    images = torch.randn(1, 4, 8, 8)
    want = module(images)
    _fold_convolutions(module)
    torch.testing.assert_close(module(images), want)
    assert sum(isinstance(part, nn.BatchNorm2d) for part in module.modules()) == left


def test_bfloat16_is_near_and_the_network_itself_untouched() -> None:
    model = trained(FewShotUNet)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, prototypes = support(model)
    fast = model.for_inference(torch.bfloat16)
    assert {each.dtype for each in fast.parameters()} == {torch.bfloat16}
    assert not any(each.requires_grad for each in fast.parameters())
    with torch.no_grad():
        want = model.segment(images, prototypes)
        got = fast.segment(images.bfloat16(), prototypes.to(dtype=torch.bfloat16))
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.1 * want.norm()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(each.requires_grad for each in model.parameters())


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_dtype_by_what_the_processor_has(capabilities, dtype, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert inference.inference_dtype(torch.device("cpu")) == dtype


@pytest.fixture
def fast() -> nn.Module:
    """A copy for inference in float32, with graphs."""
    fast = trained(FewShotUNet).for_inference(torch.float32)
    fast.graphs = inference.Graphs()
    return fast


@pytest.fixture
def without_a_chip(pretended_streams: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CUDA graphs of a CPU: replaying runs the network again, into the same memory."""
    events: list[str] = []

    class Graph:
        def replay(self) -> None:
            events.append("replay")
            self.logits.copy_(self.run())

    class Captured(inference._Graph):
        def __init__(self, model: FewShotUNet, *args: object) -> None:
            super().__init__(model, *args)
            self._graph.logits = self._logits
            self._graph.run = lambda: model.decode(model.encode(self._images), self._prototypes)

    monkeypatch.setattr(base, "can_replay", lambda *args: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(inference, "_Graph", Captured)
    return events


def test_graphs_serve_every_number_of_prototypes(without_a_chip, fast) -> None:
    images, prototypes = support(fast)
    plain = trained(FewShotUNet).for_inference(torch.float32)
    few = prototypes.pick([[[0], [0]]])
    less = Prototypes(few.protos[:-3], few.offsets - few.offsets.new_tensor([0, 2, 3]), 2)
    results = []
    for mode in (torch.inference_mode, torch.no_grad):
        for bags in (few, less, few):
            for batch in (images, images.flip(1)):
                with mode():
                    got, want = fast.segment(batch, bags), plain.segment(batch, bags)
                torch.testing.assert_close(got, want)
                results.append((got, got.clone()))
    assert without_a_chip == ["replay"] * 11  # all but the first
    assert all(torch.equal(now, then) for now, then in results)  # in memory of their own


@torch.no_grad()
def test_graphs_of_old_shapes_go(without_a_chip: list[str], fast: nn.Module, monkeypatch) -> None:
    monkeypatch.setattr(inference, "_GRAPHS", 2)
    _, prototypes = support(fast)
    for size in (32, 32, 48, 64, 32):
        fast.segment(torch.randn(1, 1, 3, size, size), prototypes)
    assert without_a_chip == ["replay"]  # the last 32 is new again
    assert len(fast.graphs._captured) == 2


@torch.no_grad()
def test_a_shape_that_cannot_be_captured_runs_without_a_graph(
    without_a_chip, fast, monkeypatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(inference, "_Graph", fail)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    images, prototypes = support(fast)
    want = fast.segment(images, prototypes)
    with pytest.warns(UserWarning, match="no CUDA graph, so slower: operation not permitted"):
        assert torch.equal(fast.segment(images, prototypes), want)
    assert torch.equal(fast.segment(images, prototypes), want)  # said once


def test_graphs_stay_behind_when_a_network_moves_or_is_copied(fast: nn.Module) -> None:
    graphs = fast.graphs
    graphs._captured["a shape"] = None
    assert not copy.deepcopy(fast).graphs._captured
    assert not pickle.loads(pickle.dumps(fast)).graphs._captured
    assert fast.graphs is graphs
    fast.to(torch.float64)
    assert not fast.graphs._captured


def test_a_copy_for_inference_is_neither_trained_nor_saved(tmp_path: Path, fast: nn.Module) -> None:
    for use in (fast.train, fast.for_inference, lambda: fast.save(tmp_path / "model")):
        with pytest.raises(ArgumentError, match="a copy that for_inference made"):
            use()
    assert not list(tmp_path.iterdir())
    fast.eval()


def test_weights_of_half_a_width_are_folded_in_float32() -> None:
    model = trained(FewShotUNet).bfloat16()
    images, prototypes = support(copy.deepcopy(model).float())
    with torch.no_grad():
        want = copy.deepcopy(model).float().segment(images, prototypes)
        got = model.for_inference(torch.float32).segment(images, prototypes)
    assert (got - want).norm() < 1e-4 * want.norm()
