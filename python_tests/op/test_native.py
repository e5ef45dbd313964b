# SPDX-License-Identifier: Apache-2.0
"""What only the CPU's op and the reference are asked; the rest is in test_conformance.py."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.conformance import TINY, offsets_of
from support.problems import PROBLEMS, Problem
from torch.utils.checkpoint import checkpoint

import fastproto.op.native  # noqa: F401  (defines torch.ops.fastproto)
from fastproto import InputError, proto_attention
from fastproto.op import reference

native = functools.partial(proto_attention, backend="native")


def test_queries_share_one_support() -> None:
    problem = Problem("q", ((40, 9),), queries=5, dim=64)
    feat, protos, offsets = problem.make()
    together = native(feat, protos, offsets)
    for q in range(5):
        assert torch.equal(native(feat[:, q : q + 1], protos, offsets), together[:, q : q + 1])


def test_the_reference_backend_sums_half_types_in_float32() -> None:
    feat, protos, offsets = PROBLEMS[1].make(torch.bfloat16)
    wide = reference.proto_attention(feat.float(), protos.float(), offsets)
    out = proto_attention(feat, protos, offsets, backend="reference")
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, wide.to(torch.bfloat16))


def test_reference_is_differentiable_twice() -> None:
    problem = Problem("twice", ((3, 2),), dim=4, height=2, width=2, mean=3.0)
    feat, protos, offsets = problem.make(torch.float64)

    def op(f: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return proto_attention(f, p, offsets, temperature=0.5, backend="reference")

    assert torch.autograd.gradgradcheck(op, (feat.requires_grad_(), protos.requires_grad_()))


STEPS = """
import threading, torch
from fastproto import proto_attention

def step(dim, count):
    torch.set_num_threads(1)
    feat = torch.rand(1, 1, dim, 8, 8, requires_grad=True)
    protos = torch.rand(count, dim, requires_grad=True)
    offsets = torch.tensor([0, count], dtype=torch.int32)
    for _ in "abc":
        proto_attention(feat, protos, offsets).sum().backward()
    junk = [torch.rand(n) for n in range(1000)]
    print("fine", dim)

for sizes in ((1, 8), (4, 600), (8, 200), (63, 64)):
    thread = threading.Thread(target=step, args=sizes)
    thread.start()
    thread.join()
"""


def test_more_prototypes_than_channels_stay_in_their_scratch(tmp_path: Path) -> None:
    """In threads of their own: scratch memory is kept per thread and only ever grows."""
    command = [sys.executable, "-c", STEPS]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout.splitlines() == ["fine 1", "fine 4", "fine 8", "fine 63"], result.stderr


@pytest.mark.parametrize("temperature", [2 / 87, 0.0231, 2 / 60, 0.034])
def test_weights_far_below_the_bound_keep_their_digits(temperature: float) -> None:
    feat = torch.rand(1, 1, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    protos = (-1e-4 * feat).flatten(3)[0, 0].T[:5].contiguous()
    ours = proto_attention(feat, protos, offsets_of(5), temperature=temperature, concat=False)
    truth = proto_attention(
        feat.double(), protos.double(), offsets_of(5), temperature=temperature, concat=False
    )
    assert torch.allclose(ours.double(), truth, rtol=2e-5, atol=0)


def test_checkpointing_reads_what_is_saved_once() -> None:
    feat, protos = torch.rand(1, 1, 8, 3, 3), torch.rand(5, 8)
    unpacked = []

    def op(feat: torch.Tensor, protos: torch.Tensor) -> torch.Tensor:
        return proto_attention(feat, protos, offsets_of(5), backend="native")

    def gradients(call: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (feat, protos)]
        return list(torch.autograd.grad(call(*leaves).square().sum(), leaves))

    expected = gradients(op)
    found = gradients(lambda *leaves: checkpoint(op, *leaves, use_reentrant=False))
    assert all(map(torch.equal, found, expected))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: unpacked.append(x) or x):
        gradients(op)
    assert len(unpacked) == 5 + 1  # feat, protos, offsets, agg, stats; and what square keeps


GOOD = {
    "feat": torch.rand(2, 1, 8, 3, 3),
    "protos": torch.rand(6, 8),
    "offsets": torch.tensor([0, 2, 6], dtype=torch.int32),
}
WRONG = [
    ("temperature", 0.0, "number above 0"),
    ("temperature", -1.0, "-1.0"),
    ("temperature", float("nan"), "nan"),
    ("temperature", torch.tensor(-1.0), "-1.0"),
    ("temperature", torch.ones(2), "one element"),
    ("temperature", torch.tensor(0.05, device="meta"), "device of feat"),
    ("eps", 0.0, "number above 0"),
    ("feat", torch.rand(2, 8, 3, 3), "[E, Q, D, H, W]"),
    ("feat", torch.ones(2, 1, 8, 3, 3, dtype=torch.int64), "torch.int64"),
    ("protos", torch.rand(6, 7), "D of feat, 8"),
    ("protos", torch.rand(6, 8, dtype=torch.float64), "torch.float64"),
    ("offsets", torch.tensor([0, 2, 6]), "torch.int32"),
    *(
        ("offsets", torch.tensor(bounds, dtype=torch.int32), words)
        for bounds, words in (
            ([0, 6], "E*K + 1"),
            ([0], "E and K at least 1"),
            ([0, 4, 2], "never fall"),
            ([1, 4, 6], "first 0"),
            ([0, 4, 7], "rows of protos, 6"),
        )
    ),
]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("argument", "value", "words"), WRONG)
def test_errors_name_the_argument(backend: str, argument: str, value: object, words: str) -> None:
    with pytest.raises(InputError) as caught:
        proto_attention(**GOOD | {argument: value}, backend=backend)
    assert caught.value.subject == argument
    assert words in str(caught.value)


def test_opcheck_of_the_template() -> None:
    torch.library.opcheck(torch.ops.fastproto.null.default, (torch.rand(3, 4),))


def test_autocast_leaves_float64_alone() -> None:
    feat, protos, offsets = TINY[0].make(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert proto_attention(feat, protos, offsets).dtype == torch.float64


def test_fake_tensors_have_the_strides_of_real_ones() -> None:
    for problem in TINY:
        feat, protos, offsets = problem.make(torch.float32)
        real = proto_attention(feat, protos, offsets, backend="native")
        with torch._subclasses.FakeTensorMode() as mode:
            fake = [mode.from_tensor(x) for x in (feat, protos, offsets)]
            out = proto_attention(*fake, backend="native")
        assert (out.shape, out.stride()) == (real.shape, real.stride())
