# SPDX-License-Identifier: Apache-2.0
"""Every edge the specification names, values that make no sense, memory and bits that repeat."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastproto import proto_attention
from support.compare import Result, run
from support.conformance import Backend, asked
from support.problems import Problem

SMALL = Problem("small", ((20, 10),), dim=64, height=4, width=8)


@asked("edges")
@pytest.mark.parametrize("bags", [(0,), (0, 3)], ids=str)
def test_empty_bag_gives_zero_and_no_gradient(
    backend: Backend, dtype: torch.dtype, bags: tuple[int, ...]
) -> None:
    """Also beside one that is not empty."""
    problem = Problem("empty", (bags,), dim=16, height=2, width=4)
    feat, protos, offsets = backend.leaves(problem, dtype)
    out = backend.call(feat, protos, offsets)
    assert torch.equal(out[0, :, 0, :16], feat[0])
    assert torch.equal(out[0, 0, 0, 16:], torch.zeros_like(feat[0, 0]))
    loss = out[:, :, 0, 16:].sum()
    grads = torch.autograd.grad(loss, (feat, protos), allow_unused=True, materialize_grads=True)
    assert torch.equal(grads[0], torch.zeros_like(feat))
    assert torch.equal(grads[1], torch.zeros_like(protos))


@asked("edges")
def test_one_prototype_has_weight_one(backend: Backend, dtype: torch.dtype) -> None:
    """It is copied, and nothing comes through its weight."""
    problem = Problem("one", ((1,),), queries=2, dim=40, height=2, width=4)
    feat, protos, offsets = backend.leaves(problem, dtype)
    with torch.no_grad():
        feat += torch.rand(feat.shape).to(feat)
        protos += torch.rand(protos.shape).to(protos)
    t = torch.tensor(0.05, device=backend.device, requires_grad=True)
    out = backend.call(feat, protos, offsets, temperature=t, concat=False)
    expected = protos.detach().reshape(1, 1, 40, 1, 1).expand_as(feat)
    single = dtype == torch.float32
    rtol, atol = (backend.copied, backend.copied_digits) if single else (0, 0)
    assert torch.allclose(out[:, :, 0], feat * expected, rtol=rtol, atol=atol)
    grads = torch.autograd.grad(out.sum(), (feat, protos, t))
    assert torch.allclose(grads[0], expected, rtol=rtol, atol=atol)
    if single:
        assert torch.allclose(grads[1][0], feat.detach().sum(dim=(0, 1, 3, 4)))
    assert grads[2].item() == 0


@asked("numbers")
@pytest.mark.parametrize("value", [0.0, 0.1, 0.75, 100.1])
def test_a_constant_feature_has_cosine_zero_with_everything(
    backend: Backend, any_dtype: torch.dtype, value: float
) -> None:
    """All weights are equal: G is the mean of the bag."""
    problem = Problem("constant", ((7,),), dim=48, height=2, width=4)
    feat, protos, offsets = backend.make(problem, any_dtype)
    protos.copy_(torch.rand(7, 48, dtype=torch.float64))
    protos[3] = value  # also with a constant prototype
    feat.fill_(value)
    out = backend.call(feat, protos, offsets, concat=False).double()
    mean = protos.double().mean(dim=0).reshape(1, 1, 1, 48, 1, 1)
    rtol, atol = backend.constant * torch.finfo(any_dtype).eps, 0.0
    if backend.constant_digits is not None:
        rtol = atol = backend.constant_digits
    assert torch.allclose(out, mean * feat.double().unsqueeze(2), rtol=rtol, atol=atol)


@asked("numbers")
def test_constant_vectors_have_finite_gradients(backend: Backend, dtype: torch.dtype) -> None:
    """They are divided by eps, which leaves float16's range."""
    if dtype == torch.float16:
        pytest.skip("a dead vector's gradient leaves the range of float16")
    problem = Problem("dead", ((12, 7),), dim=64, height=4, width=4, mean=3.0, constant=True)
    feat, protos, offsets = backend.leaves(problem, dtype)
    loss = backend.call(feat, protos, offsets).float().square().mean()
    for grad in torch.autograd.grad(loss, (feat, protos)):
        assert grad.isfinite().all()


@asked("numbers")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [1, 2, 70])
def test_bad_values_propagate_as_in_the_reference(
    backend: Backend, dtype: torch.dtype, count: int, bad: float
) -> None:
    """From a feature to its pixel, from a prototype to all of them."""
    problem = Problem("bad", ((count,),), dim=24, height=4, width=4)
    feat, protos, offsets = backend.make(problem, dtype)
    generator = torch.Generator().manual_seed(1)
    feat.copy_(torch.rand(feat.shape, generator=generator))
    protos.copy_(torch.rand(protos.shape, generator=generator))
    feat[0, 0, 3, 1, 2] = bad
    for in_protos in (False, True):
        if in_protos:
            protos[0, 5] = bad
        out = backend.call(feat, protos, offsets)
        expected = proto_attention(feat, protos, offsets, backend="reference")
        assert out.isnan().any()
        assert torch.equal(out.isnan(), expected.isnan())
    assert out[..., 24:, :, :].isnan().all()


