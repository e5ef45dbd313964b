# SPDX-License-Identifier: Apache-2.0
"""Speed of proto_attention beside its peers: `pytest benchmarks`, or `make bench`.

Machines are noisy, so ours and the peers take turns in one process; the ratios of the medians are
in ``extra_info`` of pytest-benchmark's JSON (``--benchmark-json=FILE``) and in the printed line.
The broadcasting cosine takes its turn at the small sizes only: it is tens of times slower.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from baselines import PEERS, Op, broadcast, native
from torch import Tensor

# (queries, prototypes) at D = 512, HW = 256
SIZES = [(1, 32), (1, 256), (8, 256), (1, 1280)]
ROUNDS = 15


def forward(op: Op, feat: Tensor, protos: Tensor) -> Callable[[], Tensor]:
    """A call without gradients."""

    def call() -> Tensor:
        with torch.no_grad():
            return op(feat, protos)

    return call


def forward_backward(op: Op, feat: Tensor, protos: Tensor) -> Callable[[], Tensor]:
    """A call and its backward pass."""
    feat, protos = feat.clone().requires_grad_(), protos.clone().requires_grad_()
    with torch.no_grad():
        grad = torch.randn_like(op(feat, protos))

    def call() -> Tensor:
        out = op(feat, protos)
        return torch.autograd.grad(out, (feat, protos), grad)[0]

    return call


@pytest.mark.parametrize("make", [forward, forward_backward], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("queries", "count"), SIZES, ids=lambda n: str(n))
def test_proto_attention(benchmark, queries, count, dtype, make) -> None:
    generator = torch.Generator().manual_seed(0)
    feat = torch.randn(1, queries, 512, 16, 16, generator=generator).relu().to(dtype)
    protos = torch.randn(count, 512, generator=generator).relu().to(dtype)
    peers = PEERS | ({"broadcast": broadcast} if count * queries <= 32 else {})
    calls = {name: make(op, feat, protos) for name, op in {"native": native, **peers}.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    expected = calls["eager"]().float()
    for name, call in calls.items():  # warm up, and compare equals only
        assert torch.allclose(call().float(), expected, rtol=0.1, atol=0.1), name
    for _ in range(ROUNDS):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    flops = 4 * queries * 256 * count * 512 * (3.5 if make is forward_backward else 1)
    benchmark.extra_info.update(
        {f"{name}_over_native": round(median[name] / median["native"], 2) for name in peers}
        | {"native_gflops": round(flops / median["native"] / 1e9, 1)}
        | {"threads": torch.get_num_threads(), "torch": torch.__version__}
    )
    benchmark.pedantic(calls["native"], rounds=ROUNDS)
