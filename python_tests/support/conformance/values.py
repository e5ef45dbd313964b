# SPDX-License-Identifier: Apache-2.0
"""Values and gradients against the float64 reference; features in memory of every kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from fastproto import proto_attention
from fastproto.op import reference
from support.compare import NAMES, out_within_rounding, run
from support.conformance import Backend, asked, offsets_of
from support.problems import Problem


@asked("numbers")
def test_within_rounding(backend: Backend, dtype: torch.dtype, problem: Problem) -> None:
    """The whole list, or what is affordable."""
    backend.hold(problem, dtype)


@asked("float64")
def test_float64_equals_the_reference(backend: Backend, in_float64: Problem) -> None:
    """To the last digits."""
    ours = run(backend.call, in_float64, torch.float64)
    truth = run(reference.proto_attention, in_float64, torch.float64)
    for name in NAMES:
        value, expected = getattr(ours, name), getattr(truth, name)
        scale = float(expected.abs().max()) if expected.numel() else 1.0
        if name == "grad_temperature" and in_float64.duplicated:
            scale = 10.0  # nothing but what sums leave that cancel
        assert torch.allclose(value, expected, rtol=0, atol=1e-12 * scale), name


@asked("numbers")
def test_temperatures(
    backend: Backend, dtype: torch.dtype, temperature: float, form: tuple[bool, bool]
) -> None:
    """Below t = 1/30 a maximum takes the place of the bound |c| <= 1; in float16, always."""
    concat, as_tensor = form

    def op(*inputs: Tensor, temperature: Tensor, concat: bool) -> Tensor:
        t = temperature if as_tensor else temperature.item()
        return backend.call(*inputs, temperature=t, concat=concat)

    names = NAMES if as_tensor else NAMES[:3]  # a number has no gradient
    options = {"temperature": temperature, "concat": concat, "names": names}
    backend.hold(backend.small, dtype, op, **options)


@asked("torch")
@pytest.mark.parametrize("t", [0.01, 0.05, 1.0])
def test_temperatures_of_every_kind(backend: Backend, dtype: torch.dtype, t: float) -> None:
    """Numbers of any library, tensors of any type and shape; the gradient is of that type."""
    feat, protos, offsets = backend.make(backend.small, dtype)
    number = backend.call(feat, protos, offsets, temperature=t)
    for same in (int(t), np.float32(t), np.float64(t)) if t == 1 else (np.float64(t),):
        assert torch.equal(backend.call(feat, protos, offsets, temperature=same), number)
    single = torch.tensor(t, device=backend.device)
    grads: list[Tensor] = []
    for tensor in (single, single.reshape(1), single.double()):
        tensor.requires_grad_()
        found = backend.call(feat, protos, offsets, temperature=tensor)
        torch.testing.assert_close(found, number, rtol=2e-2, atol=2e-2)
        grads += torch.autograd.grad(found.float().square().sum(), tensor)
        assert grads[-1].dtype == tensor.dtype
    assert torch.allclose(grads[0].double(), grads[2], rtol=1e-4)


@asked("numbers")
def test_with_and_without_a_backward(backend: Backend, dtype: torch.dtype) -> None:
    """Nothing is saved without one, and some kernels find the statistics on their way."""
    problem = backend.small
    feat, protos, offsets = backend.make(problem, dtype)
    saving = backend.call(feat.requires_grad_(), protos, offsets).detach()
    with torch.no_grad():
        alone = backend.call(feat, protos, offsets)
    for found in (saving, alone):
        assert out_within_rounding(found, problem, dtype, device=backend.device)


@asked("tf32")
def test_one_tf32_product(backend: Backend, coarse: Problem) -> None:
    """Where one was asked for, whatever the bags."""
    backend.hold(coarse, torch.float32, backend.tf32, rounding=2**-10)


@asked("cpu")
def test_concat_is_the_features_and_the_product(backend: Backend, dtype: torch.dtype) -> None:
    """To the bit."""
    feat, protos, offsets = backend.make(backend.small, dtype)
    both = backend.call(feat, protos, offsets)
    product = backend.call(feat, protos, offsets, concat=False)
    dim = feat.shape[2]
    assert torch.equal(both[:, :, :, dim:], product)
    assert torch.equal(both[:, :, :, :dim], feat.unsqueeze(2).expand_as(product))


@asked("cpu")
def test_a_frozen_support_and_a_frozen_query(backend: Backend) -> None:
    """The other's gradient is the same; the one that comes in may be expanded."""
    feat, protos, offsets = backend.leaves(backend.small, torch.float32)
    for power in (1, 2):
        both = backend.call(feat, protos, offsets)
        expected = torch.autograd.grad(both.pow(power).sum(), (feat, protos))
        query = backend.call(feat, protos.detach(), offsets)
        (found,) = torch.autograd.grad(query.pow(power).sum(), feat)
        assert torch.equal(found, expected[0])
        support = backend.call(feat.detach(), protos, offsets)
        (found,) = torch.autograd.grad(support.pow(power).sum(), protos)
        assert torch.equal(found, expected[1])


