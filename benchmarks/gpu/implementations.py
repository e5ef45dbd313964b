# SPDX-License-Identifier: Apache-2.0
"""Ours and its peers on a GPU.

Where all bags have the same size the peers compute them in one batched call; where they differ,
they are those of the CPU suite (``baselines.py``), which normalise everything at once, loop over
the bags, and copy the results together once. Each may return its result in the layout that suits
it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable

import baselines
import torch
from baselines import EPS, TEMPERATURE, Bounds, Op
from support.environment import environment
from support.problems import Problem
from torch import Tensor
from torch.nn import functional as F

from fastproto import proto_attention
from fastproto.errors import ArgumentError
from fastproto.op import backends
from gpu.timers import Call

OURS = ("native", "triton")
"""Backends of this package that are compared, in the order of the ladder."""

# (feat, protos, offsets, bounds): ours takes the offsets on the device, the peers the numbers.
Implementation = Callable[[Tensor, Tensor, Tensor, Bounds], Tensor]


def ours(device: str) -> dict[str, Implementation]:
    """Our backends that can run on ``device``."""
    return {name: _backend(name) for name in OURS if backends.why_not(name, device) is None}


def families(device: str, problem: Problem, dtype: torch.dtype) -> dict[str, Implementation]:
    """The native backend, forced to each family that takes the problem."""
    if device != "cuda" or "native" not in ours(device):
        return {}
    found = {}
    for family in backends.CUDA_FAMILIES:
        with _forced(family):
            try:
                last = problem.layout == "channels_last"
                backends.explain(**problem.sizes, dtype=dtype, channels_last=last, save=True)
            except ArgumentError:
                continue
        found[f"native {family}"] = Family(family)
    return found


def _forced(family: str) -> contextlib.AbstractContextManager[None]:
    """The kernels' choice in the environment, where every call looks for it."""
    return environment(FASTPROTO_CUDA_KERNELS=family)


class Family:
    """The native backend, forced to a family of kernels: an ``Implementation``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._native = _backend("native")

    def __call__(self, feat: Tensor, protos: Tensor, offsets: Tensor, bounds: Bounds) -> Tensor:
        with _forced(self.name):
            return self._native(feat, protos, offsets, bounds)

    def around(self, call: Call) -> Call:
        """A call that differentiates, too: forced as a whole."""

        def forced() -> list[Tensor]:
            with _forced(self.name):
                return call()

        return forced


def _backend(name: str) -> Implementation:
    def run(feat: Tensor, protos: Tensor, offsets: Tensor, bounds: Bounds) -> Tensor:
        return proto_attention(
            feat, protos, offsets, temperature=TEMPERATURE, eps=EPS, backend=name
        )

    return run


def equal_bags(bounds: Bounds) -> bool:
    """Whether all bags have the same size, and not 0."""
    counts = {b - a for a, b in itertools.pairwise(bounds)}
    return len(counts) == 1 and 0 not in counts


def eager_batched(feat: Tensor, protos: Tensor, bounds: Bounds) -> Tensor:
    """The formula with one row per pixel, all bags in one batch."""
    query, unit_query, unit_protos, values = _batch(feat, protos, bounds)
    scores = unit_query @ unit_protos.transpose(-1, -2)  # [E, K, Q*HW, N]
    weights = torch.softmax(scores / TEMPERATURE, dim=-1)
    return _enhance(query, weights @ values, feat)


def eager_nchw_batched(feat: Tensor, protos: Tensor, bounds: Bounds) -> Tensor:
    """The formula with one column per pixel, all bags in one batch: no transposition anywhere."""
    maps = feat.flatten(3).unsqueeze(2)  # [E, Q, 1, D, HW]
    bags = _stacked(protos, feat, bounds).unsqueeze(1)  # [E, 1, K, N, D]
    unit_maps, unit_protos = baselines._unit(maps, dim=-2), baselines._unit(bags)
    weights = torch.softmax(unit_protos @ unit_maps / TEMPERATURE, dim=-2)  # [E, Q, K, N, HW]
    enhanced = (bags.transpose(-1, -2) @ weights) * maps
    both = torch.cat([maps.expand_as(enhanced), enhanced], dim=3)
    return both.unflatten(-1, feat.shape[-2:])


def sdpa_batched(feat: Tensor, protos: Tensor, bounds: Bounds) -> Tensor:
    """PyTorch's fused attention on centred, normalised queries and keys; classes are its heads."""
    query, unit_query, unit_protos, values = _batch(feat, protos, bounds)
    ways = values.shape[1]
    aggregates = F.scaled_dot_product_attention(
        unit_query.expand(-1, ways, -1, -1), unit_protos, values, scale=1 / TEMPERATURE
    )
    return _enhance(query, aggregates, feat)


def peers(bounds: Bounds) -> dict[str, Op]:
    """The peers for bags of these sizes, uncompiled."""
    if equal_bags(bounds):
        return {
            "eager": eager_batched,
            "eager_nchw": eager_nchw_batched,
            "sdpa": sdpa_batched,
        }
    return {name: getattr(baselines, name) for name in ("eager", "eager_nchw", "sdpa")}


FORMS = {"compiled": "eager", "compiled_nchw": "eager_nchw"}
"""What torch.compile is applied to, by the name of the result."""


def compiled(op: Op) -> Op:
    """``torch.compile`` of a peer, for these very shapes."""
    return torch.compile(op, dynamic=False, fullgraph=True)


def peer(op: Op) -> Implementation:
    """A peer, called like ours."""

    def run(feat: Tensor, protos: Tensor, offsets: Tensor, bounds: Bounds) -> Tensor:
        return op(feat, protos, bounds)

    return run


def _stacked(protos: Tensor, feat: Tensor, bounds: Bounds) -> Tensor:
    """[E, K, N, D] of equal bags."""
    episodes = feat.shape[0]
    return protos[: bounds[-1]].view(episodes, (len(bounds) - 1) // episodes, bounds[1], -1)


def _batch(feat: Tensor, protos: Tensor, bounds: Bounds) -> tuple[Tensor, ...]:
    """Rows [E, Q, HW, D]; centred, normalised [E, 1, Q*HW, D] and [E, K, N, D]; prototypes."""
    query = baselines._rows(feat)
    values = _stacked(protos, feat, bounds)
    return query, baselines._unit(query.flatten(1, 2)).unsqueeze(1), baselines._unit(values), values


def _enhance(query: Tensor, aggregates: Tensor, feat: Tensor) -> Tensor:
    """Y of rows [E, Q, HW, D] and aggregates [E, K, Q*HW, D]."""
    aggregates = aggregates.unflatten(2, query.shape[1:3]).transpose(1, 2)  # [E, Q, K, HW, D]
    rows = query.unsqueeze(2)
    both = torch.cat([rows.expand_as(aggregates), aggregates * rows], dim=-1)
    return both.transpose(-1, -2).unflatten(-1, feat.shape[-2:])
