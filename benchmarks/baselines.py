# SPDX-License-Identifier: Apache-2.0
"""Ours and other ways to compute proto_attention: what ours is measured against.

All take feat [E, Q, D, H, W], protos [N_total, D] and the bounds of the E*K bags, and return
Y [E, Q, K, 2D, H, W]. The peers are written to be fast: everything is normalised once for all bags,
the result is copied together once, and each may return its result in the memory layout that suits
it. Only the loop over the bags cannot be avoided where bags differ in size; where they have one
size, a GPU computes them in one batched call.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from support.environment import environment
from support.problems import Problem
from torch import Tensor
from torch.nn import functional as F

from fastproto import defaults, proto_attention
from fastproto.errors import ArgumentError
from fastproto.op import backends

Bounds = tuple[int, ...]
Op = Callable[[Tensor, Tensor, Bounds], Tensor]
Call = Callable[[], list[Tensor]]
TEMPERATURE, EPS = defaults.TEMPERATURE, defaults.EPS
# Largest distance from the float32 formula, as a fraction of its norm. Loose: it asks whether
# the same thing is computed; python_tests asks how well.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 5e-3}
OURS = ("native", "triton")
"""Backends of this package that are compared, in the order of the ladder."""


def backend(name: str) -> Op:
    """A backend of this package, through the public function."""

    def run(feat: Tensor, protos: Tensor, bounds: Bounds) -> Tensor:
        offsets = _offsets(bounds, feat.device)
        return proto_attention(
            feat, protos, offsets, temperature=TEMPERATURE, eps=EPS, backend=name
        )

    return run


native = backend("native")


def ours(device: str) -> dict[str, Op]:
    """Our backends that can run on ``device``."""
    return {name: backend(name) for name in OURS if backends.why_not(name, device) is None}


class Family:
    """The native backend, forced to a family of kernels in the environment: an ``Op``."""

    def __init__(self, name: str) -> None:
        self._forced = functools.partial(environment, FASTPROTO_CUDA_KERNELS=name)

    def __call__(self, feat: Tensor, protos: Tensor, bounds: Bounds) -> Tensor:
        with self._forced():
            return native(feat, protos, bounds)

    def takes(self, problem: Problem, dtype: torch.dtype) -> bool:
        """Whether the family has kernels for a problem."""
        last = problem.layout == "channels_last"
        try:
            with self._forced():
                backends.explain(**problem.sizes, dtype=dtype, channels_last=last, save=True)
        except ArgumentError:
            return False
        return True

    def around(self, call: Call) -> Call:
        """A call that differentiates, too: forced as a whole."""

        def forced() -> list[Tensor]:
            with self._forced():
                return call()

        return forced


def families(device: str, problem: Problem, dtype: torch.dtype) -> dict[str, Op]:
    """The native backend, forced to each family that takes the problem."""
    if device != "cuda" or "native" not in ours(device):
        return {}
    found = {f"native {name}": Family(name) for name in backends.CUDA_FAMILIES}
    return {name: family for name, family in found.items() if family.takes(problem, dtype)}


def eager(feat: Tensor, protos: Tensor, bounds: Bounds) -> Tensor:
    """The formula in plain PyTorch, one row per pixel."""
    query = _rows(feat)
    unit_query, unit_protos = _unit(query), _unit(protos)
    aggregates = [
        torch.softmax(unit_query[e] @ unit_protos[bag].T / TEMPERATURE, dim=-1) @ protos[bag]
        for e, bag in _bags(feat, bounds)
    ]
    return _enhance_rows(query, aggregates, feat, bounds)


def eager_nchw(feat: Tensor, protos: Tensor, bounds: Bounds) -> Tensor:
    """The formula in plain PyTorch, one column per pixel: no transposition anywhere."""
    maps = feat.flatten(3)  # [E, Q, D, HW]
    unit_maps, unit_protos = _unit(maps, dim=-2), _unit(protos)
    parts = []
    for e, bag in _bags(feat, bounds):
        weights = torch.softmax(unit_protos[bag] @ unit_maps[e] / TEMPERATURE, dim=1)
        parts += [maps[e], (protos[bag].T @ weights) * maps[e]]
    stacked = torch.stack(parts, dim=1).unflatten(1, _leading(feat, bounds))  # [Q, E, K, 2, D, HW]
    return stacked.transpose(0, 1).flatten(3, 4).unflatten(-1, feat.shape[-2:])


def sdpa(feat: Tensor, protos: Tensor, bounds: Bounds) -> Tensor:
    """PyTorch's fused attention on centred, normalised queries and keys."""
    query = _rows(feat)
    # Contiguous, or PyTorch falls back to its unfused path.
    unit_query, unit_protos = _unit(query).unsqueeze(2), _unit(protos)
    images = feat.shape[1]
    aggregates = [
        F.scaled_dot_product_attention(
            unit_query[e],
            unit_protos[bag].expand(images, 1, -1, -1),
            protos[bag].expand(images, 1, -1, -1),
            scale=1 / TEMPERATURE,
        ).squeeze(1)
        for e, bag in _bags(feat, bounds)
    ]
    return _enhance_rows(query, aggregates, feat, bounds)


