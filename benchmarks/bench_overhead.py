# SPDX-License-Identifier: Apache-2.0
"""What a call costs before any arithmetic: one pixel, one prototype, 8 channels."""

from __future__ import annotations

import statistics

import baselines
import pytest
import torch
from measure import OURS, Call, Record, take_turns
from pytest_benchmark.fixture import BenchmarkFixture

from fastproto import proto_attention

CALLS = 200  # one call is too short for the clock; the times printed are those of so many


@pytest.fixture
def calls() -> dict[str, Call]:
    """Ours through three doors, and eager PyTorch through two."""
    feat, protos = torch.randn(1, 1, 8, 1, 1), torch.randn(1, 8)
    leaves = feat.clone().requires_grad_(), protos.clone().requires_grad_()
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    raw = torch.ops.fastproto.proto_attention_fwd.default

    def public() -> None:
        with torch.no_grad():
            for _ in range(CALLS):
                proto_attention(feat, protos, offsets)

    def recording() -> None:
        for _ in range(CALLS):
            proto_attention(*leaves, offsets)

    def operator() -> None:
        with torch.no_grad():
            for _ in range(CALLS):
                raw(feat, protos, offsets, None, 0.05, 1e-6, True, False)

    def eager() -> None:
        with torch.no_grad():
            for _ in range(CALLS):
                baselines.eager_nchw(feat, protos, (0, 1))

    def eager_recording() -> None:
        for _ in range(CALLS):
            baselines.eager_nchw(*leaves, (0, 1))

    return {
        OURS: public,
        "native, recording a graph": recording,
        "torch.ops.fastproto.proto_attention_fwd": operator,
        "eager_nchw": eager,
        "eager_nchw, recording a graph": eager_recording,
    }


def test_overhead(
    benchmark: BenchmarkFixture, calls: dict[str, Call], quick: bool, record: Record
) -> None:
    torch.set_num_threads(1)
    for call in calls.values():
        call()
    benchmark.group = f"{CALLS} calls of the smallest problem"
    seconds = take_turns(benchmark, calls, rounds=2 if quick else 31)
    if seconds[OURS]:
        record.overhead += [
            {"call": name, "us": round(statistics.median(values) / CALLS * 1e6, 2)}
            for name, values in seconds.items()
        ]
