# SPDX-License-Identifier: Apache-2.0
"""Autograd around a pair of ops that pack prototypes, for every backend that has them.

The pair has one schema whatever the backend:

    forward(features, share, threshold, append_global) -> (protos, offsets, position, mass)
    backward(grad_protos, share, position, mass, offsets, height, width, channels_last)
        -> grad_features
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastproto import autograd
from fastproto.autograd import OpPair
from fastproto.layout import is_channels_last


def call(
    pair: OpPair, features: Tensor, share: Tensor, threshold: float, append_global: bool
) -> tuple[Tensor, Tensor]:
    """Pack the cells of ``features`` [E, S, D, h, w] that classes fill into bags of prototypes.

    ``share`` [E, K, S*h*w] float32 is the part of every cell that belongs to a class. A bag has its
    cells with more than ``threshold``, and their weighted average where it has no such cell, or
    always (``append_global``), unless no cell has a share.

    Returns:
        protos [E*K*(S*h*w + 1), D], zeros after the bags, and offsets [E*K + 1] int32.
        Differentiable in ``features`` alone.
    """
    inputs = (features, share, threshold, append_global)
    if autograd.is_traced():
        protos, offsets, _, _ = autograd.op(pair.forward)(*inputs)
        return protos, offsets
    if torch.is_grad_enabled() and features.requires_grad:
        return _EagerPack.apply(pair, *inputs)
    protos, offsets, _, _ = pair.forward_now(*inputs)
    return protos, offsets


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, share = inputs[:2]
    _, offsets, position, mass = output
    ctx.save_for_backward(share, position, mass, offsets)
    ctx.maps = (*features.shape[-2:], is_channels_last(features))


class _EagerPack(torch.autograd.Function):
    """What :func:`register` describes, at a fraction of its cost per call, see autograd.py."""

    @staticmethod
    def forward(ctx: Any, pair: OpPair, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = pair.forward_now(*inputs)
        ctx.mark_non_differentiable(output[1])
        _save(ctx, inputs, output)
        ctx.pair = pair
        return output[0], output[1]

    @staticmethod
    def backward(ctx: Any, grad_protos: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        pair = ctx.pair
        # With create_graph: through autograd, which says that it cannot.
        backward = autograd.op(pair.backward) if torch.is_grad_enabled() else pair.backward_now
        return None, backward(grad_protos, *ctx.saved_tensors, *ctx.maps), None, None, None


def register(pair: OpPair) -> None:
    """Give the pair's ops their autograd formulas, for torch.compile and torch.func."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        _save(ctx, inputs, output)

    def backward(ctx: Any, grad_protos: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradient = autograd.op(pair.backward)(grad_protos, *ctx.saved_tensors, *ctx.maps)
        return gradient, None, None, None

    autograd.register_formulas(pair, "extract_prototypes", setup_context, backward)


def fake_forward(
    features: Tensor, share: Tensor, threshold: float, append_global: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty results of the forward."""
    bags, cells = share.shape[0] * share.shape[1], share.shape[2]
    return (
        features.new_empty([bags * (cells + 1), features.shape[2]]),
        share.new_empty([bags + 1], dtype=torch.int32),
        share.new_empty([bags, cells + 1], dtype=torch.int32),
        share.new_empty([bags]),
    )


def fake_backward(
    grad_protos: Tensor,
    share: Tensor,
    position: Tensor,
    mass: Tensor,
    offsets: Tensor,
    height: int,
    width: int,
    channels_last: bool,
) -> Tensor:
    """An empty gradient of the features [E, S, D, h, w], in their layout."""
    shots, dim = share.shape[2] // (height * width), grad_protos.shape[1]
    if channels_last:
        shape = [share.shape[0], shots, height, width, dim]
        return grad_protos.new_empty(shape).movedim(-1, -3)
    return grad_protos.new_empty([share.shape[0], shots, dim, height, width])
