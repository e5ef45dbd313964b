# SPDX-License-Identifier: Apache-2.0
"""Prototypes and what they say of a feature, bag by bag in float64: what the fast code must equal.

Bags are ``[E][K]`` tensors ``[N, D]``.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F


def slow_bags(
    features: Tensor,  # [E, S, D, h, w]
    labels: Tensor,  # [E, S, H, W]; what lacks to h * cell and w * cell belongs to no class
    classes: int,
    cell: int,
    threshold: float = 0.5,
    append_global: bool = False,
) -> list[list[Tensor]]:
    """Prototypes, from the share of every single cell that a class has."""
    episodes, shots, _, height, width = features.shape
    rows = features.double().permute(0, 1, 3, 4, 2).flatten(1, 3)  # [E, S*h*w, D]
    bags: list[list[Tensor]] = [[] for _ in range(episodes)]
    for e, k in itertools.product(range(episodes), range(classes)):
        shares = []
        for s, y, x in itertools.product(range(shots), range(height), range(width)):
            patch = labels[e, s, y * cell : (y + 1) * cell, x * cell : (x + 1) * cell]
            shares.append(int((patch == k).sum()) / cell**2)
        share = torch.tensor(shares, dtype=torch.float64)
        bag = rows[e][share > threshold]
        if share.any() and (append_global or not len(bag)):
            bag = torch.cat([bag, (share @ rows[e] / share.sum())[None]])
        bags[e].append(bag)
    return bags


def slow_aggregates(feat: Tensor, bags: list[list[Tensor]], t: float) -> tuple[Tensor, Tensor]:
    """G ``[E, Q, K, D, h, w]`` of features ``[E, Q, D, h, w]``, and the scores ``[E, Q, K, h, w]``.

    An empty bag gives 0 and -1/t.
    """
    feat = feat.double()
    aggregates = torch.zeros_like(feat).unsqueeze(2).repeat(1, 1, len(bags[0]), 1, 1, 1)
    scores = torch.full_like(aggregates[:, :, :, 0], -1 / t)
    for e, k in itertools.product(range(len(bags)), range(len(bags[0]))):
        if len(bags[e][k]):
            weights = (_cosine(feat[e, :, None], bags[e][k][..., None, None]) / t).softmax(dim=1)
            aggregates[e, :, k] = torch.einsum("qnhw,nd->qdhw", weights, bags[e][k])
            scores[e, :, k] = _cosine(feat[e, :, None], aggregates[e, :, k, None])[:, 0] / t
    return aggregates, scores


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of ``[..., D, h, w]`` without their means."""
    a, b = (each - each.mean(dim=-3, keepdim=True) for each in (a, b))
    return F.cosine_similarity(a, b, dim=-3, eps=1e-6)
