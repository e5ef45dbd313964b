# SPDX-License-Identifier: Apache-2.0
"""Every family of CUDA kernels against the float64 reference, on the CPU, lane by lane.

Small sizes: a tile that ends inside, one that is full and one beyond. Each family has one problem
at D = 512. What all backends are asked is in support/conformance.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from types import ModuleType

import pytest
import torch
from support import conformance, emulator
from support.compare import assert_within_rounding, run
from support.conformance import (
    DTYPES,
    TINY,
    WRITTEN,
    Backend,
    Op,
    edges,
    offsets_of,
    registration,
    values,
    without_dead_half,
)
from support.problems import PROBLEMS, Problem

from fastproto import InputError
from fastproto.op import autograd, backends
from fastproto.op.chips import H200

SHAPES = [
    Problem("mixed", ((0, 1, 70), (5, 130, 0)), queries=2, dim=96, height=4, width=6),
    Problem("channels_last", ((33, 7),), 2, dim=104, height=4, width=5, layout="channels_last"),
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
NETWORK = Problem("network", ((70,),), dim=512, height=8)
NETWORK_LAST = dataclasses.replace(NETWORK, name="network_last", layout="channels_last")
ORDER = Problem("order", ((70, 3),), queries=2, dim=64, height=4, width=18)
RINGS = Problem("order_512", ((70, 3),), dim=512, height=4, width=6)  # two of them


def ready() -> None:
    """Skips where the emulator cannot be built."""
    if emulator.compiler() is None:
        pytest.skip("no C++ compiler")
    emulator.load()


@pytest.fixture(scope="session")
def gpu() -> ModuleType:
    """support.emulator with its library loaded."""
    ready()
    return emulator


def refusal(family: str, problem: Problem, dtype: torch.dtype) -> str | None:
    """What the plan says where a family does not take a problem."""
    last = problem.layout == "channels_last"
    try:
        backends.plan(H200, dtype=dtype, channels_last=last, kernels=family, **problem.sizes)
    except ValueError as error:
        return str(error)
    return None


def problems(family: str, dtype: torch.dtype) -> list[Problem]:
    """Shapes, and the size of a network: in float32 once."""
    found = without_dead_half(SHAPES, dtype)
    if dtype == torch.bfloat16:
        found += [NETWORK, NETWORK_LAST]
    elif dtype == torch.float32 and family == "sm80-latency":
        found += [NETWORK]
    return found


def emulated(name: str, *topics: str, family: str = "") -> Backend:
    """A family, or where that is empty the plan's own choice."""
    tf32 = ("n_1", "n_2", "hw_1", "d_5", "spare_rows", "duplicated")
    return Backend(
        name,
        emulator.proto_attention,
        frozenset(topics),
        traced=traced,
        ops="fastproto_emulated::proto_attention",
        modes=(False,),
        variables={"FASTPROTO_CUDA_KERNELS": family},
        ready=ready,
        refusal=functools.partial(refusal, family) if family else lambda problem, dtype: None,
        problems=functools.partial(problems, family),
        differentiated=TINY[1:],
        small=Problem("small", ((70, 5),), dim=72, height=4, width=6),
        temperatures=(0.3, 0.01),
        forms=((True, False),),  # problems are held with a tensor
        tf32=functools.partial(emulator.proto_attention, tf32=True),
        coarse=[problem for problem in PROBLEMS if problem.name in tf32],
        repeated=(ORDER, RINGS),
        repeated_dtypes=(torch.bfloat16,),
        variations=[functools.partial(emulator.pretending, seed=seed) for seed in (0, 1)],
        written=(WRITTEN,),
        copied=2**-22,  # three TF32 products of P less its mean
        copied_digits=2**-22,
    )


def traced() -> Op:
    """Without the loading of the library and the checks."""
    pair = emulator.load()
    return lambda *inputs: autograd.call(pair, *inputs, 0.05, 1e-6, True, (False,))