def broadcast(feat: Tensor, protos: Tensor, bounds: Bounds) -> Tensor:
    """``F.cosine_similarity`` with broadcasting, as published few-shot code writes it."""
    query = _rows(feat)
    centred_query = (query - query.mean(-1, keepdim=True)).unsqueeze(-2)
    centred_protos = protos - protos.mean(-1, keepdim=True)
    aggregates = []
    for e, bag in _bags(feat, bounds):
        cos = F.cosine_similarity(centred_query[e], centred_protos[bag], dim=-1, eps=EPS)
        aggregates.append(torch.softmax(cos / TEMPERATURE, dim=-1) @ protos[bag])
    return _enhance_rows(query, aggregates, feat, bounds)


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
    unit_maps, unit_protos = _unit(maps, dim=-2), _unit(bags)
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
    """The peers on a GPU for bags of these sizes, uncompiled."""
    if equal_bags(bounds):
        return {"eager": eager_batched, "eager_nchw": eager_nchw_batched, "sdpa": sdpa_batched}
    return {"eager": eager, "eager_nchw": eager_nchw, "sdpa": sdpa}


FORMS = {"compiled": "eager", "compiled_nchw": "eager_nchw"}
"""What torch.compile is applied to, by the name of the result."""


def compiled(op: Op, **options: Any) -> Op:
    """``torch.compile`` of a peer, for one shape."""
    return torch.compile(op, dynamic=False, **options)


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Distance from ``truth`` as a fraction of its norm."""
    assert result.shape == truth.shape
    return float((result.float() - truth).norm() / truth.norm())


@functools.cache
def _offsets(bounds: Bounds, device: torch.device) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def _leading(feat: Tensor, bounds: Bounds) -> tuple[int, int, int]:
    """Episodes, classes, and the two halves of Y."""
    return (feat.shape[0], (len(bounds) - 1) // feat.shape[0], 2)


def _bags(feat: Tensor, bounds: Bounds) -> list[tuple[int, slice]]:
    """(episode, rows of protos) of every bag."""
    _, ways, _ = _leading(feat, bounds)
    return [(i // ways, slice(bounds[i], bounds[i + 1])) for i in range(len(bounds) - 1)]


def _rows(feat: Tensor) -> Tensor:
    # Contiguous: the matrix products and the softmax gain more than the copy costs.
    return feat.flatten(3).transpose(2, 3).contiguous()  # [E, Q, HW, D]


def _unit(x: Tensor, dim: int = -1) -> Tensor:
    x = x - x.mean(dim, keepdim=True)
    return x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp(min=EPS)


def _enhance_rows(query: Tensor, aggregates: list[Tensor], feat: Tensor, bounds: Bounds) -> Tensor:
    """Y of the aggregates [Q, HW, D] of all bags, copied together once."""
    parts = []
    for (e, _), aggregate in zip(_bags(feat, bounds), aggregates, strict=True):
        parts += [query[e], aggregate * query[e]]
    stacked: Any = torch.stack(parts, dim=2).unflatten(2, _leading(feat, bounds))
    # [Q, HW, E, K, 2, D] -> [E, Q, K, 2, D, HW]
    return stacked.permute(2, 0, 3, 4, 5, 1).flatten(3, 4).unflatten(-1, feat.shape[-2:])


def _stacked(protos: Tensor, feat: Tensor, bounds: Bounds) -> Tensor:
    """[E, K, N, D] of equal bags."""
    episodes = feat.shape[0]
    return protos[: bounds[-1]].view(episodes, (len(bounds) - 1) // episodes, bounds[1], -1)


def _batch(feat: Tensor, protos: Tensor, bounds: Bounds) -> tuple[Tensor, ...]:
    """Rows [E, Q, HW, D]; centred, normalised [E, 1, Q*HW, D] and [E, K, N, D]; prototypes."""
    query = _rows(feat)
    values = _stacked(protos, feat, bounds)
    return query, _unit(query.flatten(1, 2)).unsqueeze(1), _unit(values), values


def _enhance(query: Tensor, aggregates: Tensor, feat: Tensor) -> Tensor:
    """Y of rows [E, Q, HW, D] and aggregates [E, K, Q*HW, D]."""
    aggregates = aggregates.unflatten(2, query.shape[1:3]).transpose(1, 2)  # [E, Q, K, HW, D]
    rows = query.unsqueeze(2)
    both = torch.cat([rows.expand_as(aggregates), aggregates * rows], dim=-1)
    return both.transpose(-1, -2).unflatten(-1, feat.shape[-2:])
