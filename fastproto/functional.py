# SPDX-License-Identifier: Apache-2.0
"""The op as users call it: checks the arguments, picks a backend, knows no kernel."""

from __future__ import annotations

import itertools
from typing import NoReturn

import torch
from torch import Tensor

from fastproto import defaults
from fastproto.errors import ArgumentError
from fastproto.op import backends, reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def proto_attention(
    feat: Tensor,  # [E, Q, D, H, W]
    protos: Tensor,  # [N_total, D]
    offsets: Tensor,  # [E*K + 1] int32
    *,
    temperature: float | Tensor = defaults.TEMPERATURE,
    eps: float = defaults.EPS,
    concat: bool = True,
    backend: str | None = None,
) -> Tensor:  # [E, Q, K, 2D, H, W]
    r"""Compare every query pixel with the prototypes of each class, and enhance it by them.

    For query feature :math:`F_i` and the :math:`N` prototypes :math:`P_j` of one (episode, class):

    .. math::
        c_{ij} &= \cos(F_i - \bar F_i, P_j - \bar P_j) \\
        G_i &= \sum_j \operatorname{softmax}_j(c_{ij} / t)\, P_j \\
        Y_i &= [F_i ; G_i \odot F_i]

    Means are over channels; norms are clamped from below by ``eps``. One fused operation: no
    centred copy, no N x HW matrix and no concatenation buffer goes through memory. Differentiable
    in ``feat``, ``protos`` and a tensor ``temperature``; deterministic. Derivation: docs/math.md.

    Args:
        feat: Query features [E, Q, D, H, W] of E episodes with Q images each; NCHW or
            channels_last (other strides may be copied). float32, bfloat16, float16, or float64 on
            the CPU. The result has the same layout and dtype; sums are in float32 (float64).
        protos: The bags of prototypes [N_total, D], packed in the order (episode, class).
        offsets: Where each bag starts, [E*K + 1] int32 on the device of ``protos``, never falling,
            first 0. Rows of ``protos`` from the last offset on belong to no bag and get a zero
            gradient, so a host that does not know how many prototypes a mask selects can hand in a
            larger ``protos``.
        temperature: t > 0, a number or a tensor with one element.
        eps: Smallest norm, > 0.
        concat: Return Y; False returns its second half alone, :math:`G \odot F`.
        backend: "native", "triton" or "reference"; None takes the first that can run here.

    Returns:
        [E, Q, K, 2D, H, W], or [E, Q, K, D, H, W] with ``concat=False``. An empty bag gives G = 0.

    Raises:
        ArgumentError: An argument has a wrong shape, dtype, device or value; says which are
            allowed. Values of tensors on a GPU (``offsets``, a tensor ``temperature``) are not
            read, which would be to wait for it: those that make no sense give NaN there.

    Example:
        >>> feat = torch.randn(1, 2, 512, 16, 16)
        >>> protos = torch.randn(40, 512)
        >>> offsets = torch.tensor([0, 30, 40], dtype=torch.int32)  # background 30, organ 10
        >>> proto_attention(feat, protos, offsets).shape
        torch.Size([1, 2, 2, 1024, 16, 16])
    """
    if torch.is_autocast_enabled(feat.device.type):
        feat, protos = _autocast(feat, protos)
    _check(feat, protos, offsets, temperature, eps)
    if isinstance(temperature, Tensor) and temperature.dtype not in (torch.float32, torch.float64):
        temperature = temperature.float()
    chosen = backends.choose(feat.device, backend, feat.dtype, backends.padded_dim(feat.shape[2]))
    inputs = (feat, protos, offsets, temperature, eps, concat)
    traced = torch.compiler.is_compiling()
    # A GPU is not asked for values, which would be to wait for it: its kernels answer what makes no
    # sense with NaN.
    if chosen == "native":
        from fastproto.op import native

        if traced:
            return native.proto_attention(*inputs)
        try:
            return native.proto_attention(*inputs)
        except RuntimeError as error:
            # What the library says may be lost on the way (torch < 2.13), so it is found again.
            if feat.device.type == "cpu":
                _check_values(offsets, protos, temperature)
            elif (reason := backends.why_failed(feat, protos, offsets)) is not None:
                found = f"'native', which has no plan for this: {reason}"
                raise ArgumentError("backend", found=found, allowed="triton, reference") from error
            raise
    if chosen == "triton":
        from fastproto.op.triton import ops as triton

        if feat.device.type == "cpu" and not traced:
            _check_values(offsets, protos, temperature)
        return triton.proto_attention(*inputs)
    _check_values(offsets, protos, temperature)
    wide = torch.promote_types(feat.dtype, torch.float32)  # of sums, as in every backend
    out = reference.proto_attention(
        feat.to(wide), protos.to(wide), offsets, temperature=temperature, eps=eps, concat=concat
    )
    return out.to(feat.dtype)


