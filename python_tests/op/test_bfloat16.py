# SPDX-License-Identifier: Apache-2.0
"""bfloat16 on the CPU's bfloat16 units: what they take, and what must go to the float32 kernel.

On a CPU without such units the same tests hold the float32 kernel to the same yardstick.
"""

from __future__ import annotations

import functools

import pytest
import torch
from support.compare import assert_within_rounding
from support.problems import Problem
from torch import Tensor

from fastproto import proto_attention
from fastproto.op import reference

native = functools.partial(proto_attention, backend="native")

ORDINARY = [
    Problem("whole_tiles", ((64, 128),), dim=512),
    Problem("odd_bags", ((70, 2), (1, 0), (33, 17)), dim=64, height=9, width=7),
    Problem("many_blocks", ((300,),), queries=2, dim=32, height=5, width=13),
    Problem("channels_last", ((33, 81),), queries=2, dim=96, layout="channels_last"),
    Problem("strided", ((20, 40),), dim=64, height=7, width=9, layout="strided"),
    Problem("mean_10", ((40,),), dim=128, mean=10.0),
    Problem("duplicated", ((50,),), dim=64, duplicated=True),
    Problem("spare", ((20,),), dim=64, spare=100),
    Problem("odd_dim", ((40,),), dim=48),
]


@pytest.mark.parametrize("problem", ORDINARY, ids=lambda p: p.name)
@pytest.mark.parametrize("concat", [True, False])
def test_within_rounding(problem: Problem, concat: bool) -> None:
    assert_within_rounding(native, problem, torch.bfloat16, concat=concat)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_more_prototypes_than_fit_in_a_pass(dtype: torch.dtype) -> None:
    problem = Problem("n_2200", ((2200, 3),), dim=512, height=4, width=5)
    assert_within_rounding(native, problem, dtype)


def vectors(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).relu().bfloat16()


def spoil(vector: Tensor, how: str) -> None:
    """Makes a vector one whose mean cannot be taken out of a product afterwards."""
    if how == "constant":
        vector.fill_(3.0)
    elif how == "far":
        vector += 1000.0
    elif how == "first channel":
        vector[0] = 1e4
    elif how == "tiny":
        vector *= 1e-8


@pytest.mark.parametrize("how", ["constant", "far", "first channel", "tiny"])
@pytest.mark.parametrize("which", ["pixel", "prototype", "both"])
def test_unusual_vectors(how: str, which: str) -> None:
    feat, protos = vectors(1, 1, 64, 9, 9), vectors(40, 64, seed=1)
    if which != "prototype":
        spoil(feat[0, 0, :, 4, 4], how)
    if which != "pixel":
        spoil(protos[17], how)
    offsets = torch.tensor([0, 40], dtype=torch.int32)
    results = []
    for op, dtype in ((native, torch.bfloat16), (reference.proto_attention, torch.float64)):
        f, p = (x.detach().to(dtype, copy=True).requires_grad_() for x in (feat, protos))
        out = op(f, p, offsets)
        results.append([x.double() for x in (out, *torch.autograd.grad(out.sum(), (f, p)))])
    for value, truth in zip(*results, strict=True):
        assert torch.isfinite(value).all()
        # Relative to each vector's own size: one huge vector must not excuse the others.
        channels = -3 if value.dim() > 2 else -1
        error = (value - truth).norm(dim=channels)
        assert (error <= 0.02 * truth.norm(dim=channels) + 0.02).all()
