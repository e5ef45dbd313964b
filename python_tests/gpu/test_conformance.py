# SPDX-License-Identifier: Apache-2.0
"""Native and Triton on a GPU, and every family of CUDA kernels, by the questions of all backends.

Families also run what the plan would not pick them for.
"""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from support import conformance
from support.compare import assert_within_rounding
from support.conformance import DTYPES, WRITTEN, Backend, asked, edges, gpu, registration, values
from support.problems import PROBLEMS, Problem

from fastproto import InputError, proto_attention
from fastproto.op import backends

BAGS = [tuple((n, 96 - n) for n in range(0, 97, step)) for step in (6, 24)]
MANY = Problem("many", BAGS[0], queries=2)  # more tiles than multiprocessors
SOME = Problem("some", BAGS[1], queries=2)
REPEATED = (PROBLEMS[0], PROBLEMS[1], PROBLEMS[9], PROBLEMS[16], PROBLEMS[18], SOME)


def on_gpu(name: str, *topics: str, family: str = "") -> Backend:
    """A backend there, or a family of the native one."""
    backend = "native" if family else name
    return Backend(
        name,
        gpu.op(backend),
        frozenset({"numbers", "edges", "unchecked", *topics}),
        says=f"{backend} backend",
        device="cuda",
        variables={"FASTPROTO_CUDA_KERNELS": family} if family else {},
        ready=lambda: gpu.skip_without(backend, "cuda"),
        refusal=gpu.refusal if family else lambda problem, dtype: None,
        problems=lambda dtype: conformance.without_dead_half(
            [*PROBLEMS, SOME] if family or dtype == torch.float16 else [*PROBLEMS, SOME, MANY],
            dtype,
        ),
        temperatures=(0.01, 0.3) if family else (0.001, 0.02, 0.05, 1.0, 50.0),
        tf32=gpu.with_tf32(gpu.op(backend)),
        coarse=PROBLEMS,
        repeated=REPEATED,
        variations=(contextlib.nullcontext,) * 3,
        written=(WRITTEN, *REPEATED[:-1]),
        expanded=Problem("expanded", ((40, 2, 7), (1, 0, 70)), 3, dim=64, height=4, width=16),
        expanded_digits=2**-6,
        copied=1.3e-6,  # three TF32 products keep 22 bits
        copied_digits=1e-5,
        constant_digits=2e-2,
        compiler="inductor",
        compiled=(torch.float32, torch.bfloat16),
    )


BACKENDS = [
    *(on_gpu(name, "torch", "autocast", "tf32") for name in gpu.BACKENDS),
    *(on_gpu(family, family=family) for family in backends.CUDA_FAMILIES),
]
globals().update(conformance.ask(BACKENDS, values, edges, registration))


@asked("torch")
@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "strided"])
def test_layouts_within_rounding(
    backend: Backend, dtype: torch.dtype, layout: str, concat: bool
) -> None:
    problem = Problem("layout", ((33, 7),), queries=2, dim=96, height=7, width=9, layout=layout)
    backend.hold(problem, dtype, concat=concat)
    out = backend.call(*backend.make(problem, dtype), concat=concat)
    plain = backend.make(dataclasses.replace(problem, layout="nchw"), dtype)
    # Not to the bit: in another layout threads hold other elements and add in another order.
    torch.testing.assert_close(out, backend.call(*plain, concat=concat))
    assert (out.stride(3) == 1) == (layout == "channels_last")


@asked("torch")
def test_wide_features_that_no_tile_holds(backend: Backend) -> None:
    problem = Problem("wide", ((40, 3),), dim=1536, height=4, width=5)
    if backend.name == "native":
        with pytest.raises(InputError, match=r"1536|512"):
            backend.call(*problem.make(device=backend.device))
        return
    for dtype in DTYPES:
        assert_within_rounding(backend.call, problem, dtype, device=backend.device)


def test_float64_is_left_to_plain_pytorch(device: str) -> None:
    feat, protos, offsets = (x.to(device) for x in PROBLEMS[2].make(torch.float64))
    assert proto_attention(feat, protos, offsets).dtype == torch.float64
    for name in gpu.BACKENDS:
        if backends.why_not(name, device) is None:
            with pytest.raises(InputError, match="float64"):
                proto_attention(feat, protos, offsets, backend=name)
