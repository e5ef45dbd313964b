# SPDX-License-Identifier: Apache-2.0
"""The yardstick itself: plain PyTorch passes on any machine, and exact ops with a fault do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastproto.op import reference
from fastproto.op.reference import aggregate, normalize
from support.compare import assert_within_rounding
from support.problems import PROBLEMS, Problem

Aggregate = Callable[[Tensor, Tensor, Tensor, float], Tensor]
ORDINARY = [p for p in PROBLEMS if not p.constant]  # eager centres a constant vector to noise
HALF = [torch.bfloat16, torch.float16]


def op_with(aggregate: Aggregate, compute: torch.dtype) -> Callable[..., Tensor]:
    """The reference with another way to G; only its result is rounded to the type of inputs."""

    def op(feat: Tensor, protos: Tensor, *args: Tensor, **options: Tensor | bool) -> Tensor:
        with mock.patch.object(reference, "aggregate", aggregate):
            out = reference.proto_attention(feat.to(compute), protos.to(compute), *args, **options)
        return out.to(feat.dtype)

    return op


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_plain_pytorch_passes(problem: Problem, dtype: torch.dtype) -> None:
    assert_within_rounding(op_with(aggregate, torch.float64), problem, dtype)
    if not problem.constant:  # float32 centres a constant vector to noise here
        assert_within_rounding(op_with(aggregate, torch.float32), problem, dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("problem", ORDINARY, ids=lambda p: p.name)
def test_pytorch_in_a_half_type_passes_where_its_cosines_may_be_rounded(
    problem: Problem, dtype: torch.dtype
) -> None:
    eps = torch.finfo(dtype).eps
    assert_within_rounding(reference.proto_attention, problem, dtype, rounding=eps)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_cosines_in_a_half_type_are_refused(dtype: torch.dtype) -> None:
    problem = Problem("half", ((64,),), dim=64)
    with pytest.raises(AssertionError, match=r"out: error .* eager"):
        assert_within_rounding(reference.proto_attention, problem, dtype, temperature=0.01)


def without_the_last_prototype(query: Tensor, protos: Tensor, t: Tensor, eps: float) -> Tensor:
    return aggregate(query, protos[:-1], t, eps)


def prototypes_not_centred(query: Tensor, protos: Tensor, t: Tensor, eps: float) -> Tensor:
    """In the norm alone: one centred operand centres the product."""
    key = protos / protos.norm(dim=-1, keepdim=True).clamp(min=eps)
    return torch.softmax(normalize(query, eps) @ key.T / t, dim=-1) @ protos


def eps_for_the_squared_norm(query: Tensor, protos: Tensor, t: Tensor, eps: float) -> Tensor:
    return aggregate(query, protos, t, eps**0.5)


def weights_in_bfloat16(query: Tensor, protos: Tensor, t: Tensor, eps: float) -> Tensor:
    cos = normalize(query, eps) @ normalize(protos, eps).T
    return torch.softmax(cos / t, dim=-1).bfloat16().to(protos) @ protos


def gradient_without_the_means(query: Tensor, protos: Tensor, t: Tensor, eps: float) -> Tensor:
    """<F, P> - D mean(F) mean(P), whose second term is taken for a constant."""

    def mean_and_rnorm(x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.mean(dim=-1, keepdim=True)
        norm = torch.linalg.vector_norm(x - mean, dim=-1, keepdim=True)
        return mean.detach(), 1 / norm.clamp(min=eps)

    (mean_q, rnorm_q), (mean_p, rnorm_p) = mean_and_rnorm(query), mean_and_rnorm(protos)
    product = query @ protos.T - query.shape[-1] * mean_q * mean_p.T
    wrong = torch.softmax(product * rnorm_q * rnorm_p.T / t, dim=-1) @ protos
    return aggregate(query, protos, t, eps).detach() + wrong - wrong.detach()


def with_gradient(argument: int, times: float) -> Aggregate:
    """The gradient of one argument is ``times`` too large; of F, what comes through c."""

    def faulty(*arguments: Any) -> Tensor:
        x = arguments[argument]
        wrong = x + (times - 1) * (x - x.detach())
        return aggregate(*arguments[:argument], wrong, *arguments[argument + 1 :])

    return faulty


# Faults, and where they change nothing or less than rounding may: all c are the same where the
# prototypes are, where a bag has one and where vectors have one channel; dt is a sum that cancels.
SAME = {"n_0", "n_1", "duplicated"}
FAULTS = [
    (without_the_last_prototype, {"n_0"}),
    (prototypes_not_centred, SAME | {"d_1"}),
    (gradient_without_the_means, SAME),
    (eps_for_the_squared_norm, {p.name for p in ORDINARY}),
    (weights_in_bfloat16, {"n_0", "n_1"}),
    (with_gradient(0, 1.01), SAME | {"d_1"}),
    (with_gradient(1, 1.01), {"n_0"}),
    (with_gradient(2, 1.01), SAME | {"d_1", "d_130", "n_64", "n_65", "mean_over_std_10"}),
]
FAULTS_IN_HALF = [
    *FAULTS[:3],
    (with_gradient(0, 2), SAME | {"d_1"}),
    (with_gradient(1, 1.5), {"n_0"}),
]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_faults_are_refused(problem: Problem, dtype: torch.dtype) -> None:
    """In half types, larger ones."""
    for fault, harmless in FAULTS_IN_HALF if dtype in HALF else FAULTS:
        op = op_with(fault, torch.float64)
        if problem.name in harmless:
            assert_within_rounding(op, problem, dtype)
        else:
            with pytest.raises(AssertionError, match="error"):
                assert_within_rounding(op, problem, dtype)
