# SPDX-License-Identifier: Apache-2.0
"""The native op in torch's eyes: fake kernels, autograd, and the call itself.

Importing this module needs the CPU library to be loaded: its schemas are defined there
(csrc/api/schemas.cpp).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastproto.op import autograd, library
from fastproto.op.layout import new_maps

_reason = library.why_not_cpu()
if _reason is not None:
    raise ImportError(f"fastproto.op.native needs the native CPU library: {_reason}")


_PAIR = autograd.library_pair(
    "native", "fastproto::proto_attention_fwd", "fastproto::proto_attention_bwd"
)


def allows_tf32() -> bool:
    """Whether PyTorch's setting for float32 matrix products on CUDA allows TF32.

    "ieee" or unset (the default, "highest") does not: three TF32 products per product have the
    digits of float32.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# torch.compile guards on the setting itself. As in fastproto.op.backends.
allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def proto_attention(
    feat: Tensor,
    protos: Tensor,
    offsets: Tensor,
    temperature: float | Tensor,
    eps: float,
    concat: bool,
) -> Tensor:
    """Call the native op on checked arguments; shapes as in ``fastproto.proto_attention``."""
    modes: tuple[bool, ...] = ()
    if feat.device.type != "cpu" and feat.dtype == torch.float32:
        modes = (allows_tf32(),)
    return autograd.call(_PAIR, feat, protos, offsets, temperature, eps, concat, modes)


def fake_forward(
    on_cuda: bool,
    feat: Tensor,
    protos: Tensor,
    offsets: Tensor,
    temperature_tensor: Tensor | None,
    temperature: float,
    eps: float,
    concat: bool,
    save_for_backward: bool,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the forward returns, without values: csrc/api/schemas.h."""
    episodes, queries, dim, height, width = feat.shape
    ways = (offsets.shape[0] - 1) // episodes
    leading = [episodes, queries, ways]
    out = new_maps(feat, leading, 2 * dim if concat else dim)
    wide = torch.float64 if feat.dtype == torch.float64 else torch.float32
    dtype = feat.dtype if on_cuda else wide
    if not save_for_backward:
        return out, feat.new_empty([0], dtype=dtype), feat.new_empty([0], dtype=wide)
    shape = [*leading, 3, height * width]
    if on_cuda:
        maps, pixels = episodes * queries, height * width
        shape = [maps * ways * pixels + 2 * maps * pixels + 2 * protos.shape[0]]
    stats = feat.new_empty(shape, dtype=wide)
    return out, new_maps(feat, leading, dim, dtype=dtype), stats


def fake_backward(
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
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward returns, without values."""
    grad_feat = new_maps(feat, list(feat.shape[:2]), feat.shape[2])
    grad_protos = protos.new_empty(protos.shape if needs_protos else [0])
    if needs_temperature:
        assert temperature_tensor is not None
        return grad_feat, grad_protos, temperature_tensor.new_empty([1])
    return grad_feat, grad_protos, stats.new_empty([0])


@torch.library.register_fake("fastproto::proto_attention_fwd")
def _(feat: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fake_forward(feat.device.type != "cpu", feat, *rest)


torch.library.register_fake("fastproto::proto_attention_bwd", fake_backward)
autograd.register(_PAIR)


@torch.library.register_fake("fastproto::null")
def _(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)
