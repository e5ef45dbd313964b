# SPDX-License-Identifier: Apache-2.0
"""Every family of CUDA kernels against the float64 reference, on the CPU, lane by lane.

Small sizes: a tile that ends inside, one that is full and one beyond. Each family has one problem
at D = 512 and HW = 256.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from support.compare import (
    NAMES,
    ROUNDINGS,
    assert_within_rounding,
    error_model,
    run,
    worst,
)
from support.problems import PROBLEMS, Problem
from torch import Tensor

from fastproto import InputError, proto_attention
from fastproto.op import backends, reference
from fastproto.op.chips import H200

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF = DTYPES[1:]


@pytest.fixture(params=backends.CUDA_FAMILIES)
def family(request: pytest.FixtureRequest, gpu: ModuleType) -> Iterator[str]:
    """A family that the calls of the test are forced to."""
    name: str = request.param
    if name.startswith("sm90") and not gpu.has_sm90():
        pytest.skip("no kernels for Hopper")
    with gpu.pretending(kernels=name):
        yield name


def runs(family: str, problem: Problem, dtype: torch.dtype) -> None:
    """Skip what a family does not take, as the plan says."""
    last = problem.layout == "channels_last"
    try:
        backends.plan(H200, dtype=dtype, channels_last=last, kernels=family, **problem.sizes)
    except ValueError as error:
        pytest.skip(str(error))


def offsets_of(*counts: int) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


SHAPES = [
    Problem("mixed", ((0, 1, 70), (5, 130, 0)), queries=2, dim=96, height=4, width=6),
    Problem("channels_last", ((33, 7),), queries=2, dim=104, height=4, width=5),
    Problem("odd", ((9, 66),), dim=37, height=3, width=7),
    Problem("strided", ((33, 7),), queries=2, dim=48, height=4, width=6, layout="strided"),
    Problem("spare", ((8, 2),), dim=264, height=4, width=4, spare=75),
    Problem("one_pixel", ((3, 4),), dim=40, height=1, width=1),
    Problem("one_channel", ((5,),), dim=1, height=3, width=3),
    Problem("empty", ((0,),), dim=64, height=4, width=4),
    Problem("single", ((1,),), dim=64, height=4, width=4),
    Problem("mean", ((70, 9),), dim=256, mean=10.0, height=4, width=4),
    Problem("duplicated", ((12,),), dim=64, height=4, width=4, duplicated=True),
    Problem("constant", ((12, 7),), dim=64, height=4, width=4, mean=3.0, constant=True),
]
SHAPES[1] = dataclasses.replace(SHAPES[1], layout="channels_last")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", SHAPES, ids=lambda p: p.name)
def test_within_rounding(
    gpu: ModuleType, family: str, problem: Problem, dtype: torch.dtype
) -> None:
    if problem.constant and dtype == torch.float16:
        pytest.skip("a dead vector's gradient leaves the range of float16")
    runs(family, problem, dtype)
    assert_within_rounding(gpu.proto_attention, problem, dtype)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_the_size_of_a_network(gpu: ModuleType, family: str, layout: str) -> None:
    problem = Problem("network", ((70,),), dim=512, layout=layout)
    assert_within_rounding(gpu.proto_attention, problem, torch.bfloat16)


def test_the_size_of_a_network_in_float32(gpu: ModuleType) -> None:
    problem = Problem("network", ((70,),), dim=512)
    with gpu.pretending(kernels="sm80-latency"):
        assert_within_rounding(gpu.proto_attention, problem, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_the_plans_own_choice(gpu: ModuleType, capability: int, dtype: torch.dtype) -> None:
    with gpu.pretending(capability=capability):
        assert_within_rounding(gpu.proto_attention, SHAPES[0], dtype)
        assert_within_rounding(gpu.proto_attention, SHAPES[0], dtype, concat=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_backward_and_with_a_number_for_temperature(
    gpu: ModuleType, family: str, dtype: torch.dtype
) -> None:
    """Nothing is saved, and the latency kernels find the statistics on their way."""
    problem = SHAPES[0]
    runs(family, problem, dtype)
    feat, protos, offsets = problem.make(dtype)
    exact = reference.proto_attention(feat.double(), protos.double(), offsets)
    model = error_model(problem, dtype).out
    saving = gpu.proto_attention(feat.requires_grad_(), protos, offsets)
    with torch.no_grad():
        for found in (saving, gpu.proto_attention(feat, protos, offsets)):
            assert worst(found, exact, model) <= ROUNDINGS


@pytest.mark.parametrize("t", [0.3, 0.01])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_number_for_temperature(
    gpu: ModuleType, family: str, dtype: torch.dtype, t: float
) -> None:
    """The bound |c| <= 1 takes the place of a maximum above t = 1/30, but in float16."""
    problem = SHAPES[0]
    runs(family, problem, dtype)

    def with_number(*inputs: Tensor, temperature: Tensor, concat: bool) -> Tensor:
        return gpu.proto_attention(*inputs, temperature=temperature.item(), concat=concat)

    assert_within_rounding(with_number, problem, dtype, names=NAMES[:3], temperature=t)


def test_three_tf32_products_have_the_digits_of_float32_and_one_has_not(gpu: ModuleType) -> None:
    problem = Problem("tf32", ((66,),), dim=128, height=4, width=4)
    assert_within_rounding(gpu.proto_attention, problem, torch.float32)

    def tf32(*inputs: Any, **options: Any) -> Tensor:
        return gpu.proto_attention(*inputs, **options, tf32=True)

    assert_within_rounding(tf32, problem, torch.float32, rounding=2**-11)
    with pytest.raises(AssertionError, match="error"):
        assert_within_rounding(tf32, problem, torch.float32)


@pytest.mark.parametrize("name", ["n_1", "n_2", "hw_1", "d_5", "spare_rows", "duplicated"])
def test_one_tf32_product_whatever_the_bags(gpu: ModuleType, name: str) -> None:
    (problem,) = (problem for problem in PROBLEMS if problem.name == name)
    tf32 = functools.partial(gpu.proto_attention, tf32=True)
    assert_within_rounding(tf32, problem, torch.float32, rounding=2**-10)


@pytest.mark.parametrize("dim", [64, 512])  # rings of two lengths
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_order_of_threads_changes_no_bit(
    gpu: ModuleType, family: str, seed: int, dim: int
) -> None:
    """A missing barrier would."""
    problem = Problem("order", ((70, 3),), queries=2, dim=dim, height=4, width=18)
    plain = run(gpu.proto_attention, problem, torch.bfloat16)
    again = run(gpu.proto_attention, problem, torch.bfloat16)
    with gpu.pretending(seed=seed):
        other = run(gpu.proto_attention, problem, torch.bfloat16)
    for field in dataclasses.fields(plain):
        assert torch.equal(getattr(plain, field.name), getattr(again, field.name))
        assert torch.equal(getattr(plain, field.name), getattr(other, field.name))


FENCED = [
    Problem("nchw", ((70, 3),), dim=512, height=4, width=18),
    Problem("last", ((5, 130),), queries=2, dim=72, height=4, width=18, layout="channels_last"),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("problem", FENCED, ids=lambda p: p.name)
def test_what_tma_and_wgmma_use_was_fenced_by_who_wrote_it(
    gpu: ModuleType, problem: Problem, seed: int
) -> None:
    """A chip would see old values now and then."""
    if not gpu.has_sm90():
        pytest.skip("no kernels for Hopper")
    with gpu.pretending(kernels="sm90-throughput", proxies=True, seed=seed):
        run(gpu.proto_attention, problem, torch.bfloat16)


@pytest.mark.parametrize("dim", [72, 272])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_a_cluster_adds_up_what_its_blocks_saw(gpu: ModuleType, layout: str, dim: int) -> None:
    """One bag has fewer tiles than the cluster blocks."""
    if not gpu.has_sm90():
        pytest.skip("no kernels for Hopper")
    problem = Problem("cluster", ((130, 256),), 2, dim=dim, height=3, width=24, layout=layout)
    last = layout == "channels_last"
    sizes = problem.sizes
    plan = backends.plan(H200, dtype=torch.bfloat16, save=True, channels_last=last, **sizes)
    assert plan["backward_query"]["cluster"] == plan["backward_protos"]["cluster"] == 4
    with gpu.pretending(kernels="sm90", proxies=dim == 72 and not last, seed=1):
        assert_within_rounding(gpu.proto_attention, problem, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_element_of_every_result_is_written(
    gpu: ModuleType, family: str, dtype: torch.dtype
) -> None:
    problem = Problem("written", ((5, 0, 9),), dim=24, height=2, width=4, spare=70)
    runs(family, problem, dtype)
    plain = run(gpu.proto_attention, problem, dtype)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        filled = run(gpu.proto_attention, problem, dtype)
    finally:
        torch.use_deterministic_algorithms(before)
    for field in dataclasses.fields(plain):
        assert torch.equal(getattr(plain, field.name), getattr(filled, field.name)), field.name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_bag_gives_zero_and_no_gradient(
    gpu: ModuleType, family: str, dtype: torch.dtype
) -> None:
    runs(family, Problem("empty", ((0, 3),), dim=16, height=2, width=4), dtype)
    feat = torch.rand(1, 1, 16, 2, 4).to(dtype).requires_grad_()
    protos = torch.rand(3, 16).to(dtype).requires_grad_()
    out = gpu.proto_attention(feat, protos, offsets_of(0, 3))
    assert torch.equal(out[0, :, 0, :16], feat[0])
    assert torch.equal(out[0, 0, 0, 16:], torch.zeros(16, 2, 4, dtype=dtype))
    out[:, :, 0, 16:].sum().backward()
    assert torch.equal(feat.grad, torch.zeros_like(feat))
    assert torch.equal(protos.grad, torch.zeros_like(protos))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_prototype_has_weight_one(gpu: ModuleType, family: str, dtype: torch.dtype) -> None:
    runs(family, Problem("one", ((1,),), dim=40, height=2, width=4), dtype)
    feat = torch.rand(1, 1, 40, 2, 4).to(dtype).requires_grad_()
    protos = torch.rand(1, 40).to(dtype).requires_grad_()
    t = torch.tensor(0.05, requires_grad=True)
    out = gpu.proto_attention(feat, protos, offsets_of(1), temperature=t, concat=False)
    expected = protos.detach().reshape(1, 1, 40, 1, 1).expand_as(feat)
    # float32: three TF32 products of P less its mean.
    tolerance = 2**-22 if dtype == torch.float32 else 0
    assert torch.allclose(out[:, :, 0], feat * expected, rtol=tolerance, atol=tolerance)
    out.sum().backward()
    assert torch.allclose(feat.grad, expected, rtol=tolerance, atol=tolerance)
    assert t.grad.item() == 0


@pytest.mark.parametrize("value", [0.0, 0.1, 100.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_feature_has_cosine_zero_with_everything(
    gpu: ModuleType, family: str, value: float, dtype: torch.dtype
) -> None:
    runs(family, Problem("constant", ((7,),), dim=48, height=2, width=4), dtype)
    protos = torch.rand(7, 48, dtype=torch.float64).to(dtype)
    protos[3] = value  # also with a constant prototype
    feat = torch.full((1, 1, 48, 2, 4), value, dtype=dtype)
    out = gpu.proto_attention(feat, protos, offsets_of(7), concat=False)
    mean = protos.double().mean(dim=0).reshape(1, 1, 1, 48, 1, 1)
    tolerance = 4 * torch.finfo(dtype).eps
    assert torch.allclose(out.double(), mean * feat.double().unsqueeze(2), rtol=tolerance, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [1, 2, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_values_propagate_as_in_the_reference(
    gpu: ModuleType, family: str, bad: float, count: int, dtype: torch.dtype
) -> None:
    runs(family, Problem("bad", ((count,),), dim=24, height=4, width=4), dtype)
    generator = torch.Generator().manual_seed(1)
    feat = torch.rand(1, 1, 24, 4, 4, generator=generator).to(dtype)
    protos = torch.rand(count, 24, generator=generator).to(dtype)
    feat[0, 0, 3, 1, 2] = bad
    ours = gpu.proto_attention(feat, protos, offsets_of(count))
    expected = proto_attention(feat, protos, offsets_of(count), backend="reference")
    assert ours.isnan().any()
    assert torch.equal(ours.isnan(), expected.isnan())
    protos[0, 5] = bad
    out = gpu.proto_attention(feat, protos, offsets_of(count))
    assert out[..., 24:, :, :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_bag_leaves_its_neighbours_alone(
    gpu: ModuleType, family: str, dtype: torch.dtype
) -> None:
    """Tiles reach into the next bag, and into rows of none: nothing of them may leak."""
    problem = Problem("leak", ((5, 9),), dim=32, height=2, width=4, spare=50)
    runs(family, problem, dtype)
    feat, protos, offsets = problem.make(dtype)
    results = []
    for poison in (0.5, float("nan")):
        protos[5:] = poison
        f, p = feat.clone().requires_grad_(), protos.clone().requires_grad_()
        out = gpu.proto_attention(f, p, offsets)
        out[:, :, 0].float().square().sum().backward()
        results.append((out[:, :, 0].detach(), p.grad[:5], p.grad[14:]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[1][2], torch.zeros_like(results[1][2]))


@pytest.mark.parametrize(
    "offsets", [[1, 3, 6], [0, 5, 2], [0, -1, 6], [0, 3, 9], [0, 2**31 - 1, -5], [0, -1000, 6]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offsets_that_make_no_sense_give_nan(
    gpu: ModuleType, family: str, offsets: list[int], dtype: torch.dtype
) -> None:
    """The host does not read them: no plausible numbers, and nothing out of bounds."""
    runs(family, Problem("bad", ((6, 0),), dim=8, height=2, width=4), dtype)
    feat = torch.rand(1, 1, 8, 2, 4).to(dtype).requires_grad_()
    protos = torch.rand(6, 8).to(dtype).requires_grad_()
    out = gpu.proto_attention(feat, protos, torch.tensor(offsets, dtype=torch.int32), concat=False)
    assert out.isnan().any()
    out.sum().backward()
    assert feat.grad.isnan().all()
    if offsets == [0, 3, 9]:  # a bag that makes sense, and one that does not
        assert protos.grad[:3].isfinite().all()
        assert protos.grad[3:].isnan().all()


@pytest.mark.parametrize("t", [0.0, -1.0, float("nan")])
def test_a_temperature_that_makes_no_sense_gives_nan(
    gpu: ModuleType, family: str, t: float
) -> None:
    feat, protos = torch.rand(1, 1, 8, 2, 4).half(), torch.rand(6, 8).half()
    out = gpu.proto_attention(
        feat, protos, offsets_of(6), temperature=torch.tensor(t), concat=False
    )
    assert out.isnan().all()
    with pytest.raises(InputError, match="temperature"):
        gpu.proto_attention(feat, protos, offsets_of(6), temperature=-1.0)


def test_no_queries_no_pixels_and_no_prototypes(gpu: ModuleType) -> None:
    protos = torch.rand(3, 8, requires_grad=True)
    for shape in ((1, 0, 8, 4, 4), (1, 2, 8, 0, 4)):
        t = torch.tensor(0.1, requires_grad=True)
        feat = torch.rand(shape, requires_grad=True)
        out = gpu.proto_attention(feat, protos, offsets_of(3), temperature=t)
        assert out.shape == (1, shape[1], 1, 16, shape[3], 4)
        grads = torch.autograd.grad(out.sum(), (feat, protos, t))
        assert torch.equal(grads[1], torch.zeros(3, 8))
        assert grads[2] == 0
    out = gpu.proto_attention(torch.rand(1, 1, 8, 2, 2), torch.rand(0, 8), offsets_of(0))
    assert torch.equal(out[0, 0, 0, 8:], torch.zeros(8, 2, 2))


def make_layouts() -> Iterator[tuple[str, Tensor]]:
    """Features [2, 2, 16, 4, 4] of the same values in memory of every kind."""
    generator = torch.Generator().manual_seed(3)
    dense = torch.rand(2, 2, 16, 4, 4, generator=generator).bfloat16()
    last = dense.movedim(2, -1).contiguous().movedim(-1, 2)
    yield "nchw", dense
    yield "channels_last", last
    yield "slice of a batch", torch.stack([dense, dense * 0], 1)[:, 0]
    yield "slice of channels", torch.cat([dense * 0, dense], 2)[:, :, 16:]
    yield "slice of channels_last", torch.cat([last * 0, last], -3)[:, :, 16:]
    yield "swapped episodes and queries", dense.transpose(0, 1).contiguous().transpose(0, 1)
    yield "off by one", torch.cat([dense.new_zeros(1), dense.flatten()])[1:].reshape(dense.shape)
    yield "rows apart", torch.cat([dense, dense], -1)[..., :4]


LAYOUTS = dict(make_layouts())


@pytest.mark.parametrize("kernels", ["", "sm90-latency", "sm90-throughput"])
@pytest.mark.parametrize("feat", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(gpu: ModuleType, feat: Tensor, kernels: str) -> None:
    with gpu.pretending(kernels=kernels):
        try:
            gpu.proto_attention(feat, *few_protos())
        except RuntimeError as error:
            if "TMA takes rows" not in str(error):
                raise
            pytest.skip(f"{kernels} does not take these strides")
        check_layout(gpu, feat)


def few_protos() -> tuple[Tensor, Tensor]:
    protos = torch.rand(6, 16, generator=torch.Generator().manual_seed(4)).bfloat16()
    return protos, offsets_of(2, 1, 0, 3)


def check_layout(gpu: ModuleType, feat: Tensor) -> None:
    """As dense features, and in the layout of the other backends."""
    protos, offsets = few_protos()
    results = []
    for f in (feat, feat.contiguous()):
        leaf, p = f.detach().requires_grad_(), protos.clone().requires_grad_()
        out = gpu.proto_attention(leaf, p, offsets)
        weight = torch.linspace(0, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        out.backward(weight)
        results.append((out, leaf.grad, p.grad))
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours.double(), expected.double(), rtol=2**-7, atol=2**-7)
    real = proto_attention(feat, protos, offsets, backend="native")
    assert results[0][0].stride() == real.stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.usefixtures("family")
def test_expanded_half_features_and_gradients(gpu: ModuleType, layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(5)
    image = torch.rand(1, 16, 4, 4, generator=generator).bfloat16()
    image = image.contiguous(memory_format=layout)[None]
    map_grad = torch.rand(1, 32, 4, 4, generator=generator).bfloat16()
    map_grad = map_grad.contiguous(memory_format=layout)[None, None]
    protos = torch.rand(5, 16, generator=generator).bfloat16()
    offsets = offsets_of(2, 1, 0, 2)
    results = []
    for dense in (False, True):
        feat, grad = image.expand(2, 3, 16, 4, 4), map_grad.expand(2, 3, 2, 32, 4, 4)
        if dense:
            feat, grad = feat.contiguous(), grad.contiguous()
        feat, p = feat.detach().requires_grad_(), protos.clone().requires_grad_()
        out = gpu.proto_attention(feat, p, offsets)
        results.append((out, *torch.autograd.grad(out, (feat, p), grad)))
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours.double(), expected.double(), rtol=2**-7, atol=2**-7)


def test_expanded_features_and_gradients(gpu: ModuleType) -> None:
    image = torch.rand(1, 1, 16, 4, 4)
    feat = image.expand(2, 3, 16, 4, 4).requires_grad_()
    protos = torch.rand(5, 16, requires_grad=True)
    out = gpu.proto_attention(feat, protos, offsets_of(2, 3))
    expected = reference.proto_attention(feat, protos, offsets_of(2, 3))
    assert torch.allclose(out, expected, atol=1e-5)
    for ours, truth in zip(
        torch.autograd.grad(out.sum(), (feat, protos)),  # its gradient is one number, expanded
        torch.autograd.grad(expected.sum(), (feat, protos)),
        strict=True,
    ):
        assert torch.allclose(ours, truth, atol=1e-4)


def test_overlapping_pixels_and_offsets_with_a_stride(gpu: ModuleType) -> None:
    windows = torch.randn(40).unfold(0, 4, 1)  # both strides are 1
    feat, protos = windows.T[None, None, :, None, :], torch.randn(3, 4)
    strided = torch.tensor([0, 7, 3, 7], dtype=torch.int32)[::2]
    out = gpu.proto_attention(feat, protos, strided)
    assert torch.allclose(out, reference.proto_attention(feat, protos, strided), atol=1e-5)


def test_overlapping_rows_of_vectors(gpu: ModuleType) -> None:
    """They start at multiples of 16 bytes, but a tensor map does not take them."""
    generator = torch.Generator().manual_seed(6)
    windows = torch.randn(80, generator=generator).bfloat16().unfold(0, 16, 8)
    feat, offsets = windows.T[None, None, :, None, :], offsets_of(3, 2)
    protos = torch.randn(5, 16, generator=generator).bfloat16()
    results = []
    for f in (feat, feat.contiguous()):
        leaf, p = f.detach().requires_grad_(), protos.clone().requires_grad_()
        out = gpu.proto_attention(leaf, p, offsets)
        results.append((out, *torch.autograd.grad(out.square().sum(), (leaf, p))))
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours.double(), expected.double(), rtol=2**-6, atol=2**-6)


def test_a_frozen_support_and_temperatures_of_both_types(gpu: ModuleType) -> None:
    feat, protos, offsets = SHAPES[0].make(torch.float32)
    single = torch.tensor(0.07, requires_grad=True)
    double = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    both = gpu.proto_attention(feat.requires_grad_(), protos.requires_grad_(), offsets)
    expected = torch.autograd.grad(both.square().sum(), (feat, protos))
    query = gpu.proto_attention(feat, protos.detach(), offsets)
    assert torch.equal(torch.autograd.grad(query.square().sum(), feat)[0], expected[0])
    support = gpu.proto_attention(feat.detach(), protos, offsets)
    assert torch.equal(torch.autograd.grad(support.square().sum(), protos)[0], expected[1])
    grads = [
        torch.autograd.grad(
            gpu.proto_attention(feat, protos, offsets, temperature=t).square().sum(), t
        )[0]
        for t in (single, double)
    ]
    assert grads[1].dtype == torch.float64
    assert torch.allclose(grads[0].double(), grads[1], rtol=1e-4)


def test_what_is_refused(gpu: ModuleType) -> None:
    feat, protos, offsets = torch.rand(1, 1, 8, 2, 2), torch.rand(6, 8), offsets_of(6)
    with pytest.raises(RuntimeError):  # torch < 2.13 loses the words
        gpu.proto_attention(feat.double(), protos.double(), offsets)
    with pytest.raises(RuntimeError):
        gpu.proto_attention(torch.rand(1, 1, 768, 2, 2), torch.rand(6, 768), offsets)
    with gpu.pretending(kernels="fast"), pytest.raises(RuntimeError):
        gpu.proto_attention(feat, protos, offsets)
    with gpu.pretending(kernels="sm90-throughput"), pytest.raises(RuntimeError):
        gpu.proto_attention(feat, protos, offsets)  # float32
    with gpu.pretending(capability=75), pytest.raises(RuntimeError):
        gpu.proto_attention(feat, protos, offsets)


SMALL = [
    Problem("mixed", ((0, 1, 7), (5, 3, 0)), queries=2, dim=6, height=3, width=2),
    Problem("channels_last", ((3, 7),), 2, dim=6, height=3, width=2, layout="channels_last"),
    Problem("strided", ((3, 7),), dim=6, height=3, width=2, layout="strided"),
]


@pytest.mark.parametrize("problem", SMALL, ids=lambda p: p.name)
def test_opcheck(gpu: ModuleType, problem: Problem) -> None:
    feat, protos, offsets = problem.make(torch.float32)
    t = torch.tensor(0.2, requires_grad=True)
    forward = torch.ops.fastproto_emulated.proto_attention_fwd.default
    inputs = (feat.requires_grad_(), protos.requires_grad_(), offsets)
    torch.library.opcheck(forward, (*inputs, t, 0.2, 1e-6, True, True, False))
    torch.library.opcheck(forward, (*inputs, None, 0.2, 1e-6, False, True))
    detached = [x.detach() for x in inputs]
    out, *saved = forward(*detached, None, 0.2, 1e-6, True, True)
    torch.library.opcheck(
        torch.ops.fastproto_emulated.proto_attention_bwd.default,
        (torch.randn_like(out), *detached, None, *saved, 0.2, 1e-6, True, True, False),
    )


def test_compile_equals_eager_and_does_not_recompile_as_n_changes(gpu: ModuleType) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    pair = gpu.load()

    def step(feat: Tensor, protos: Tensor, offsets: Tensor) -> Tensor:
        from fastproto.op import autograd

        return autograd.call(pair, feat * 2, protos, offsets, 0.05, 1e-6, True, (False,)).sin()

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for background, organ in [(20, 5), (7, 30), (2, 2)]:
        problem = Problem("n", ((background, organ),), dim=16, height=4, width=4)
        feat, protos, offsets = problem.make(torch.float32)
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


def test_says_that_it_has_no_second_derivative(gpu: ModuleType) -> None:
    feat, protos, offsets = SMALL[0].make()
    out = gpu.proto_attention(feat.requires_grad_(), protos, offsets)
    (grad,) = torch.autograd.grad(out.square().sum(), feat, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'native backend.*backend="reference"'):
        grad.sum().backward()


def test_it_is_held_to_every_problem_of_the_list(gpu: ModuleType) -> None:
    """The rest of the list, once each, by the plan's own choice."""
    for problem in PROBLEMS:
        if problem.dim <= 130:
            smaller = dataclasses.replace(problem, height=min(problem.height, 7), width=5)
            assert_within_rounding(gpu.proto_attention, smaller, torch.bfloat16)


