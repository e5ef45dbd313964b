# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel and every row of its table against the float64 reference, without a GPU.

In a process of its own, because Triton decides when a kernel is defined whether it is interpreted:

    TRITON_INTERPRET=1 pytest python_tests/op/triton

The interpreter multiplies bfloat16 wrongly and takes TF32 for float32: two tests mend that.
What all backends are asked is in support/conformance.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import conformance
from support.compare import assert_within_rounding, out_within_rounding, run
from support.conformance import (
    TINY,
    Backend,
    edges,
    offsets_of,
    registration,
    values,
    without_dead_half,
)
from support.problems import PROBLEMS, Problem
from torch import Tensor

from fastproto import InputError, proto_attention
from fastproto.op import reference
from fastproto.op.triton import support

if not support.INTERPRETED:
    pytest.skip("runs where TRITON_INTERPRET=1 is set", allow_module_level=True)

import triton.language as tl
from triton.runtime import interpreter

from fastproto.op.triton import configs, launch, ops
from fastproto.op.triton.configs import HALF, KERNELS, SINGLE, Config, Plan

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

triton = functools.partial(proto_attention, backend="triton")


@pytest.fixture(autouse=True)
def _patched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each call of a function the interpreter patches Triton's language, a third of its time.

    Within a launch that is done already.
    """
    patch = interpreter._patch_lang

    def once(fn: Callable[..., Any]) -> Any:
        languages = [each for each in fn.__globals__.values() if each is tl or each is tl.core]
        missing = any(tl.core.is_builtin(language.load) for language in languages)
        return patch(fn) if missing else None

    monkeypatch.setattr(interpreter, "_patch_lang", once)


def fewer(problem: Problem) -> Problem:
    """On one tile's pixels: the interpreter takes a second for each tile."""
    if problem.height * problem.width > 100 and problem.name != "hw_257":
        return dataclasses.replace(problem, height=4, width=5)
    return dataclasses.replace(problem, queries=min(problem.queries, 2))


def affordable(dtype: torch.dtype) -> list[Problem]:
    """The list, the large ones on fewer pixels; and means that are large for a type.

    The number of prototypes matters to both types alike: of the list's, float16 gets every other.
    """
    found = [fewer(problem) for problem in without_dead_half(PROBLEMS, dtype)]
    if dtype == torch.float16:
        found = [p for p in found if p.name not in ("n_0", "n_2", "n_63", "n_129")]
    for mean in (30, 300 if dtype == torch.float32 else 100):
        found.append(Problem(f"mean_{mean}", ((20, 9),), dim=64, height=4, width=4, mean=mean))
    return found


EXACT = ("n_2", "mixed_bags", "d_130", "strided", "constant_vectors")
TOPICS = ("numbers", "edges", "torch", "opcheck", "autocast", "cpu", "memory", "float64")
BACKENDS = [
    Backend(
        "triton",
        triton,
        frozenset(TOPICS),
        ops="fastproto::triton",
        says="triton backend",
        dtypes=(torch.float32, torch.float16),
        problems=affordable,
        float64=[problem for problem in PROBLEMS if problem.name in EXACT],
        differentiated=[dataclasses.replace(TINY[1], queries=1)],
        fast=True,
        small=Problem("small", ((70, 5),), dim=40, height=4, width=4),
        temperatures=(0.001, 0.02, 1.0, 50.0),
        forms=((True, True), (False, False)),
        repeated_dtypes=(torch.float32, torch.float16),
    )
]
globals().update(conformance.ask(BACKENDS, values, edges, registration))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("row", "dtype", "layout"),
    [(HALF, torch.float16, "nchw"), (SINGLE, torch.float32, "channels_last")],
    ids=["half", "single"],
)
def test_every_row_of_the_table(
    row: Plan, dtype: torch.dtype, kernel: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several programs share the channels, a chunk is padded, tiles end inside, bags vary."""
    config: Config = getattr(row, kernel)
    dim = 2 * config.out_chunks * config.chunk - 3
    problem = Problem("rows", ((config.block_n + 2, 0, 3),), 1, dim, 5, 5, layout=layout)
    interpreted = configs.choose(dtype, dim, interpreted=True)
    plan = dataclasses.replace(interpreted, **{kernel: config.fit(dim)})
    monkeypatch.setattr(launch, "plan_for", lambda feat: plan)
    assert_within_rounding(triton, problem, dtype)
    if kernel == "forward":  # without gradients: nothing is saved
        feat, protos, offsets = problem.make(dtype)
        with torch.no_grad():
            found = triton(feat, protos, offsets)
        assert out_within_rounding(found, problem, dtype)


def by_name(*names: str) -> list[Problem]:
    """Problems of the list, the large ones on fewer pixels."""
    return [fewer(problem) for problem in PROBLEMS if problem.name in names]


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


def test_more_bags_than_a_program_searches_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [launch.search_block(bags) for bags in (1, 15, 16, 5000)] == [2, 16, 32, 1024]
    monkeypatch.setattr(launch, "search_block", lambda bags: 16)
    counts = torch.randint(0, 4, (20, 1), generator=torch.Generator().manual_seed(0))
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
