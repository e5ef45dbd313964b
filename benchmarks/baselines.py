# SPDX-License-Identifier: Apache-2.0
"""Other ways to compute proto_attention on a CPU: what ours is measured against.

All take feat [E, Q, D, H, W], protos [N_total, D] and the bounds of the E*K bags, and return
Y [E, Q, K, 2D, H, W]. They are written to be fast: everything is normalised once for all bags, the
result is copied together once, and each may return its result in the memory layout that suits it.
Only the loop over the bags cannot be avoided where bags differ in size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastproto import proto_attention

Bounds = tuple[int, ...]
Op = Callable[[Tensor, Tensor, Bounds], Tensor]
TEMPERATURE = 0.05
EPS = 1e-6
# Largest distance from the float32 formula, as a fraction of its norm. Loose: it asks whether
# the same thing is computed; python_tests asks how well.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 5e-3}


def native(feat: Tensor, protos: Tensor, bounds: Bounds) -> Tensor:
    """The kernel of this package, through the public function."""
    return proto_attention(
        feat, protos, _offsets(bounds), temperature=TEMPERATURE, eps=EPS, backend="native"
    )


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


def compiled(gradient: bool, threads: int) -> Op:
    """``torch.compile`` of the eager formula, for one shape and number of threads.

    The columns are the faster form to differentiate, the rows the faster one without gradients
    (in bfloat16; in float32 the forward passes are level).
    """
    # The number of threads is built into the code; saying it keeps code for another number out of
    # the caches of torch versions that do not look.
    return torch.compile(
        eager_nchw if gradient else eager, dynamic=False, options={"cpp.threads": threads}
    )


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Distance from ``truth`` as a fraction of its norm."""
    assert result.shape == truth.shape
    return float((result.float() - truth).norm() / truth.norm())


@functools.cache
def _offsets(bounds: Bounds) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


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
