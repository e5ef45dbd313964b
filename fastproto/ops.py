# SPDX-License-Identifier: Apache-2.0
"""The native op in torch's eyes: fake kernels, autograd, and the call itself.

Importing this module needs the CPU library to be loaded: its schemas are defined there
(csrc/api/schemas.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastproto import _library

_reason = _library.why_not_cpu()
if _reason is not None:
    raise ImportError(f"fastproto.ops needs the native CPU library: {_reason}")


def proto_attention(
    feat: Tensor,
    protos: Tensor,
    offsets: Tensor,
    temperature: float | Tensor,
    eps: float,
    concat: bool,
) -> Tensor:
    """Call the native op on checked arguments; shapes as in ``fastproto.proto_attention``."""
    if isinstance(temperature, Tensor):
        tensor, number = temperature, 1.0
        differentiable = temperature.requires_grad
    else:
        tensor, number = None, temperature
        differentiable = False
    save = torch.is_grad_enabled() and (
        feat.requires_grad or protos.requires_grad or differentiable
    )
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return torch.ops.fastproto.proto_attention_fwd.default(
            feat, protos, offsets, tensor, number, eps, concat, save
        )[0]
    if save:
        return _ProtoAttention.apply(feat, protos, offsets, tensor, number, eps, concat)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fastproto.proto_attention_fwd.default(
            feat, protos, offsets, tensor, number, eps, concat, False
        )[0]


def _is_channels_last(feat: Tensor) -> bool:
    """Must agree with is_channels_last in csrc/api/proto_attention.cpp."""
    return feat.stride(2) == 1 and feat.shape[2] > 1 and feat.shape[3] * feat.shape[4] > 1


def _new_maps(
    feat: Tensor, leading: list[int], channels: int, dtype: torch.dtype | None = None
) -> Tensor:
    """An empty [*leading, channels, H, W] in the layout of ``feat``."""
    height, width = feat.shape[3], feat.shape[4]
    if _is_channels_last(feat):
        return feat.new_empty([*leading, height, width, channels], dtype=dtype).movedim(-1, -3)
    return feat.new_empty([*leading, channels, height, width], dtype=dtype)


def _accumulate_dtype(feat: Tensor) -> torch.dtype:
    return torch.float64 if feat.dtype == torch.float64 else torch.float32


@torch.library.register_fake("fastproto::proto_attention_fwd")
def _(
    feat: Tensor,
    protos: Tensor,
    offsets: Tensor,
    temperature_tensor: Tensor | None,
    temperature: float,
    eps: float,
    concat: bool,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    episodes, queries, dim, height, width = feat.shape
    ways = (offsets.shape[0] - 1) // episodes
    leading = [episodes, queries, ways]
    out = _new_maps(feat, leading, 2 * dim if concat else dim)
    dtype = _accumulate_dtype(feat)
    if not save_for_backward:
        return out, feat.new_empty([0], dtype=dtype), feat.new_empty([0], dtype=dtype)
    stats = feat.new_empty([*leading, 3, height * width], dtype=dtype)
    return out, _new_maps(feat, leading, dim, dtype), stats


@torch.library.register_fake("fastproto::proto_attention_bwd")
def _(
    grad_out: Tensor,
    feat: Tensor,
    protos: Tensor,
    offsets: Tensor,
    temperature_tensor: Tensor | None,
    agg: Tensor,
    stats: Tensor,
    temperature: float,
    eps: float,
    concat: bool,
    needs_protos: bool,
    needs_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_feat = _new_maps(feat, list(feat.shape[:2]), feat.shape[2])
    grad_protos = protos.new_empty(protos.shape if needs_protos else [0])
    if needs_temperature:
        assert temperature_tensor is not None
        return grad_feat, grad_protos, temperature_tensor.new_empty([1])
    return grad_feat, grad_protos, feat.new_empty([0], dtype=_accumulate_dtype(feat))


def _save(ctx: Any, inputs: tuple[Any, ...], saved: Sequence[Tensor]) -> None:
    feat, protos, offsets, temperature_tensor, temperature, eps, concat = inputs
    ctx.save_for_backward(feat, protos, offsets, temperature_tensor, *saved)
    ctx.options = (temperature, eps, concat)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of feat, protos, offsets, temperature_tensor, temperature, eps, concat."""
    feat, protos, offsets, temperature_tensor, agg, stats = ctx.saved_tensors
    needs_protos, needs_temperature = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
    grad_feat, grad_protos, grad_temperature = torch.ops.fastproto.proto_attention_bwd.default(
        grad_out,
        feat,
        protos,
        offsets,
        temperature_tensor,
        agg,
        stats,
        *ctx.options,
        needs_protos,
        needs_temperature,
    )
    return (
        grad_feat,
        grad_protos if needs_protos else None,
        None,
        grad_temperature.reshape(temperature_tensor.shape) if needs_temperature else None,
        None,
        None,
        None,
    )


class _ProtoAttention(torch.autograd.Function):
    """What register_autograd below describes, at half its cost per call.

    A registered formula passes through generic Python at every call (60 us forward and backward):
    as much as a small problem takes to compute. torch.compile and torch.func need that form.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            out, *saved = torch.ops.fastproto.proto_attention_fwd.default(*inputs, True)
        _save(ctx, inputs, saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: through autograd, which says that it cannot
            return _gradients(ctx, grad_out)
        with torch._C._AutoDispatchBelowAutograd():
            return _gradients(ctx, grad_out)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _save(ctx, inputs[:-1], output[1:])


def _backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, grad_out), None)  # save_for_backward


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "proto_attention: the native backend has no second derivative; "
        'call it with backend="reference", which has.'
    )


torch.library.register_autograd(
    "fastproto::proto_attention_fwd", _backward, setup_context=_setup_context
)
torch.library.register_autograd("fastproto::proto_attention_bwd", _no_second_derivative)


@torch.library.register_fake("fastproto::null")
def _(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)
