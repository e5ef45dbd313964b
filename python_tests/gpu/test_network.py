# SPDX-License-Identifier: Apache-2.0
"""The whole network on a GPU: one CUDA graph, one compiled graph, nothing asked of the device."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from unittest.mock import MagicMock

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

pytest.importorskip("safetensors", reason="fastproto.nn imports safetensors")

from fastproto import FewShotUNet
from fastproto.losses import EpisodeLoss

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture
def forward(backend: str, device: str) -> Forward:
    """Support, masks and queries to logits, in bfloat16, as inference runs it."""
    torch.manual_seed(0)
    model = FewShotUNet("resnet18", backend=backend).eval().to(device)

    def run(support: Tensor, masks: Tensor, query: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
            prototypes = model.encode_support(support, masks, num_classes=3)
            return model.segment(query, prototypes)

    return run


def episode(seed: int, device: str) -> list[Tensor]:
    """One annotated image of three classes, two queries; the classes' sizes depend on ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    support = torch.randn(1, 1, 3, 128, 128, generator=generator)
    query = torch.randn(1, 2, 3, 128, 128, generator=generator)
    edge = 16 * (1 + seed)
    masks = torch.zeros(1, 1, 128, 128, dtype=torch.int64)
    masks[..., edge:] = 1
    masks[..., :32, 96:] = 2
    return [x.to(device) for x in (support, masks, query)]


def close(found: Tensor, expected: Tensor) -> None:
    """To bfloat16's digits through some forty layers."""
    assert found.shape == expected.shape
    assert found.isfinite().all()
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    assert error < 0.05, error


def test_one_cuda_graph(forward: Forward, device: str) -> None:
    inputs = episode(0, device)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        torch.cuda.set_sync_debug_mode("error")
        logits = forward(*inputs)
        torch.cuda.set_sync_debug_mode("default")
    for seed in (1, 2):  # other images, other numbers of prototypes
        for held, new in zip(inputs, episode(seed, device), strict=True):
            held.copy_(new)
        logits.fill_(float("nan"))
        graph.replay()
        close(logits, forward(*inputs))


def test_one_compiled_graph(forward: Forward, device: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(forward, backend=counter, fullgraph=True)
    for seed in (0, 1, 2):
        inputs = episode(seed, device)
        close(compiled(*inputs), forward(*inputs))
    assert counter.frame_count == 1


def test_backends_agree(forward: Forward, backend: str, device: str) -> None:
    torch.manual_seed(0)
    plain = FewShotUNet("resnet18", backend="reference").eval().to(device)
    support, masks, query = episode(0, device)
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        expected = plain(support, masks, query, num_classes=3)
    close(forward(support, masks, query), expected)


def test_for_inference_replays_what_it_would_compute(backend: str, device: str) -> None:
    torch.manual_seed(0)
    model = FewShotUNet("resnet18", backend=backend).eval().to(device)
    support, masks, query = episode(0, device)
    with torch.no_grad():
        prototypes = model.encode_support(support, masks, num_classes=3).trim()
        expected = model.segment(query, prototypes)
    fast = model.for_inference()
    assert fast.encoder.conv1.weight.dtype == torch.bfloat16
    bags = prototypes.to(dtype=torch.bfloat16)
    results = []
    for images in (query, query.flip(1), query):  # eager, captured, replayed
        with torch.inference_mode():
            results.append(fast.segment(images.bfloat16(), bags))
    close(results[0], expected)
    close(results[1], expected.flip(1))
    close(results[2], expected)
    few = bags.pick([[[0], [0], [0]]])
    shorter = few.offsets.clamp(max=int(few.offsets[-1]) - 2)
    less = type(bags)(few.protos[:-2].contiguous(), shorter, 3)
    with torch.inference_mode():
        close(
            fast.segment(query.bfloat16(), less), model.segment(query, less.to(dtype=query.dtype))
        )


@pytest.mark.parametrize("low_precision", [False, True])
def test_captured_training_steps(backend: str, device: str, low_precision: bool) -> None:
    if importlib.util.find_spec("SimpleITK") is None:  # nothing here reads a file
        sys.modules["SimpleITK"] = MagicMock()
    training = pytest.importorskip("fastproto.training.step", exc_type=ImportError)
    episodes = importlib.import_module("fastproto.training.episodes")

    def batch(seed: int) -> object:
        generator = torch.Generator().manual_seed(seed)
        masks = torch.zeros(2, 1, 64, 64, dtype=torch.int64)
        masks[..., 8 : 40 + seed, 16:48] = 1
        images = [torch.randn(2, 1, 3, 64, 64, generator=generator) for _ in range(2)]
        return episodes.Episode(images[0], masks, images[1], masks.clone(), 2, "random")

    found = []
    for capture in (False, True):
        torch.manual_seed(0)
        model = FewShotUNet("resnet18", backend=backend).to(device).train()
        model = model.to(memory_format=torch.channels_last)
        step = training.Step(
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
            EpisodeLoss(class_weights=torch.tensor([0.2, 1.0], device=device)),
            1.0,
            lambda: torch.autocast(device, torch.bfloat16, enabled=low_precision),
            capture=capture,
        )
        found.append([step(batch(seed), 1e-4 / (1 + seed))["loss"] for seed in range(8)])
        assert (step._graph is not None) == capture
        before = [parameter.clone() for parameter in model.parameters()]
        bad = batch(9)
        bad.query_images[0, 0, 0, 3, 3] = float("nan")
        assert not math.isfinite(step(bad, 1e-4)["loss"])
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    # Sums of atomics differ from run to run, and a step amplifies that.
    assert found[0] == pytest.approx(found[1], rel=0.05)
