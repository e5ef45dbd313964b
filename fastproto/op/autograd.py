# SPDX-License-Identifier: Apache-2.0
"""Autograd around a pair of forward and backward ops, for every compiled backend.

The pair has one schema whatever the backend, but for the tensors that the forward saves:

    forward(*inputs, save_for_backward, *modes) -> (out, *saved)
    backward(grad_out, *inputs[:4], *saved, *inputs[4:], needs_protos, needs_temperature, *modes)
        -> (grad_feat, grad_protos, grad_temperature)

``inputs`` are :class:`Inputs`; ``modes`` are settings of PyTorch that a backend honours; the
backward runs in those of its forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """What both ops are called with, checked, in the order of their schemas."""

    feat: Tensor
    protos: Tensor
    offsets: Tensor
    temperature_tensor: Tensor | None
    temperature: float  # where there is no tensor
    eps: float
    concat: bool


@dataclasses.dataclass(frozen=True)
class OpPair:
    """A backend's ops: the names they are registered by, and what plain eager calls run.

    ``forward_now`` and ``backward_now`` are the ops without torch's dispatcher above them.
    """

    backend: str
    forward: str
    backward: str
    forward_now: Callable[..., Any]
    backward_now: Callable[..., Any]


def op(qualified_name: str) -> Any:
    """The op that is registered as ``namespace::name``."""
    namespace, name = qualified_name.split("::")
    return getattr(getattr(torch.ops, namespace), name).default


def library_pair(backend: str, forward: str, backward: str) -> OpPair:
    """The pair of two ops that a loaded library has registered, by their qualified names."""

    def now(qualified_name: str) -> Callable[..., Any]:
        kernel = op(qualified_name)

        def call_below_autograd(*arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return kernel(*arguments)

        return call_below_autograd

    return OpPair(backend, forward, backward, now(forward), now(backward))


def call(
    pair: OpPair,
    feat: Tensor,
    protos: Tensor,
    offsets: Tensor,
    temperature: float | Tensor,
    eps: float,
    concat: bool,
    modes: tuple[bool, ...] = (),
) -> Tensor:
    """Call the pair on checked arguments; shapes as in ``fastproto.proto_attention``."""
    if isinstance(temperature, Tensor):
        tensor, number = temperature, 1.0
    else:
        tensor, number = None, float(temperature)
    inputs = (feat, protos, offsets, tensor, number, eps, concat)  # Inputs would cost 0.5 us
    save = torch.is_grad_enabled() and (
        feat.requires_grad or protos.requires_grad or (tensor is not None and tensor.requires_grad)
    )
    if is_traced():
        return op(pair.forward)(*inputs, save, *modes)[0]
    if save:
        return _EagerFunction.apply(pair, modes, *inputs)
    return pair.forward_now(*inputs, False, *modes)[0]


def is_traced() -> bool:
    """Whether something stands between this call and the kernel that must see the op."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _save(ctx: Any, inputs: Sequence[Any], modes: Sequence[bool], saved: Sequence[Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *saved)
    ctx.options = inputs[4:]
    ctx.modes = modes


def _gradients(
    ctx: Any, backward: Callable[..., Sequence[Tensor]], grad_out: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of :class:`Inputs`."""
    saved = ctx.saved_tensors  # once: checkpointing unpacks them anew at each access
    needs_protos, needs_temperature = needs[1], needs[3]
    options = (*ctx.options, needs_protos, needs_temperature, *ctx.modes)
    grad_feat, grad_protos, grad_temperature = backward(grad_out, *saved, *options)
    return (
        grad_feat,
        grad_protos if needs_protos else None,
        None,
        grad_temperature.reshape(saved[3].shape) if needs_temperature else None,
        *(None, None, None),
    )


class _EagerFunction(torch.autograd.Function):
    """What :func:`register` describes, at half its cost per call.

    A registered formula passes through generic Python at every call (60 us forward and backward):
    as much as a small problem takes to compute. torch.compile and torch.func need that form.
    """

    @staticmethod
    def forward(ctx: Any, pair: OpPair, modes: tuple[bool, ...], *inputs: Any) -> Tensor:
        out, *saved = pair.forward_now(*inputs, True, *modes)
        _save(ctx, inputs, modes, saved)
        ctx.pair = pair
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        pair = ctx.pair
        # With create_graph: through autograd, which says that it cannot.
        backward = op(pair.backward) if torch.is_grad_enabled() else pair.backward_now
        return (None, None, *_gradients(ctx, backward, grad_out, ctx.needs_input_grad[2:]))


def register(pair: OpPair) -> None:
    """Give the pair's ops their autograd formulas, for torch.compile and torch.func."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        _save(ctx, inputs[:7], inputs[8:], output[1:])

    def backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        nothing = [None] * (1 + len(ctx.modes))  # save_for_backward, modes
        return (*_gradients(ctx, op(pair.backward), grad_out, needs), *nothing)

    def no_second_derivative(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"proto_attention: the {pair.backend} backend has no second derivative; "
            'call it with backend="reference", which has.'
        )

    torch.library.register_autograd(pair.forward, backward, setup_context=setup_context)
    torch.library.register_autograd(pair.backward, no_second_derivative)
