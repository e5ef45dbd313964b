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


def proto_attention(*arguments: Any) -> Tensor:
    """Call the native op on checked arguments, those of :func:`autograd.call`."""
    if arguments[0].device.type != "cpu" and arguments[0].dtype == torch.float32:
        arguments = (*arguments, (allows_tf32(),))
    return autograd.call(_PAIR, *arguments)


def fake_forward(on_cuda: bool, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What the forward returns, without values: csrc/api/schemas.cpp."""
    inputs, save_for_backward = autograd.Inputs(*arguments[:7]), arguments[7]
    feat = inputs.feat
    episodes, queries, dim, height, width = feat.shape
    ways, pixels = (inputs.offsets.shape[0] - 1) // episodes, height * width
    leading = [episodes, queries, ways]
    out = new_maps(feat, leading, 2 * dim if inputs.concat else dim)
    wide = torch.float64 if feat.dtype == torch.float64 else torch.float32
    dtype = feat.dtype if on_cuda else wide
    if not save_for_backward:
        return out, feat.new_empty([0], dtype=dtype), feat.new_empty([0], dtype=wide)
    shape = [*leading, 3, pixels]
    if on_cuda:
        maps = episodes * queries
        shape = [maps * ways * pixels + 2 * maps * pixels + 2 * inputs.protos.shape[0]]
    return out, new_maps(feat, leading, dim, dtype=dtype), feat.new_empty(shape, dtype=wide)


def fake_backward(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward returns, without values."""
    feat, protos, _, temperature_tensor, _, stats = arguments[:6]
    needs_protos, needs_temperature = arguments[9:11]
    grad_feat = new_maps(feat, list(feat.shape[:2]), feat.shape[2])
    grad_protos = protos.new_empty(protos.shape if needs_protos else [0])
    like = temperature_tensor if needs_temperature else stats
    return grad_feat, grad_protos, like.new_empty([int(needs_temperature)])


@torch.library.register_fake("fastproto::proto_attention_fwd")
def _(feat: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fake_forward(feat.device.type != "cpu", feat, *rest)


torch.library.register_fake("fastproto::proto_attention_bwd", fake_backward)
autograd.register(_PAIR)


@torch.library.register_fake("fastproto::null")
def _(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)
