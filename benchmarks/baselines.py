# SPDX-License-Identifier: Apache-2.0
"""Other ways to compute proto_attention for one class: what ours is measured against.

All take feat [1, Q, D, H, W] and one bag protos [N, D], and return Y [1, Q, 1, 2D, H, W].
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastproto import proto_attention

Op = Callable[[Tensor, Tensor], Tensor]
TEMPERATURE = 0.05


def native(feat: Tensor, protos: Tensor) -> Tensor:
    """The kernel of this package, through the public function."""
    return proto_attention(feat, protos, _offsets(protos.shape[0]), backend="native")


def eager(feat: Tensor, protos: Tensor) -> Tensor:
    """The formula in plain PyTorch, batched over queries."""
    query = feat.flatten(3).transpose(2, 3)[0]  # [Q, HW, D]
    agg = torch.softmax(_centred(query) @ _centred(protos).T / TEMPERATURE, dim=-1) @ protos
    return _epilogue(query, agg, feat)


def sdpa(feat: Tensor, protos: Tensor) -> Tensor:
    """PyTorch's fused attention on centred, normalised queries and keys."""
    query = feat.flatten(3).transpose(2, 3)[0]
    key = _centred(protos).expand(query.shape[0], -1, -1)
    value = protos.expand(query.shape[0], -1, -1)
    agg = F.scaled_dot_product_attention(
        _centred(query).unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), scale=1 / TEMPERATURE
    )
    return _epilogue(query, agg.squeeze(1), feat)


compiled = torch.compile(eager, dynamic=False)


def broadcast(feat: Tensor, protos: Tensor) -> Tensor:
    """``F.cosine_similarity`` with broadcasting, as published few-shot code writes it."""
    query = feat.flatten(3).transpose(2, 3)[0]
    cos = F.cosine_similarity(
        (query - query.mean(-1, keepdim=True)).unsqueeze(2),
        (protos - protos.mean(-1, keepdim=True))[None, None],
        dim=-1,
    )
    return _epilogue(query, torch.softmax(cos / TEMPERATURE, dim=-1) @ protos, feat)


PEERS: dict[str, Op] = {"eager": eager, "sdpa": sdpa, "compiled": compiled}


@functools.cache
def _offsets(count: int) -> Tensor:
    return torch.tensor([0, count], dtype=torch.int32)


def _centred(x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-6)


def _epilogue(query: Tensor, agg: Tensor, feat: Tensor) -> Tensor:
    enhanced = torch.cat([query, agg * query], dim=-1).transpose(1, 2)
    return enhanced.unflatten(2, feat.shape[-2:])[None, :, None]