def _autocast(feat: Tensor, protos: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast: one dtype, the region's; float64 is left alone, as torch does."""
    if feat.dtype == torch.float64 or protos.dtype == torch.float64:
        return feat, protos
    dtype = torch.get_autocast_dtype(feat.device.type)
    return feat.to(dtype), protos.to(dtype)


def _refuse(argument: str, found: object, allowed: str) -> NoReturn:
    raise ArgumentError(argument, found=str(found), allowed=allowed)


def _check(
    feat: Tensor, protos: Tensor, offsets: Tensor, temperature: float | Tensor, eps: float
) -> None:
    """Everything that can be checked without reading a tensor's values."""
    if feat.dim() != 5:
        _refuse("feat", f"shape {tuple(feat.shape)}", "[E, Q, D, H, W]")
    if feat.dtype not in _DTYPES:
        _refuse("feat", feat.dtype, "float32, bfloat16, float16, float64")
    episodes, _, dim, _, _ = feat.shape
    if protos.dim() != 2 or protos.shape[1] != dim or dim == 0:
        allowed = f"[N_total, D] with the D of feat, {dim}, at least 1"
        _refuse("protos", f"shape {tuple(protos.shape)}", allowed)
    if protos.dtype != feat.dtype:
        _refuse("protos", protos.dtype, f"the dtype of feat, {feat.dtype}")
    if offsets.dtype != torch.int32:
        _refuse("offsets", offsets.dtype, "torch.int32")
    bags = offsets.shape[0] - 1 if offsets.dim() == 1 else 0
    if episodes == 0 or bags < 1 or bags % episodes != 0:
        found = f"shape {tuple(offsets.shape)} for {episodes} episodes"
        _refuse("offsets", found, "[E*K + 1] with the E of feat, E and K at least 1")
    for name, tensor in (("protos", protos), ("offsets", offsets)):
        if tensor.device != feat.device:
            _refuse(name, tensor.device, f"the device of feat, {feat.device}")
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            _refuse("temperature", temperature, "a number above 0")
    elif temperature.device != feat.device:
        allowed = f"a number, or a tensor on the device of feat, {feat.device}"
        _refuse("temperature", f"a tensor on {temperature.device}", allowed)
    elif temperature.numel() != 1:
        found = f"a tensor of shape {tuple(temperature.shape)}"
        _refuse("temperature", found, "a number above 0 or a tensor with one element")
    if not eps > 0:
        _refuse("eps", eps, "a number above 0")


def _check_values(offsets: Tensor, protos: Tensor, temperature: float | Tensor) -> None:
    """Checks that read values: free on the CPU, a synchronisation elsewhere."""
    bounds = offsets.tolist()
    if bounds[0] != 0 or any(a > b for a, b in itertools.pairwise(bounds)):
        _refuse("offsets", bounds, "numbers that never fall, the first 0")
    if bounds[-1] > protos.shape[0]:
        allowed = f"at most the number of rows of protos, {protos.shape[0]}"
        _refuse("offsets", f"{bounds[-1]} last", allowed)
    if isinstance(temperature, Tensor) and not temperature.item() > 0:
        _refuse("temperature", f"a tensor of {temperature.item()}", "a number above 0")