KERNELS = ("numbers", "edges", "unchecked")
BACKENDS = [
    emulated("plan", "torch", "opcheck", "cpu", "memory", "tf32"),
    *(
        emulated(
            family, *KERNELS, *(["memory"] if family.startswith("sm90") else []), family=family
        )
        for family in backends.CUDA_FAMILIES
    ),
]
globals().update(conformance.ask(BACKENDS, values, edges, registration))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_the_plans_own_choice(gpu: ModuleType, capability: int, dtype: torch.dtype) -> None:
    problem = dataclasses.replace(SHAPES[0], queries=1)
    with gpu.pretending(capability=capability):
        assert_within_rounding(gpu.proto_attention, problem, dtype)
        assert_within_rounding(gpu.proto_attention, problem, dtype, concat=False)


def test_three_tf32_products_have_the_digits_of_float32_and_one_has_not(gpu: ModuleType) -> None:
    problem = Problem("tf32", ((66,),), dim=128, height=4, width=4)
    assert_within_rounding(gpu.proto_attention, problem, torch.float32)
    tf32 = functools.partial(gpu.proto_attention, tf32=True)
    assert_within_rounding(tf32, problem, torch.float32, rounding=2**-11)
    with pytest.raises(AssertionError, match="error"):
        assert_within_rounding(tf32, problem, torch.float32)


FENCED = [
    dataclasses.replace(RINGS, name="nchw"),
    Problem("last", ((5, 130),), dim=72, height=4, width=18, layout="channels_last"),
]


@pytest.mark.parametrize("problem", FENCED, ids=lambda p: p.name)
def test_what_tma_and_wgmma_use_was_fenced_by_who_wrote_it(
    gpu: ModuleType, problem: Problem
) -> None:
    """A chip would see old values now and then."""
    with gpu.pretending(kernels="sm90-throughput", proxies=True, seed=1):
        run(gpu.proto_attention, problem, torch.bfloat16)


@pytest.mark.parametrize(
    ("layout", "dim", "proxies"),
    [
        *itertools.product(("nchw", "channels_last"), (72, 272), (False,)),
        pytest.param("nchw", 72, True, marks=pytest.mark.slow),
    ],
)
def test_a_cluster_adds_up_what_its_blocks_saw(
    gpu: ModuleType, layout: str, dim: int, proxies: bool
) -> None:
    """One bag has fewer tiles than the cluster blocks."""
    problem = Problem("cluster", ((130, 256),), 2, dim=dim, height=3, width=24, layout=layout)
    last = layout == "channels_last"
    plan = backends.plan(H200, dtype=torch.bfloat16, save=True, channels_last=last, **problem.sizes)
    assert plan["backward_query"]["cluster"] == plan["backward_protos"]["cluster"] == 4
    with gpu.pretending(kernels="sm90", proxies=proxies, seed=1):
        assert_within_rounding(gpu.proto_attention, problem, torch.bfloat16)


def test_what_is_refused(gpu: ModuleType) -> None:
    feat, protos, offsets = torch.rand(1, 1, 8, 2, 2), torch.rand(6, 8), offsets_of(6)
    with pytest.raises(RuntimeError):  # torch < 2.13 loses the words
        gpu.proto_attention(feat.double(), protos.double(), offsets)
    with pytest.raises(RuntimeError):
        gpu.proto_attention(torch.rand(1, 1, 768, 2, 2), torch.rand(6, 768), offsets)
    with gpu.pretending(kernels="fast"), pytest.raises(RuntimeError):
        gpu.proto_attention(feat, protos, offsets)
    with pytest.raises(InputError, match="temperature"):
        gpu.proto_attention(feat, protos, offsets, temperature=-1.0)
    with gpu.pretending(kernels="sm90-throughput"), pytest.raises(RuntimeError):
        gpu.proto_attention(feat, protos, offsets)  # float32
    with gpu.pretending(capability=75), pytest.raises(RuntimeError):
        gpu.proto_attention(feat, protos, offsets)


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
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert one.stride() == other.stride()
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
