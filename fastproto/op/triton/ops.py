# SPDX-License-Identifier: Apache-2.0
"""The Triton ops in torch's eyes: registration, autograd, and the calls themselves.

``torch.library.triton_op`` lets torch.compile look inside: the kernels become part of its graph.
Under ``TRITON_INTERPRET=1`` there is nothing to compile for, and the same functions are opaque
custom ops on CPU tensors.
"""

import contextlib
import functools
from typing import Any, Optional

import torch
from torch import Tensor

from fastproto.op import autograd
from fastproto.op.triton import launch, support
from fastproto.op.triton.launch import Launch, Run

# No ``from __future__ import annotations`` here: torch.library reads the annotations below.


def _run_wrapped(launch: Launch) -> None:
    """A launch that torch.compile can look into."""
    kernel = torch.library.wrap_triton(launch.kernel)
    kernel[(launch.programs,)](**launch.arguments, **launch.options)


def _run_not(launch: Launch) -> None:
    """For fake tensors."""


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if not torch.cuda.is_available():
        return contextlib.nullcontext()
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def _forward_now(feat: Tensor, *rest: Any) -> Any:
    with _on_device_of(feat):
        return launch.run_forward(launch.run_now, feat, *rest)


def _backward_now(grad_out: Tensor, *rest: Any) -> Any:
    with _on_device_of(grad_out):
        return launch.run_backward(launch.run_now, grad_out, *rest)


_RUN: Run = launch.run_now if support.INTERPRETED else _run_wrapped
_register: Any = torch.library.custom_op if support.INTERPRETED else torch.library.triton_op


@_register("fastproto::triton_fwd", mutates_args=())
def _forward_op(
    feat: Tensor,
    protos: Tensor,
    offsets: Tensor,
    temperature_tensor: Optional[Tensor],  # noqa: UP045
    temperature: float,
    eps: float,
    concat: bool,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with _on_device_of(feat):
        shared = (feat, protos, offsets, temperature_tensor)
        return launch.run_forward(_RUN, *shared, temperature, eps, concat, save_for_backward)


@_register("fastproto::triton_bwd", mutates_args=())
def _backward_op(
    grad_out: Tensor,
    feat: Tensor,
    protos: Tensor,
    offsets: Tensor,
    temperature_tensor: Optional[Tensor],  # noqa: UP045
    agg: Tensor,
    lse: Tensor,
    query_stats: Tensor,
    proto_stats: Tensor,
    temperature: float,
    eps: float,
    concat: bool,
    needs_protos: bool,
    needs_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # torch takes addresses computed from the offsets for a write to the offsets; as a write
    # to its input it would keep the backward out of CUDA graphs.
    with _on_device_of(feat):
        shared = (feat, protos, offsets.clone(), temperature_tensor)
        saved = (agg, lse, query_stats, proto_stats)
        options: Any = (temperature, eps, concat, needs_protos, needs_temperature)
        return launch.run_backward(_RUN, grad_out, *shared, *saved, *options)


if support.INTERPRETED:
    _forward_op.register_fake(functools.partial(launch.run_forward, _run_not))
    _backward_op.register_fake(functools.partial(launch.run_backward, _run_not))

_PAIR = autograd.OpPair(
    "triton", "fastproto::triton_fwd", "fastproto::triton_bwd", _forward_now, _backward_now
)
autograd.register(_PAIR)


def proto_attention(
    feat: Tensor,
    protos: Tensor,
    offsets: Tensor,
    temperature: float | Tensor,
    eps: float,
    concat: bool,
) -> Tensor:
    """Call the kernels on checked arguments; shapes as in ``fastproto.proto_attention``."""
    return autograd.call(_PAIR, feat, protos, offsets, temperature, eps, concat)
