# SPDX-License-Identifier: Apache-2.0
"""The whole network on a GPU: one CUDA graph, one compiled graph, nothing asked of the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

pytest.importorskip("safetensors", reason="fastproto.nn imports safetensors")

from fastproto import FewShotUNet

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
