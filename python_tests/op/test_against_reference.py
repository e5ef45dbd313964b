# SPDX-License-Identifier: Apache-2.0
"""The native op against the float64 reference: values and gradients, all dtypes and problems."""

from __future__ import annotations

import functools

import pytest
import torch
from support.compare import assert_within_rounding, run
from support.problems import PROBLEMS, Problem

from fastproto import proto_attention
from fastproto.op import reference

native = functools.partial(proto_attention, backend="native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_within_rounding(problem: Problem, dtype: torch.dtype) -> None:
    assert_within_rounding(native, problem, dtype)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_float64_equals_the_reference(problem: Problem) -> None:
    ours = run(native, problem, torch.float64)
    truth = run(reference.proto_attention, problem, torch.float64)
    for name in ("out", "grad_feat", "grad_protos"):
        value, expected = getattr(ours, name), getattr(truth, name)
        scale = expected.abs().max() if expected.numel() else 1.0
        assert torch.allclose(value, expected, rtol=0, atol=float(1e-12 * scale)), name


@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("temperature", [0.001, 0.02, 0.025, 1.0, 50.0])
def test_temperatures(temperature: float, concat: bool) -> None:
    problem = Problem("t", ((70, 5),), dim=64, height=8, width=8)
    assert_within_rounding(native, problem, torch.float32, temperature=temperature, concat=concat)


def test_concat_is_the_features_and_the_product() -> None:
    feat, protos, offsets = PROBLEMS[1].make()
    both = native(feat, protos, offsets)
    product = native(feat, protos, offsets, concat=False)
    dim = feat.shape[2]
    assert torch.equal(both[:, :, :, dim:], product)
    assert torch.equal(both[:, :, :, :dim], feat.unsqueeze(2).expand_as(product))


def test_queries_share_one_support() -> None:
    problem = Problem("q", ((40, 9),), queries=5, dim=64)
    feat, protos, offsets = problem.make()
    together = native(feat, protos, offsets)
    for q in range(5):
        assert torch.equal(native(feat[:, q : q + 1], protos, offsets), together[:, q : q + 1])


def test_the_reference_backend_sums_half_types_in_float32() -> None:
    feat, protos, offsets = PROBLEMS[1].make(torch.bfloat16)
    wide = reference.proto_attention(feat.float(), protos.float(), offsets)
    out = proto_attention(feat, protos, offsets, backend="reference")
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, wide.to(torch.bfloat16))


def test_reference_is_differentiable_twice() -> None:
    problem = Problem("twice", ((3, 2),), dim=4, height=2, width=2, mean=3.0)
    feat, protos, offsets = problem.make(torch.float64)

    def op(f: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return proto_attention(f, p, offsets, temperature=0.5, backend="reference")

    assert torch.autograd.gradgradcheck(op, (feat.requires_grad_(), protos.requires_grad_()))


def test_native_says_that_it_has_no_second_derivative() -> None:
    feat, protos, offsets = PROBLEMS[-2].make()
    feat.requires_grad_()
    (grad,) = torch.autograd.grad(
        native(feat, protos, offsets).square().sum(), feat, create_graph=True
    )
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        grad.sum().backward()
