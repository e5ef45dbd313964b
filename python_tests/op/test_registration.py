# SPDX-License-Identifier: Apache-2.0
"""The op as PyTorch sees it: opcheck, gradcheck, torch.compile, autocast, determinism."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from support.problems import PROBLEMS, Problem
from torch import Tensor

import fastproto.op.native  # noqa: F401  (defines torch.ops.fastproto)
from fastproto import proto_attention

# A choice of small problems: opcheck runs each many times.
SMALL = [
    Problem("mixed", ((0, 1, 7), (5, 3, 0)), queries=2, dim=6, height=3, width=2),
    Problem(
        "channels_last", ((3, 7),), queries=2, dim=6, height=3, width=2, layout="channels_last"
    ),
    Problem("strided", ((3, 7),), dim=6, height=3, width=2, layout="strided"),
    Problem("spare", ((3, 1),), dim=6, height=1, width=1, spare=2),
]


@pytest.mark.parametrize("with_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("problem", SMALL, ids=lambda p: p.name)
def test_opcheck(problem: Problem, with_tensor: bool) -> None:
    feat, protos, offsets = problem.make(torch.float32)
    feat.requires_grad_()
    protos.requires_grad_()
    t = torch.tensor(0.2, requires_grad=True) if with_tensor else None
    torch.library.opcheck(
        torch.ops.fastproto.proto_attention_fwd.default,
        (feat, protos, offsets, t, 0.2, 1e-6, True, True),
    )
    torch.library.opcheck(
        torch.ops.fastproto.proto_attention_fwd.default,
        (feat.detach(), protos.detach(), offsets, None, 0.2, 1e-6, False, False),
    )


def test_opcheck_backward_and_template() -> None:
    feat, protos, offsets = SMALL[0].make(torch.float32)
    out, agg, stats = torch.ops.fastproto.proto_attention_fwd(
        feat, protos, offsets, None, 0.2, 1e-6, True, True
    )
    torch.library.opcheck(
        torch.ops.fastproto.proto_attention_bwd.default,
        (
            torch.randn_like(out),
            feat,
            protos,
            offsets,
            None,
            agg,
            stats,
            0.2,
            1e-6,
            True,
            True,
            False,
        ),
    )
    torch.library.opcheck(torch.ops.fastproto.null.default, (torch.rand(3, 4),))


@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("problem", SMALL, ids=lambda p: p.name)
def test_gradcheck(problem: Problem, concat: bool) -> None:
    feat, protos, offsets = problem.make(torch.float64)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def op(f: Tensor, p: Tensor, t: Tensor) -> Tensor:
        return proto_attention(f, p, offsets, temperature=t, concat=concat, backend="native")

    assert torch.autograd.gradcheck(op, (feat.requires_grad_(), protos.requires_grad_(), t))


def test_frozen_support_and_frozen_query() -> None:
    feat, protos, offsets = SMALL[0].make(torch.float32)
    both = proto_attention(feat.requires_grad_(), protos.requires_grad_(), offsets)
    expected = torch.autograd.grad(both.square().sum(), (feat, protos))
    query = proto_attention(feat, protos.detach(), offsets)
    assert torch.equal(torch.autograd.grad(query.square().sum(), feat)[0], expected[0])
    support = proto_attention(feat.detach(), protos, offsets)
    assert torch.equal(torch.autograd.grad(support.square().sum(), protos)[0], expected[1])


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_compile_equals_eager_and_does_not_recompile_as_n_changes(layout: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def step(feat: Tensor, protos: Tensor, offsets: Tensor) -> Tensor:
        return proto_attention(feat * 2, protos, offsets).sin()

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for background, organ in [(20, 5), (7, 30), (2, 2), (60, 8), (33, 1)]:
        problem = Problem("n", ((background, organ),), dim=16, height=4, width=4, layout=layout)
        feat, protos, offsets = problem.make(torch.float32)
        torch._dynamo.mark_dynamic(protos, 0)
        inputs = [(feat.clone().requires_grad_(), protos.clone().requires_grad_()) for _ in "ab"]
        torch._dynamo.mark_dynamic(inputs[1][1], 0)
        expected, actual = step(*inputs[0], offsets), compiled(*inputs[1], offsets)
        assert actual.stride() == expected.stride()
        assert torch.allclose(actual, expected, atol=1e-6)
        expected.sum().backward()
        actual.sum().backward()
        for eager, graph in zip(inputs[0], inputs[1], strict=True):
            assert torch.allclose(graph.grad, eager.grad, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("problem", PROBLEMS[:2] + PROBLEMS[9:10], ids=lambda p: p.name)
def test_the_same_bits_every_time_on_any_number_of_threads(
    problem: Problem, dtype: torch.dtype
) -> None:
    feat, protos, offsets = problem.make(dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            f, p = feat.clone().requires_grad_(), protos.clone().requires_grad_()
            out = proto_attention(f, p, offsets, backend="native")
            out.float().square().sum().backward()
            results.append((out.detach(), f.grad, p.grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_to_its_dtype(dtype: torch.dtype) -> None:
    feat, protos, offsets = SMALL[0].make(torch.float32)
    feat.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = proto_attention(feat, protos.to(torch.bfloat16), offsets)
    assert out.dtype == dtype
    expected = proto_attention(feat.to(dtype), protos.to(torch.bfloat16).to(dtype), offsets)
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert feat.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone() -> None:
    feat, protos, offsets = SMALL[0].make(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert proto_attention(feat, protos, offsets).dtype == torch.float64


def test_fake_tensors_have_the_strides_of_real_ones() -> None:
    for problem in SMALL:
        feat, protos, offsets = problem.make(torch.float32)
        real = proto_attention(feat, protos, offsets, backend="native")
        with torch._subclasses.FakeTensorMode() as mode:
            fake = [mode.from_tensor(x) for x in (feat, protos, offsets)]
            out = proto_attention(*fake, backend="native")
        assert (out.shape, out.stride()) == (real.shape, real.stride())
