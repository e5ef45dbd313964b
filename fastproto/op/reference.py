# SPDX-License-Identifier: Apache-2.0
"""The op in plain PyTorch: the specification that every backend is tested against.

Symbols as in docs/math.md: F query feature, P prototype, c cosine, w weight, G aggregate.
Runs on any device in any floating dtype, and can be differentiated twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastproto import defaults


def proto_attention(
    feat: Tensor,  # [E, Q, D, H, W]
    protos: Tensor,  # [N_total, D]
    offsets: Tensor,  # [E*K + 1] int32
    *,
    temperature: float | Tensor = defaults.TEMPERATURE,
    eps: float = defaults.EPS,
    concat: bool = True,
) -> Tensor:  # [E, Q, K, 2D, H, W], or [E, Q, K, D, H, W] without concat
    """Correlation-weighted prototype aggregation, bag by bag; see ``fastproto.proto_attention``."""
    episodes, _, _, height, width = feat.shape
    bounds = offsets.tolist()
    ways = (len(bounds) - 1) // episodes
    outputs = []
    for episode in range(episodes):
        query = feat[episode].flatten(2).transpose(1, 2)  # [Q, HW, D]
        for way in range(ways):
            bag = episode * ways + way
            agg = aggregate(query, protos[bounds[bag] : bounds[bag + 1]], temperature, eps)
            enhanced = agg * query
            if concat:
                enhanced = torch.cat([query, enhanced], dim=-1)
            outputs.append(enhanced.transpose(1, 2).unflatten(2, (height, width)))
    stacked = torch.stack(outputs)  # [E*K, Q, ...]
    return stacked.unflatten(0, (episodes, ways)).transpose(1, 2)


def aggregate(query: Tensor, protos: Tensor, temperature: float | Tensor, eps: float) -> Tensor:
    """G: for every query feature [..., D] the softmax-weighted mean of one bag [N, D]."""
    if protos.shape[0] == 0:
        return torch.zeros_like(query)
    cos = normalize(query, eps) @ normalize(protos, eps).transpose(-1, -2)
    return torch.softmax(cos / temperature, dim=-1) @ protos


def normalize(x: Tensor, eps: float) -> Tensor:
    """(x - mean(x)) / max(|x - mean(x)|, eps) over the last dimension."""
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / torch.linalg.vector_norm(centred, dim=-1, keepdim=True).clamp(min=eps)
