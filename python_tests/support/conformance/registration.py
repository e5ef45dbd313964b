# SPDX-License-Identifier: Apache-2.0
"""The op as PyTorch sees it: opcheck, gradcheck, torch.compile, autocast, second derivatives."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from fastproto.op import autograd
from support.conformance import Backend, asked
from support.problems import Problem


@asked("opcheck")
def test_opcheck(backend: Backend, differentiated: Problem) -> None:
    """Of both ops, with a tensor and a number for temperature, with and without a backward."""
    forward, backward = (autograd.op(f"{backend.ops}_{name}") for name in ("fwd", "bwd"))
    feat, protos, offsets = backend.leaves(differentiated, torch.float32)
    detached = (feat.detach(), protos.detach(), offsets)
    t = torch.tensor(0.2, requires_grad=True)
    last = backend.modes
    torch.library.opcheck(forward, (feat, protos, offsets, t, 0.2, 1e-6, True, True, *last))
    torch.library.opcheck(forward, (feat, protos, offsets, None, 0.2, 1e-6, False, True))
    torch.library.opcheck(forward, (*detached, None, 0.2, 1e-6, False, False))
    out, *saved = forward(*detached, None, 0.2, 1e-6, True, True)
    rest = (*detached, None, *saved, 0.2, 1e-6, True, True, False)
    torch.library.opcheck(backward, (torch.randn_like(out), *rest))


@asked("float64")
@pytest.mark.parametrize("concat", [True, False])
def test_gradcheck(backend: Backend, differentiated: Problem, concat: bool) -> None:
    """By differences, temperature's too."""
    feat, protos, offsets = backend.leaves(differentiated, torch.float64)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def op(f: Tensor, p: Tensor, t: Tensor) -> Tensor:
        return backend.call(f, p, offsets, temperature=t, concat=concat)

    assert torch.autograd.gradcheck(op, (feat, protos, t), fast_mode=backend.fast)


@asked("torch")
def test_says_that_it_has_no_second_derivative(backend: Backend) -> None:
    """And who has."""
    feat, protos, offsets = backend.leaves(backend.differentiated[0], torch.float32)
    out = backend.call(feat, protos, offsets)
    (grad,) = torch.autograd.grad(out.square().sum(), feat, create_graph=True)
    with pytest.raises(NotImplementedError, match=rf'{backend.says}.*backend="reference"'):
        grad.sum().backward()


@asked("torch")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_compile_equals_eager_and_does_not_recompile_as_n_changes(
    backend: Backend, compiled: torch.dtype, layout: str
) -> None:
    """In one graph."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend.compiler)
    call = backend.call if backend.traced is None else backend.traced()
    large = backend.device == "cuda"

    def step(feat: Tensor, protos: Tensor, offsets: Tensor) -> Tensor:
        return call(feat * 2, protos, offsets).sin()

    graph = torch.compile(step, backend=counter, fullgraph=True)
    coarse = 3e-2 if compiled.itemsize == 2 else 1e-4
    for bag in [(20, 5), (7, 30), (2, 2), (60, 8), (33, 1)]:
        dim, side = (64, 8) if large else (16, 4)
        problem = Problem("n", (bag,), dim=dim, height=side, width=side, layout=layout)
        ours, theirs = (backend.leaves(problem, compiled) for _ in "ab")
        torch._dynamo.mark_dynamic(theirs[1], 0)
        expected, found = step(*ours), graph(*theirs)
        assert found.stride() == expected.stride()
        atol, rtol = (coarse, coarse) if large else (1e-6, 1e-5)
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
        grads = (
            torch.autograd.grad(out.float().sum(), leaves[:2])
            for out, leaves in ((found, theirs), (expected, ours))
        )
        for one, eager in zip(*grads, strict=True):
            scale = float(eager.abs().max())
            atol, rtol = (coarse * scale, 0.0) if large else (1e-5, 1e-5)
            torch.testing.assert_close(one, eager, rtol=rtol, atol=atol)
    assert counter.frame_count == 1


@asked("autocast")
def test_autocast_casts_to_its_dtype(backend: Backend, half: torch.dtype) -> None:
    """Whatever the types were; gradients have those."""
    problem = Problem("cast", ((70, 5),), queries=2, dim=64, height=8, width=8)
    problem = problem if backend.device == "cuda" else backend.differentiated[0]
    feat, protos, offsets = backend.leaves(problem, torch.float32)
    for given in (protos, protos.bfloat16()):
        with torch.autocast(backend.device, dtype=half):
            out = backend.call(feat, given, offsets)
        assert out.dtype == half
        assert torch.equal(out, backend.call(feat.to(half), given.to(half), offsets))
        grads = torch.autograd.grad(out.float().sum(), (feat, protos))
        assert grads[0].dtype == grads[1].dtype == torch.float32
