# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel and every row of its table against the float64 reference, without a GPU.

In a process of its own, because Triton decides when a kernel is defined whether it is interpreted:

    TRITON_INTERPRET=1 pytest python_tests/op/triton

The interpreter multiplies bfloat16 wrongly and takes TF32 for float32: two tests mend that.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.compare import NAMES, assert_within_rounding, run
from support.problems import PROBLEMS, Problem
from torch import Tensor

from fastproto import InputError, proto_attention
from fastproto.op import reference
from fastproto.op.triton import support

if not support.INTERPRETED:
    pytest.skip("runs where TRITON_INTERPRET=1 is set", allow_module_level=True)

from triton.runtime import interpreter

from fastproto.op.triton import configs, launch, ops
from fastproto.op.triton.configs import HALF, KERNELS, SINGLE, Config, Plan

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

triton = functools.partial(proto_attention, backend="triton")
HALF_OR_SINGLE = [torch.float32, torch.float16]
# Interpreted, these take more than three seconds in each type.
LARGE = {"one_image_one_class", "background_and_organ", "channels_last", "mean_over_std_10"}


def offsets_of(*counts: int) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_within_rounding(problem: Problem, dtype: torch.dtype) -> None:
    if problem.constant and dtype == torch.float16:
        pytest.skip("a dead vector's gradient leaves the range of float16")
    if problem.name in LARGE and dtype == torch.float32:
        problem = dataclasses.replace(problem, height=4, width=5)
    assert_within_rounding(triton, problem, dtype)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("row", "dtype"), [(HALF, torch.float16), (SINGLE, torch.float32)], ids=["half", "single"]
)
def test_every_row_of_the_table(
    row: Plan, dtype: torch.dtype, kernel: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several programs share the channels, a chunk is padded, tiles end inside, bags vary."""
    config: Config = getattr(row, kernel)
    dim = 2 * config.out_chunks * config.chunk - 3
    problem = Problem("rows", ((3, 0), (66, 1)), 1, dim, 5, 5, layout=layout)
    interpreted = configs.choose(dtype, dim, interpreted=True)
    plan = dataclasses.replace(interpreted, **{kernel: config.fit(dim)})
    monkeypatch.setattr(ops, "_plan", lambda feat: plan)
    assert_within_rounding(triton, problem, dtype)
    if kernel == "forward":  # without gradients: nothing is saved
        feat, protos, offsets = problem.make(dtype)
        with torch.no_grad():
            inference = triton(feat, protos, offsets)
        training = triton(feat, protos.requires_grad_(), offsets)
        assert torch.allclose(inference, training, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["n_2", "mixed_bags", "d_130", "strided", "constant_vectors"])
def test_float64_equals_the_reference(name: str) -> None:
    problem = next(p for p in PROBLEMS if p.name == name)
    ours = run(triton, problem, torch.float64)
    truth = run(reference.proto_attention, problem, torch.float64)
    for field in ("out", "grad_feat", "grad_protos", "grad_temperature"):
        value, expected = getattr(ours, field), getattr(truth, field)
        scale = float(expected.abs().max())
        assert torch.allclose(value, expected, rtol=0, atol=1e-12 * scale), field


@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("temperature", [0.001, 0.02, 1.0, 50.0])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_temperatures(temperature: float, concat: bool, as_tensor: bool) -> None:
    def op(*inputs: Tensor, temperature: Tensor, concat: bool) -> Tensor:
        t = temperature if as_tensor else temperature.item()
        return triton(*inputs, temperature=t, concat=concat)

    problem = Problem("t", ((70, 5),), dim=40, height=4, width=4)
    options = {"temperature": temperature, "concat": concat}
    names = NAMES if as_tensor else NAMES[:3]  # a number has no gradient
    assert_within_rounding(op, problem, torch.float32, names=names, **options)


def by_name(*names: str) -> list[Problem]:
    """Problems of the list, the large ones on fewer pixels."""
    found = [problem for problem in PROBLEMS if problem.name in names]
    return [dataclasses.replace(p, height=4, width=4) if p.dim > 200 else p for p in found]


def float32_of(tile: Any) -> np.ndarray:
    """Values of an interpreted tile; bfloat16 is kept as its bits."""
    data = tile.data
    return (data.astype(np.uint32) << 16).view(np.float32) if data.dtype == np.uint16 else data


def tf32(values: np.ndarray) -> np.ndarray:
    """Rounded to the 11 significant bits of TF32, halves away from zero as cvt.rna does."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def replace_products(
    monkeypatch: pytest.MonkeyPatch, product: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> None:
    def create_dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        result = product(float32_of(a), float32_of(b)) + acc.data
        return interpreter.TensorHandle(result, acc.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


MENDED = ("n_0", "n_1", "n_65", "mixed_bags", "d_5", "d_130", "constant_vectors", "strided")


@pytest.mark.parametrize("problem", by_name(*MENDED, "one_image_one_class"), ids=lambda p: p.name)
def test_bfloat16_with_the_interpreters_products_mended(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter multiplies the bits of bfloat16; all other arithmetic here is float32."""
    replace_products(monkeypatch, np.matmul)
    assert_within_rounding(triton, problem, torch.bfloat16)


def three_products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What "tf32x3" computes on tensor cores."""
    high_a, high_b = tf32(a), tf32(b)
    return high_a @ high_b + (high_a @ tf32(b - high_b) + tf32(a - high_a) @ high_b)


@pytest.mark.parametrize(
    "problem",
    by_name("n_65", "d_130", "mean_over_std_10", "constant_vectors"),
    ids=lambda p: p.name,
)
def test_three_tf32_products_have_the_digits_of_float32_and_one_has_not(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_products(monkeypatch, three_products)
    assert_within_rounding(triton, problem, torch.float32)
    replace_products(monkeypatch, lambda a, b: tf32(a) @ tf32(b))
    assert_within_rounding(triton, problem, torch.float32, rounding=2**-10)
    with pytest.raises(AssertionError, match="out: error"):
        assert_within_rounding(triton, problem, torch.float32)


def test_the_bound_instead_of_a_running_maximum_in_half_types(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What bfloat16 runs: statistics taken off algebraically, weights below the bound |c| <= 1."""
    monkeypatch.setattr(launch, "needs_running_max", lambda dtype, temperature: False)
    problem = Problem("bound", ((70, 5),), dim=130, height=5, width=5)
    assert_within_rounding(triton, problem, torch.float16, temperature=0.5)


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE, ids=str)
def test_empty_bag_gives_zero_and_no_gradient(dtype: torch.dtype) -> None:
    feat = torch.rand(1, 1, 8, 3, 3).to(dtype).requires_grad_()
    protos = torch.rand(0, 8).to(dtype).requires_grad_()
    out = triton(feat, protos, offsets_of(0))
    assert torch.equal(out[0, 0, 0, :8], feat[0, 0])
    assert torch.equal(out[0, 0, 0, 8:], torch.zeros(8, 3, 3, dtype=dtype))
    out[:, :, :, 8:].sum().backward()
    assert torch.equal(feat.grad, torch.zeros_like(feat))
    assert protos.grad.shape == (0, 8)


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE, ids=str)
def test_one_prototype_has_weight_one_exactly(dtype: torch.dtype) -> None:
    feat = torch.rand(1, 2, 33, 5, 5).to(dtype).requires_grad_()
    protos = torch.rand(1, 33).to(dtype).requires_grad_()
    t = torch.tensor(0.05, requires_grad=True)
    out = triton(feat, protos, offsets_of(1), temperature=t, concat=False)
    expected = protos.detach().reshape(1, 1, 33, 1, 1).expand_as(feat)
    assert torch.equal(out[:, :, 0], feat * expected)
    out.sum().backward()
    assert torch.equal(feat.grad, expected)
    assert t.grad.item() == 0


@pytest.mark.parametrize("value", [0.0, 0.1, 100.1])
@pytest.mark.parametrize("dtype", HALF_OR_SINGLE, ids=str)
def test_a_constant_feature_has_cosine_zero_with_everything(
    value: float, dtype: torch.dtype
) -> None:
    protos = torch.rand(7, 48, dtype=torch.float64).to(dtype)
    protos[3] = value  # also with a constant prototype
    feat = torch.full((1, 1, 48, 2, 2), value, dtype=dtype)
    out = triton(feat, protos, offsets_of(7), concat=False)
    mean = protos.double().mean(dim=0).reshape(1, 1, 1, 48, 1, 1)
    tolerance = 4 * torch.finfo(dtype).eps
    assert torch.allclose(out.double(), mean * feat.double().unsqueeze(2), rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    ("mean", "dtype"),
    [(30.0, torch.float16), (100.0, torch.float16), (30.0, torch.float32), (300.0, torch.float32)],
)
def test_a_large_mean(mean: float, dtype: torch.dtype) -> None:
    problem = Problem("mean", ((20, 9),), dim=64, height=4, width=4, mean=mean)
    assert_within_rounding(triton, problem, dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [1, 2, 70])
@pytest.mark.parametrize("dtype", HALF_OR_SINGLE, ids=str)
def test_bad_values_propagate_as_in_the_reference(
    bad: float, count: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    feat = torch.rand(1, 1, 20, 4, 4, generator=generator).to(dtype)
    protos = torch.rand(count, 20, generator=generator).to(dtype)
    feat[0, 0, 3, 1, 2] = bad
    offsets = offsets_of(count)
    ours = triton(feat, protos, offsets)
    expected = proto_attention(feat, protos, offsets, backend="reference")
    assert ours.isnan().any()
    assert torch.equal(ours.isnan(), expected.isnan())
    protos[0, 5] = bad
    assert triton(feat, protos, offsets)[..., 20:, :, :].isnan().all()


def test_spare_rows_change_nothing_and_get_zero_gradient() -> None:
    problem = Problem("spare", ((8, 2),), dim=48, height=4, width=4, spare=80)
    feat, protos, offsets = problem.make()
    protos[10:] = float("nan")  # never looked at
    protos.requires_grad_()
    out = triton(feat, protos, offsets)
    assert torch.equal(out.detach(), triton(feat, protos[:10].detach(), offsets))
    out.sum().backward()
    assert torch.equal(protos.grad[10:], torch.zeros(80, 48))
    assert protos.grad[:10].abs().sum() > 0


def test_no_queries() -> None:
    protos = torch.rand(3, 8, requires_grad=True)
    out = triton(torch.rand(1, 0, 8, 4, 4), protos, offsets_of(3))
    assert out.shape == (1, 0, 1, 16, 4, 4)
    out.sum().backward()
    assert torch.equal(protos.grad, torch.zeros(3, 8))


def test_overlapping_pixels() -> None:
    windows = torch.randn(40).unfold(0, 4, 1)  # both strides are 1
    feat, protos = windows.T[None, None, :, None, :], torch.randn(3, 4)
    expected = reference.proto_attention(feat, protos, offsets_of(3))
    assert torch.allclose(triton(feat, protos, offsets_of(3)), expected, atol=1e-5)


def test_more_bags_than_a_program_searches_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [launch.search_block(bags) for bags in (1, 15, 16, 5000)] == [2, 16, 32, 1024]
    monkeypatch.setattr(launch, "search_block", lambda bags: 16)
    counts = torch.randint(0, 4, (40, 1), generator=torch.Generator().manual_seed(0))
    problem = Problem("bags", tuple(map(tuple, counts.tolist())), dim=16, height=1, width=2)
    ours = run(triton, problem, torch.float64)
    truth = run(reference.proto_attention, problem, torch.float64)
    assert torch.allclose(ours.out, truth.out, atol=1e-12)
    assert torch.allclose(ours.grad_protos, truth.grad_protos, atol=1e-9)


@pytest.mark.parametrize(
    "offsets",
    [[1, 3, 6], [0, 5, 2], [0, -1, 6], [0, 3, 9], [0, 2**31 - 1, -5], [0, -1000, 6], [0, -99, 2]],
)
def test_offsets_that_make_no_sense_give_nan_where_they_cannot_be_checked(
    offsets: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU only the kernels read them: nothing out of bounds, no plausible numbers."""
    guard = torch.full((300, 8), 7.0)
    feat, protos = torch.rand(1, 1, 8, 3, 3), torch.rand(6, 8)
    bad = torch.tensor(offsets, dtype=torch.int32)
    # The gradient's neighbours in memory must stay what they are.
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty_inside(guard, protos.shape))
    out, *saved = ops._forward_now(feat, protos, bad, None, 0.05, 1e-6, False, True)
    assert out.isnan().any()
    grads = ops._backward_now(
        torch.ones_like(out), feat, protos, bad, None, *saved, 0.05, 1e-6, False, True, False
    )
    assert grads[0].isnan().all()
    assert (guard[:147] == 7).all()
    assert (guard[153:] == 7).all()


def new_empty_inside(guard: Tensor, shape: torch.Size) -> Callable[..., Tensor]:
    """``new_empty`` that takes memory of ``shape`` from the middle of ``guard``."""
    original = torch.Tensor.new_empty

    def new_empty(self: Tensor, *size: Any, **options: Any) -> Tensor:
        if size == (shape,):
            return guard[147 : 147 + shape[0]]
        return original(self, *size, **options)

    return new_empty


def test_offsets_with_a_stride() -> None:
    feat, protos = torch.rand(1, 1, 8, 3, 3, requires_grad=True), torch.rand(9, 8)
    strided = torch.tensor([0, 0, 3, 0, 9, 0], dtype=torch.int32)[::2]
    out = triton(feat, protos, strided)
    expected = triton(feat, protos, strided.clone())
    assert torch.equal(out, expected)
    grads = [torch.autograd.grad(x.square().sum(), feat)[0] for x in (out, expected)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("t", [0.0, -1.0, float("nan")])
def test_a_temperature_that_makes_no_sense_gives_nan(t: float) -> None:
    feat, protos = torch.rand(1, 1, 8, 3, 3), torch.rand(6, 8)
    with pytest.raises(InputError, match="temperature"):
        triton(feat, protos, offsets_of(6), temperature=torch.tensor(t))
    out, *_ = ops._forward_now(
        feat, protos, offsets_of(6), torch.tensor(t), 1.0, 1e-6, False, False
    )
    assert out.isnan().all()


def test_a_map_beyond_32_bit_offsets_is_refused() -> None:
    feat = torch.empty(1, 1, 2048, 1024, 1024, device="meta")
    protos = torch.empty(2**20, 2048, device="meta")
    with pytest.raises(InputError, match="at most 1073741823 with backend 'triton'"):
        launch.check_size(feat, protos)
    with pytest.raises(InputError, match="protos: found 1048576 x 2048 values"):
        launch.check_size(feat[:, :, :, :3, :3], protos)


def test_an_image_that_is_spread_too_far_is_copied() -> None:
    far = torch.empty(2048, 1, 1, 1024, 1024, device="meta").movedim(0, 2)
    assert launch.walkable(far) is far
    farther = torch.empty(2048, 2, 1, 1024, 1024, device="meta").movedim(0, 2)
    assert launch.walkable(farther).is_contiguous()


def test_a_temperature_of_another_kind_of_number() -> None:
    feat, protos = torch.rand(1, 1, 8, 3, 3), torch.rand(6, 8)
    expected = triton(feat, protos, offsets_of(6), temperature=1.0)
    for t in (1, np.float32(1.0), np.float64(1.0)):
        assert torch.equal(triton(feat, protos, offsets_of(6), temperature=t), expected)


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE, ids=str)
def test_every_element_of_every_result_is_written(dtype: torch.dtype) -> None:
    problem = Problem("written", ((5, 0, 9),), dim=20, height=3, width=3, spare=7)
    before = torch.are_deterministic_algorithms_enabled()
    plain = run(triton, problem, dtype)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        filled = run(triton, problem, dtype)
    finally:
        torch.use_deterministic_algorithms(before)
    for field in ("out", "grad_feat", "grad_protos", "grad_temperature"):
        assert torch.equal(getattr(plain, field), getattr(filled, field)), field


SMALL = [
    Problem("mixed", ((0, 1, 7), (5, 3, 0)), queries=2, dim=6, height=3, width=2),
    Problem("channels_last", ((3, 7),), 2, dim=6, height=3, width=2, layout="channels_last"),
    Problem("strided", ((3, 7),), dim=6, height=3, width=2, layout="strided"),
]


@pytest.mark.parametrize("problem", SMALL, ids=lambda p: p.name)
def test_opcheck(problem: Problem) -> None:
    feat, protos, offsets = problem.make(torch.float32)
    inputs = (feat.requires_grad_(), protos.requires_grad_(), offsets)
    t = torch.tensor(0.2, requires_grad=True)
    forward = torch.ops.fastproto.triton_fwd.default
    torch.library.opcheck(forward, (*inputs, t, 0.2, 1e-6, True, True))
    torch.library.opcheck(forward, (*inputs, None, 0.2, 1e-6, False, True))
    detached = [x.detach() for x in inputs]
    out, *saved = forward(*detached, None, 0.2, 1e-6, True, True)
    torch.library.opcheck(
        torch.ops.fastproto.triton_bwd.default,
        (torch.randn_like(out), *detached, None, *saved, 0.2, 1e-6, True, True, False),
    )


def test_gradcheck() -> None:
    feat, protos, offsets = SMALL[0].make(torch.float64)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def op(f: Tensor, p: Tensor, t: Tensor) -> Tensor:
        return triton(f, p, offsets, temperature=t)

    inputs = (feat[:, :1].requires_grad_(), protos.requires_grad_(), t)
    assert torch.autograd.gradcheck(op, inputs, fast_mode=True)


def test_says_that_it_has_no_second_derivative() -> None:
    feat, protos, offsets = SMALL[0].make()
    feat.requires_grad_()
    out = triton(feat, protos, offsets)
    (grad,) = torch.autograd.grad(out.square().sum(), feat, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'triton backend.*backend="reference"'):
        grad.sum().backward()


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_compile_equals_eager_and_does_not_recompile_as_n_changes(layout: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(feat: Tensor, protos: Tensor, offsets: Tensor) -> Tensor:
        return triton(feat * 2, protos, offsets).sin()

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for background, organ in [(20, 5), (7, 30), (2, 2), (60, 8)]:
        problem = Problem("n", ((background, organ),), dim=16, height=4, width=4, layout=layout)
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


@pytest.mark.parametrize("dtype", [torch.float16])
def test_autocast_casts_to_its_dtype(dtype: torch.dtype) -> None:
    feat, protos, offsets = SMALL[0].make(torch.float32)
    feat.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = triton(feat, protos, offsets)
    assert out.dtype == dtype
    assert torch.equal(out, triton(feat.to(dtype), protos.to(dtype), offsets))
    out.float().sum().backward()
    assert feat.grad.dtype == torch.float32


def test_a_frozen_support_and_a_gradient_that_is_expanded() -> None:
    feat, protos, offsets = PROBLEMS[9].make(torch.float32)
    both = triton(feat.requires_grad_(), protos.requires_grad_(), offsets)
    expected = torch.autograd.grad(both.sum(), (feat, protos))
    (query,) = torch.autograd.grad(triton(feat, protos.detach(), offsets).sum(), feat)
    assert torch.equal(query, expected[0])