@asked("numbers")
def test_nan_stays_in_its_pixel_and_its_bag(backend: Backend, dtype: torch.dtype) -> None:
    """All others keep their bits."""
    feat, protos, offsets = backend.make(SMALL, dtype)
    feat += 0.5
    clean = backend.call(feat, protos, offsets, concat=False)
    dirty = feat.clone()
    dirty[0, 0, 3, 1, 2] = float("nan")
    out = backend.call(dirty, protos, offsets, concat=False)
    assert out[0, 0, :, :, 1, 2].isnan().all()
    keep = torch.ones(4, 8, dtype=torch.bool, device=feat.device)
    keep[1, 2] = False
    assert torch.equal(out[..., keep], clean[..., keep])
    dirty = protos.clone()
    dirty[25, 7] = float("inf")
    out = backend.call(feat, dirty, offsets, concat=False)
    assert out[:, :, 1].isnan().all()
    assert torch.equal(out[:, :, 0], clean[:, :, 0])


@asked("numbers")
def test_a_bad_bag_leaves_its_neighbours_alone(backend: Backend, dtype: torch.dtype) -> None:
    """Tiles reach into the next bag, and into rows of none: nothing of them may leak."""
    problem = Problem("leak", ((5, 9),), dim=32, height=2, width=4, spare=50)
    feat, protos, offsets = backend.make(problem, dtype)
    results = []
    for poison in (0.5, float("nan")):
        protos[5:] = poison
        leaves = (feat.clone().requires_grad_(), protos.clone().requires_grad_())
        out = backend.call(*leaves, offsets)[:, :, 0]
        _, grad = torch.autograd.grad(out.float().square().sum(), leaves)
        results.append((out.detach(), grad[:5], grad[14:]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[1][2], torch.zeros_like(results[1][2]))


@asked("cpu")
def test_spare_rows_change_nothing_and_get_zero_gradient(backend: Backend) -> None:
    """They are never looked at."""
    problem = Problem("spare", ((8, 2),), dim=48, height=4, width=4, spare=80)
    feat, protos, offsets = backend.make(problem, torch.float32)
    protos[10:] = float("nan")
    out = backend.call(feat, protos.requires_grad_(), offsets)
    assert torch.equal(out.detach(), backend.call(feat, protos[:10].detach(), offsets))
    (grad,) = torch.autograd.grad(out.sum(), protos)
    assert torch.equal(grad[10:], torch.zeros(80, 48))
    assert grad[:10].abs().sum() > 0


@asked("unchecked")
@pytest.mark.parametrize(
    ("bounds", "wrong"),
    [
        ([0, 30, 10], [False, True]),  # falls
        ([0, 20, 31], [False, True]),  # past the last row
        ([5, 20, 30], [True, False]),  # does not begin at 0
        ([-3, 20, 30], [True, False]),
        ([0, -1, 30], [True, True]),
        ([0, -7, 30], [True, True]),
        ([0, -1000, 30], [True, True]),
        ([0, 2**31 - 1, 30], [True, True]),
        ([0, 2**31 - 1, -5], [True, True]),
    ],
    ids=str,
)
def test_offsets_that_make_no_sense_give_nan(
    backend: Backend, dtype: torch.dtype, bounds: list[int], wrong: list[bool]
) -> None:
    """The host does not read them: no plausible numbers, and nothing out of bounds."""
    feat, protos, _ = backend.make(SMALL, dtype)
    feat += 0.5  # no zeros: 0 times NaN is NaN, but times an untouched 0 would pass for a result
    feat.requires_grad_()
    protos.requires_grad_()
    offsets = torch.tensor(bounds, dtype=torch.int32, device=backend.device)
    out = backend.call(feat, protos, offsets, concat=False)
    for way, expected in enumerate(wrong):
        nan = out[:, :, way].isnan()
        assert bool(nan.all()) == expected
        assert bool(nan.any()) == expected
    grads = torch.autograd.grad(out.sum(), (feat, protos))
    assert grads[0].isnan().all()
    if bounds == [0, 20, 31]:  # a bag that makes sense, and one that does not
        assert grads[1][:20].isfinite().all()
        assert grads[1][20:].isnan().all()
    # On a GPU an access out of bounds would show here.
    assert torch.ones(1, device=backend.device).item() == 1


@asked("unchecked")
@pytest.mark.parametrize("t", [0.0, -0.05, -1.0, float("nan")])
def test_a_temperature_that_is_not_above_0_gives_nan(
    backend: Backend, dtype: torch.dtype, t: float
) -> None:
    """A tensor's; the host reads a number."""
    feat, protos, offsets = backend.make(SMALL, dtype)
    feat += 0.5
    tensor = torch.tensor(t, device=backend.device)
    out = backend.call(feat.requires_grad_(), protos, offsets, temperature=tensor, concat=False)
    assert out.isnan().all()
    (grad,) = torch.autograd.grad(out.sum(), feat)
    assert grad.isnan().all()


def assert_same(one: Result, other: Result) -> None:
    """To the bit."""
    for field in dataclasses.fields(one):
        assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


@asked("numbers")
def test_every_element_of_every_result_is_written(
    backend: Backend, dtype: torch.dtype, written: Problem
) -> None:
    """With deterministic algorithms torch fills uninitialised memory with NaN."""
    backend.check(written, dtype)
    plain = run(backend.call, written, dtype, device=backend.device)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1000, device=backend.device).isnan().all()
        filled = run(backend.call, written, dtype, device=backend.device)
    finally:
        torch.use_deterministic_algorithms(before)
    assert_same(plain, filled)


@asked("numbers")
def test_the_same_bits_every_time(
    backend: Backend, repeated_dtype: torch.dtype, repeated: Problem
) -> None:
    """On any number of threads, in any order of theirs: a missing barrier would change some."""
    backend.check(repeated, repeated_dtype)
    plain = run(backend.call, repeated, repeated_dtype, device=backend.device)
    for variation in backend.variations:
        with variation():
            again = run(backend.call, repeated, repeated_dtype, device=backend.device)
        assert_same(plain, again)