def test_tensors_of_a_gpu_that_is_not_there_have_the_same_shapes(gpu: ModuleType) -> None:
    problem = Problem("fake", ((3, 4),), queries=2, dim=16, height=3, width=5)
    for layout in ("nchw", "channels_last"):
        inputs = dataclasses.replace(problem, layout=layout).make(torch.bfloat16)
        options = (None, 0.05, 1e-6, True, True, False)
        real = torch.ops.fastproto_emulated.proto_attention_fwd(*inputs, *options)
        with torch._subclasses.FakeTensorMode():
            strides = [(x.shape, x.stride(), x.dtype) for x in inputs]
            fake = [torch.empty_strided(*s, device="cuda", dtype=dtype) for *s, dtype in strides]
            found = torch.ops.fastproto.proto_attention_fwd(*fake, *options)
        for one, other in zip(real, found, strict=True):
            assert (one.shape, one.stride(), one.dtype) == (
                other.shape,
                other.stride(),
                other.dtype,
            )
            assert other.device.type == "cuda"


def test_the_setting_for_float32_products() -> None:
    from fastproto.op import native

    setting = torch.backends.cuda.matmul.fp32_precision
    assert native.allows_tf32() == (setting == "tf32")
    try:
        for name in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = name
            assert native.allows_tf32() == (name == "tf32")
    finally:
        torch.backends.cuda.matmul.fp32_precision = setting
