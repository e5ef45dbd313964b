# SPDX-License-Identifier: Apache-2.0
"""What only a GPU has: CUDA graphs, with and without torch.compile, and streams."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from support.problems import PROBLEMS, Problem
from torch import Tensor

from fastproto.op import library

Op = Callable[..., Tensor]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Problem("small", ((70, 5),), queries=2, dim=64, height=8, width=8)


def test_the_driver_knows_the_cuda_of_torch() -> None:
    known = library._driver_knows()
    assert torch.version.cuda is not None
    assert known is not None
    assert known // 1000 >= int(torch.version.cuda.split(".")[0])


def leaves(problem: Problem, dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    """Features and prototypes that want gradients, and offsets."""
    feat, protos, offsets = problem.make(dtype, seed, device)
    return [feat.requires_grad_(), protos.requires_grad_(), offsets]


def warm(function: Callable[[], object], stream: torch.cuda.Stream) -> None:
    """Compile and allocate outside the capture, on its stream."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", [SMALL, PROBLEMS[0], PROBLEMS[9]], ids=lambda p: p.name)
def test_cuda_graph_of_forward(
    op: Op, problem: Problem, dtype: torch.dtype, as_tensor: bool, device: str
) -> None:
    feat, protos, offsets = problem.make(dtype, device=device)
    t = torch.tensor(0.1, device=device) if as_tensor else 0.1

    def call() -> Tensor:
        return op(feat, protos, offsets, temperature=t)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    warm(call, stream)
    with torch.cuda.graph(graph, stream=stream):
        torch.cuda.set_sync_debug_mode("error")
        out = call()
        torch.cuda.set_sync_debug_mode("default")
    for seed in (1, 2):  # the same graph, other values
        feat.copy_(problem.make(dtype, seed, device)[0])
        protos.copy_(problem.make(dtype, seed, device)[1])
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, call())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", [SMALL, PROBLEMS[0], PROBLEMS[9]], ids=lambda p: p.name)
def test_cuda_graph_of_forward_and_backward(
    op: Op, problem: Problem, dtype: torch.dtype, device: str
) -> None:
    feat, protos, offsets = leaves(problem, dtype, device)
    t = torch.tensor(0.1, device=device, requires_grad=True)
    grad_out = torch.randn(problem.out_shape, device=device).to(dtype)

    def call() -> tuple[Tensor, ...]:
        out = op(feat, protos, offsets, temperature=t)
        return (out, *torch.autograd.grad(out, (feat, protos, t), grad_out))

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    warm(call, stream)
    with torch.cuda.graph(graph, stream=stream):
        torch.cuda.set_sync_debug_mode("error")
        results = call()
        torch.cuda.set_sync_debug_mode("default")
    with torch.no_grad():
        feat.copy_(problem.make(dtype, 1, device)[0])
        protos.copy_(problem.make(dtype, 1, device)[1])
        for result in results:
            result.fill_(float("nan"))
    graph.replay()
    for name, found, expected in zip("ofpt", results, call(), strict=True):
        assert torch.equal(found, expected), name


def test_offsets_may_change_between_replays(op: Op, device: str) -> None:
    """The host never knew them: one graph serves every number of prototypes."""
    feat, protos, offsets = SMALL.make(torch.bfloat16, device=device)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    warm(lambda: op(feat, protos, offsets), stream)
    with torch.cuda.graph(graph, stream=stream):
        out = op(feat, protos, offsets)
    for bounds in ([0, 3, 75], [0, 0, 1], [0, 40, 41]):
        offsets.copy_(torch.tensor(bounds, dtype=torch.int32))
        graph.replay()
        assert torch.equal(out, op(feat, protos, offsets))


def test_eager_calls_do_not_synchronize(op: Op, device: str) -> None:
    feat, protos, offsets = leaves(SMALL, torch.float32, device)
    t = torch.tensor(0.1, device=device, requires_grad=True)
    op(feat, protos, offsets, temperature=t).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    op(feat, protos, offsets, temperature=t).sum().backward()
    op(feat, protos, offsets, temperature=0.1).sum().backward()


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_compile_with_reduced_overhead(op: Op, training: bool, device: str) -> None:
    torch._dynamo.reset()

    def step(feat: Tensor, protos: Tensor, offsets: Tensor) -> Tensor:
        return op(feat * 2, protos, offsets).sin()

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for seed in range(5):  # warms up, records, replays
        torch.compiler.cudagraph_mark_step_begin()
        feat, protos, offsets = leaves(SMALL, torch.float32, device, seed)
        again = [feat.detach().clone().requires_grad_(), protos.detach().clone().requires_grad_()]
        with torch.set_grad_enabled(training):
            found, expected = compiled(feat, protos, offsets), step(*again, offsets)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        if training:
            found.sum().backward()
            expected.sum().backward()
            for a, b in zip((feat, protos), again, strict=True):
                scale = float(b.grad.abs().max())
                torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-4 * scale)


def test_runs_on_the_current_stream(op: Op, device: str) -> None:
    """Its input comes late on another stream: a launch anywhere else would read NaN."""
    feat, protos, offsets = SMALL.make(torch.float32, device=device)
    grad_out = torch.randn(SMALL.out_shape, device=device)
    wanted = [x.clone().requires_grad_() for x in (feat, protos)]
    expected = op(*wanted, offsets)
    expected_grads = torch.autograd.grad(expected, wanted, grad_out)
    late = torch.full_like(feat, float("nan")).requires_grad_()
    protos.requires_grad_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: some 25 ms
        with torch.no_grad():
            late.copy_(feat)
        out = op(late, protos, offsets)
        grads = torch.autograd.grad(out, (late, protos), grad_out)
    stream.synchronize()
    assert torch.equal(out, expected)
    for a, b in zip(grads, expected_grads, strict=True):
        assert torch.equal(a, b)


def test_streams_side_by_side(op: Op, device: str) -> None:
    """No state is shared between calls."""
    inputs = [SMALL.make(torch.bfloat16, seed, device) for seed in range(8)]
    expected = [op(*x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    found = []
    for stream, x in zip(streams, inputs, strict=True):
        with torch.cuda.stream(stream):
            found.append(op(*x))
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
