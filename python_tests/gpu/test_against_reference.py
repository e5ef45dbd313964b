# SPDX-License-Identifier: Apache-2.0
"""The op on a GPU against the float64 reference there: values and gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from support.compare import assert_within_rounding
from support.problems import PROBLEMS, Problem
from torch import Tensor

from fastproto import InputError, proto_attention
from fastproto.op import backends

Op = Callable[..., Tensor]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Problem("small", ((70, 5),), dim=64, height=8, width=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_within_rounding(op: Op, problem: Problem, dtype: torch.dtype, device: str) -> None:
    if problem.constant and dtype == torch.float16:
        pytest.skip("a dead vector's gradient leaves the range of float16")
    torch.set_float32_matmul_precision("highest")
    assert_within_rounding(op, problem, dtype, device=device)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_float32_with_tf32(op: Op, problem: Problem, device: str) -> None:
    torch.set_float32_matmul_precision("high")
    assert_within_rounding(op, problem, torch.float32, device=device, rounding=2**-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("temperature", [0.001, 0.02, 0.05, 1.0, 50.0])
def test_temperatures(
    op: Op, temperature: float, concat: bool, dtype: torch.dtype, device: str
) -> None:
    """Of a tensor: the yardstick asks for its gradient."""
    options = {"temperature": temperature, "concat": concat, "device": device}
    assert_within_rounding(op, SMALL, dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
def test_a_number_and_a_tensor_mean_the_same_temperature(
    op: Op, temperature: float, dtype: torch.dtype, device: str
) -> None:
    feat, protos, offsets = SMALL.make(dtype, device=device)
    number = op(feat, protos, offsets, temperature=temperature)
    t = torch.tensor(temperature, device=device)
    for tensor in (t, t.reshape(1), t.double()):
        found = op(feat, protos, offsets, temperature=tensor)
        torch.testing.assert_close(found, number, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(op: Op, layout: str, dtype: torch.dtype, concat: bool, device: str) -> None:
    problem = Problem("layout", ((33, 7),), queries=2, dim=96, height=7, width=9, layout=layout)
    assert_within_rounding(op, problem, dtype, concat=concat, device=device)
    feat, protos, offsets = problem.make(dtype, device=device)
    out = op(feat, protos, offsets, concat=concat)
    plain = dataclasses.replace(problem, layout="nchw").make(dtype, device=device)
    # Not to the bit: in another layout threads hold other elements and add in another order.
    torch.testing.assert_close(out, op(*plain, concat=concat))
    assert (out.stride(3) == 1) == (layout == "channels_last")


def test_wide_features_that_no_tile_holds(op: Op, backend: str, device: str) -> None:
    problem = Problem("wide", ((40, 3),), dim=1536, height=4, width=5)
    if backend == "native":
        with pytest.raises(InputError, match=r"1536|512"):
            op(*problem.make(device=device))
        return
    for dtype in DTYPES:
        assert_within_rounding(op, problem, dtype, device=device)


def test_many_bags(op: Op, device: str) -> None:
    """More tiles than multiprocessors, bags of every size from 0 to 96."""
    sizes = tuple((n, 96 - n) for n in range(0, 97, 6))
    problem = Problem("many", sizes, queries=2, dim=512)
    for dtype in (torch.bfloat16, torch.float32):
        assert_within_rounding(op, problem, dtype, device=device)


def test_float64_is_left_to_plain_pytorch(device: str) -> None:
    feat, protos, offsets = (x.to(device) for x in PROBLEMS[2].make(torch.float64))
    assert proto_attention(feat, protos, offsets).dtype == torch.float64
    for backend in ("native", "triton"):
        if backends.why_not(backend, device) is None:
            with pytest.raises(InputError, match="float64"):
                proto_attention(feat, protos, offsets, backend=backend)
