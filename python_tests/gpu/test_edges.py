# SPDX-License-Identifier: Apache-2.0
"""Values that make no sense, memory that holds none, and bits that repeat."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.compare import run
from support.problems import PROBLEMS, Problem
from torch import Tensor

Op = Callable[..., Tensor]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SOME = [PROBLEMS[0], PROBLEMS[1], PROBLEMS[9], PROBLEMS[16], PROBLEMS[18]]
SMALL = Problem("small", ((20, 10),), dim=64, height=4, width=8)


def results(op: Op, problem: Problem, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Output and all gradients."""
    found = run(op, problem, dtype, device=device)
    return [found.out, found.grad_feat, found.grad_protos, found.grad_temperature]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", SOME, ids=lambda p: p.name)
def test_the_same_bits_every_time(
    op: Op, problem: Problem, dtype: torch.dtype, device: str
) -> None:
    first = results(op, problem, dtype, device)
    for _ in range(3):
        for name, a, b in zip("ofpt", first, results(op, problem, dtype, device), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", SOME, ids=lambda p: p.name)
def test_everything_is_written(op: Op, problem: Problem, dtype: torch.dtype, device: str) -> None:
    """With deterministic algorithms torch fills uninitialised memory with NaN."""
    expected = results(op, problem, dtype, device)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    probe = torch.empty(1000, device=device)
    assert probe.isnan().all()
    for name, a, b in zip("ofpt", expected, results(op, problem, dtype, device), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("bounds", "wrong"),
    [
        ([0, 30, 10], [False, True]),  # falls
        ([0, 20, 31], [False, True]),  # past the last row
        ([5, 20, 30], [True, False]),  # does not begin at 0
        ([-3, 20, 30], [True, False]),
        ([0, -7, 30], [True, True]),
        ([0, 2**31 - 1, 30], [True, True]),
    ],
    ids=str,
)
def test_offsets_that_make_no_sense_give_nan(
    op: Op, bounds: list[int], wrong: list[bool], device: str
) -> None:
    feat, protos, _ = SMALL.make(device=device)
    feat += 0.5  # no zeros: 0 times NaN is NaN, but times an untouched 0 would pass for a result
    feat.requires_grad_()
    protos.requires_grad_()
    offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
    out = op(feat, protos, offsets, concat=False)
    torch.cuda.synchronize()
    for way, expected in enumerate(wrong):
        nan = out[:, :, way].isnan()
        assert bool(nan.all()) == expected
        assert bool(nan.any()) == expected
    grads = torch.autograd.grad(out.sum(), (feat, protos))
    torch.cuda.synchronize()  # an access out of bounds would show here
    assert grads[0].isnan().all()
    assert torch.ones(1, device=device).item() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, -0.05, float("nan")])
def test_a_temperature_that_is_not_above_0_gives_nan(
    op: Op, value: float, dtype: torch.dtype, device: str
) -> None:
    feat, protos, offsets = SMALL.make(dtype, device=device)
    feat += 0.5
    feat.requires_grad_()
    t = torch.tensor(value, device=device)
    out = op(feat, protos, offsets, temperature=t, concat=False)
    assert out.isnan().all()
    (grad,) = torch.autograd.grad(out.sum(), feat)
    assert grad.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_vectors_have_cosine_0(op: Op, dtype: torch.dtype, device: str) -> None:
    """All weights equal: G is the mean of the bag."""
    protos = torch.randn(6, 64, device=device).to(dtype)
    feat = torch.full((1, 1, 64, 4, 4), 0.75, device=device, dtype=dtype)
    offsets = torch.tensor([0, 6], dtype=torch.int32, device=device)
    out = op(feat, protos, offsets, concat=False)[0, 0, 0].flatten(1).float()
    expected = (protos.float().mean(0) * 0.75)[:, None].expand_as(out)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_prototype_is_copied(op: Op, dtype: torch.dtype, device: str) -> None:
    feat = torch.ones(1, 1, 128, 4, 4, device=device, dtype=dtype)
    feat[:, :, ::2] = 2
    protos = torch.randn(1, 128, device=device).to(dtype)
    offsets = torch.tensor([0, 1], dtype=torch.int32, device=device)
    out = op(feat, protos, offsets, concat=False)
    expected = protos[0].view(1, 1, 1, 128, 1, 1) * feat.unsqueeze(2)
    if dtype == torch.float32:  # three TF32 products keep 22 bits of it
        torch.testing.assert_close(out, expected)
    else:
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_pixel_and_its_bag(op: Op, dtype: torch.dtype, device: str) -> None:
    feat, protos, offsets = SMALL.make(dtype, device=device)
    feat += 0.5
    clean = op(feat, protos, offsets, concat=False)
    dirty = feat.clone()
    dirty[0, 0, 3, 1, 2] = float("nan")
    out = op(dirty, protos, offsets, concat=False)
    assert out[0, 0, :, :, 1, 2].isnan().all()
    keep = torch.ones(4, 8, dtype=torch.bool, device=device)
    keep[1, 2] = False
    assert torch.equal(out[..., keep], clean[..., keep])
    dirty = protos.clone()
    dirty[25, 7] = float("inf")
    out = op(feat, dirty, offsets, concat=False)
    assert out[:, :, 1].isnan().all()
    assert torch.equal(out[:, :, 0], clean[:, :, 0])
