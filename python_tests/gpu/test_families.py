# SPDX-License-Identifier: Apache-2.0
"""Every family of the native backend's CUDA kernels, also those that the plan would not pick."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.compare import assert_within_rounding
from support.problems import PROBLEMS, Problem
from torch import Tensor

from fastproto import proto_attention
from fastproto.errors import ArgumentError
from fastproto.op import backends

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MANY = Problem("many", tuple((n, 96 - n) for n in range(0, 97, 24)), queries=2)


@pytest.fixture(params=backends.CUDA_FAMILIES)
def family(
    request: pytest.FixtureRequest, needs_native: None, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Forced for the test."""
    monkeypatch.setenv("FASTPROTO_CUDA_KERNELS", request.param)
    return request.param


def native(*args: object, **kwargs: object) -> Tensor:
    """``proto_attention`` on the native backend."""
    return proto_attention(*args, backend="native", **kwargs)  # type: ignore[arg-type]


@pytest.fixture
def runs() -> Callable[[Problem, torch.dtype], None]:
    """Skips what a family does not take, as the plan says."""

    def check(problem: Problem, dtype: torch.dtype) -> None:
        last = problem.layout == "channels_last"
        try:
            backends.explain(**problem.sizes, dtype=dtype, channels_last=last, save=True)
        except ArgumentError as error:
            pytest.skip(str(error))

    return check


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", [*PROBLEMS, MANY], ids=lambda p: p.name)
@pytest.mark.usefixtures("family")
def test_within_rounding(
    runs: Callable[[Problem, torch.dtype], None], problem: Problem, dtype: torch.dtype, device: str
) -> None:
    if problem.constant and dtype == torch.float16:
        pytest.skip("a dead vector's gradient leaves the range of float16")
    runs(problem, dtype)
    assert_within_rounding(native, problem, dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.usefixtures("family")
def test_expanded_features_and_gradients(
    runs: Callable[[Problem, torch.dtype], None],
    layout: torch.memory_format,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Strides of 0, of which a tensor map is made with care."""
    problem = Problem("expanded", ((40, 2, 7), (1, 0, 70)), queries=3, dim=64, height=4, width=16)
    runs(problem, dtype)
    _, protos, offsets = problem.make(dtype, device=device)
    generator = torch.Generator().manual_seed(5)

    def one(channels: int) -> Tensor:
        image = torch.rand(1, channels, 4, 16, generator=generator).to(device, dtype)
        return image.contiguous(memory_format=layout)[None]

    image, gradient = one(64), one(128)[None]
    results = []
    for dense in (False, True):
        feat, grad = image.expand(2, 3, 64, 4, 16), gradient.expand(2, 3, 3, 128, 4, 16)
        if dense:
            feat, grad = feat.contiguous(), grad.contiguous()
        leaves = (feat.detach().requires_grad_(), protos.detach().requires_grad_())
        out = native(*leaves, offsets)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours.float(), expected.float(), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("family")
def test_the_same_bits_every_time(
    runs: Callable[[Problem, torch.dtype], None], dtype: torch.dtype, device: str
) -> None:
    runs(MANY, dtype)
    results = []
    for _ in range(3):
        feat, protos, offsets = MANY.make(dtype, device=device)
        leaves = (feat.requires_grad_(), protos.requires_grad_())
        out = native(*leaves, offsets)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert torch.equal(found, expected)
