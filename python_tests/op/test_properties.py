# SPDX-License-Identifier: Apache-2.0
"""Properties over random shapes, strides and bags (hypothesis)."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import Problem

from fastproto import proto_attention
from fastproto.op import reference


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    episodes, ways = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = st.one_of(st.integers(0, 9), st.integers(60, 70))
    bags = tuple(tuple(draw(size) for _ in range(ways)) for _ in range(episodes))
    return Problem(
        "random",
        bags,
        queries=draw(st.integers(1, 3)),
        dim=draw(st.integers(1, 70)),
        height=draw(st.integers(1, 12)),
        width=draw(st.integers(1, 12)),
        mean=draw(st.sampled_from([0.0, 3.0])),
        spare=draw(st.integers(0, 3)),
        layout=draw(st.sampled_from(["nchw", "channels_last", "strided"])),
    )


@settings(max_examples=60, deadline=None)
@given(problem=problems(), concat=st.booleans(), seed=st.integers(0, 1000))
def test_values_and_gradients_equal_the_reference(
    problem: Problem, concat: bool, seed: int
) -> None:
    feat, protos, offsets = problem.make(torch.float64, seed)
    results = []
    for op in (proto_attention, reference.proto_attention):
        f, p = feat.detach().requires_grad_(), protos.clone().requires_grad_()
        out = op(f, p, offsets, temperature=0.3, concat=concat)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
        grads = torch.autograd.grad((out * weight).sum(), (f, p), materialize_grads=True)
        results.append((out.detach(), *grads))
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(problem=problems(), seed=st.integers(0, 1000))
def test_the_order_of_prototypes_does_not_matter(problem: Problem, seed: int) -> None:
    feat, protos, offsets = problem.make(torch.float64, seed)
    shuffled = protos.clone()
    bounds = offsets.tolist()
    for begin, end in itertools.pairwise(bounds):
        order = torch.randperm(end - begin, generator=torch.Generator().manual_seed(seed))
        shuffled[begin:end] = protos[begin:end][order]
    one, other = (proto_attention(feat, p, offsets) for p in (protos, shuffled))
    assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(problem=problems(), seed=st.integers(0, 1000))
def test_scaling_and_shifting_a_feature_keeps_its_weights(problem: Problem, seed: int) -> None:
    feat, protos, offsets = problem.make(torch.float64, seed)
    if problem.dim == 1:
        return  # every vector is constant
    agg = proto_attention(feat, protos, offsets, concat=False) / feat.unsqueeze(2)
    moved = feat * 3 + 2
    other = proto_attention(moved, protos, offsets, concat=False) / moved.unsqueeze(2)
    usable = (feat > 1e-3).unsqueeze(2).expand_as(agg)
    varied = (feat.std(dim=2, keepdim=True) > 1e-3).unsqueeze(2).expand_as(agg)
    keep = usable & varied
    assert torch.allclose(agg[keep], other[keep], rtol=1e-6, atol=1e-6)