def _memory(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Features [2, 2, 16, 4, 4] of the same values in memory of every kind."""
    generator = torch.Generator().manual_seed(3)
    dense = torch.rand(2, 2, 16, 4, 4, generator=generator).to(dtype)
    last = dense.movedim(2, -1).contiguous().movedim(-1, 2)
    yield "nchw", dense
    yield "channels_last", last
    yield "slice of a batch", torch.stack([dense, dense * 0], 1)[:, 0]
    yield "slice of channels", torch.cat([dense * 0, dense], 2)[:, :, 16:]
    yield "slice of channels_last", torch.cat([last * 0, last], -3)[:, :, 16:]
    yield "swapped episodes and queries", dense.transpose(0, 1).contiguous().transpose(0, 1)
    yield "off by one", torch.cat([dense.new_zeros(1), dense.flatten()])[1:].reshape(dense.shape)
    yield "rows apart", torch.cat([dense, dense], -1)[..., :4]


MEMORY = list(dict(_memory(torch.bfloat16)))


@contextlib.contextmanager
def _skipping_refused_strides(backend: Backend) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "TMA takes rows" not in str(error):
            raise
        pytest.skip(f"{backend.name} does not take these strides")


def _as_dense(
    backend: Backend, feat: Tensor, protos: Tensor, offsets: Tensor, tolerance: float
) -> Tensor:
    """The result, which must be that of the same features laid out densely; so its gradients."""
    results = []
    for f in (feat, feat.contiguous()):
        leaves = (f.detach().requires_grad_(), protos.clone().requires_grad_())
        out = backend.call(*leaves, offsets)
        weight = torch.linspace(0, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        results.append((out, *torch.autograd.grad(out, leaves, weight)))
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours.double(), expected.double(), rtol=tolerance, atol=tolerance)
    return results[0][0]


@asked("memory")
@pytest.mark.parametrize("memory", MEMORY)
def test_layouts(backend: Backend, half: torch.dtype, memory: str) -> None:
    """As dense features, and in the layout of the CPU's op."""
    feat = dict(_memory(half))[memory]
    protos = torch.rand(6, 16, generator=torch.Generator().manual_seed(4)).to(half)
    offsets = offsets_of(2, 1, 0, 3)
    with _skipping_refused_strides(backend):
        out = _as_dense(backend, feat, protos, offsets, 2**-7)
    real = proto_attention(feat, protos, offsets, backend="native")
    assert out.stride() == real.stride()
    assert (out.stride(3) == 1) == (memory == "channels_last")


@asked("numbers")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_expanded_features_and_gradients(
    backend: Backend, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """Strides of 0, of which a tensor map is made with care."""
    problem = backend.expanded
    _, protos, offsets = backend.make(problem, dtype)
    generator = torch.Generator().manual_seed(5)

    def image(channels: int) -> Tensor:
        one = torch.rand(1, channels, problem.height, problem.width, generator=generator)
        return one.to(backend.device, dtype).contiguous(memory_format=layout)[None]

    one, gradient = image(problem.dim), image(2 * problem.dim)[None]
    results = []
    for dense in (False, True):
        feat = one.expand(problem.episodes, problem.queries, *one.shape[2:])
        grad = gradient.expand(problem.out_shape)
        if dense:
            feat, grad = feat.contiguous(), grad.contiguous()
        leaves = (feat.detach().requires_grad_(), protos.detach().requires_grad_())
        out = backend.call(*leaves, offsets)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    tolerance = backend.expanded_digits * (1 if dtype.itemsize == 2 else 2**-10)
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours.double(), expected.double(), rtol=tolerance, atol=tolerance)


@asked("cpu")
def test_overlapping_pixels_and_offsets_with_a_stride(backend: Backend) -> None:
    """Both strides of a pixel are 1; beside the offsets in use stand others."""
    generator = torch.Generator().manual_seed(0)
    windows = torch.randn(70, generator=generator).unfold(0, 32, 1)
    feat = windows.T[None, None, :, None, :].requires_grad_()
    protos = torch.randn(9, 32, generator=generator)
    strided = torch.tensor([0, 7, 3, 7, 9, 7], dtype=torch.int32)[::2]
    results = []
    for offsets in (strided, strided.clone()):
        out = backend.call(feat, protos, offsets)
        results.append((out, *torch.autograd.grad(out.square().sum(), feat)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    truth = reference.proto_attention(feat, protos, strided)
    assert torch.allclose(results[0][0], truth, atol=1e-6)


@asked("memory")
def test_overlapping_rows_of_vectors(backend: Backend, half: torch.dtype) -> None:
    """They start at multiples of 16 bytes, but a tensor map does not take them."""
    generator = torch.Generator().manual_seed(6)
    windows = torch.randn(80, generator=generator).to(half).unfold(0, 16, 8)
    feat, protos = windows.T[None, None, :, None, :], torch.randn(5, 16, generator=generator)
    with _skipping_refused_strides(backend):
        _as_dense(backend, feat, protos.to(half), offsets_of(3, 2), 2**-6)


@asked("cpu")
def test_no_queries_no_pixels_and_no_prototypes(backend: Backend) -> None:
    """Empty results, and gradients of zero."""
    protos = torch.rand(3, 8, requires_grad=True)
    for shape in ((1, 0, 8, 4, 4), (1, 2, 8, 0, 4)):
        t = torch.tensor(0.1, requires_grad=True)
        feat = torch.rand(shape, requires_grad=True)
        out = backend.call(feat, protos, offsets_of(3), temperature=t)
        assert out.shape == (1, shape[1], 1, 16, shape[3], 4)
        grads = torch.autograd.grad(out.sum(), (feat, protos, t))
        assert torch.equal(grads[1], torch.zeros(3, 8))
        assert grads[2] == 0
    out = backend.call(torch.rand(1, 1, 8, 2, 2), torch.rand(0, 8), offsets_of(0))
    assert torch.equal(out[0, 0, 0, 8:], torch.zeros(8, 2, 2))
