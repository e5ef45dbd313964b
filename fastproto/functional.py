# SPDX-License-Identifier: Apache-2.0
"""The op as users call it: checks the arguments, picks a backend, knows no kernel."""

from __future__ import annotations

import itertools

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
    if chosen == "native":
        from fastproto.op import native

        if torch.compiler.is_compiling():
            return native.proto_attention(feat, protos, offsets, temperature, eps, concat)
        try:
            return native.proto_attention(feat, protos, offsets, temperature, eps, concat)
        except RuntimeError as error:
            # What the library says may be lost on the way (torch < 2.13), so it is found again. A
            # GPU is not asked for values, which would be to wait for it.
            if feat.device.type == "cpu":
                _check_values(offsets, protos, temperature)
            else:
                reason = backends.why_failed(feat, protos, offsets)
                if reason is not None:
                    raise ArgumentError(
                        "backend",
                        found=f"'native', which has no plan for this: {reason}",
                        allowed="triton, reference",
                    ) from error
            raise
    if chosen == "triton":
        from fastproto.op.triton import ops as triton

        # A GPU is not asked for values, which would be to wait for it: its kernels answer what
        # makes no sense with NaN.
        if feat.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_values(offsets, protos, temperature)
        return triton.proto_attention(feat, protos, offsets, temperature, eps, concat)
    _check_values(offsets, protos, temperature)
    if feat.dtype in (torch.bfloat16, torch.float16):
        # As every backend does: sums in float32.
        wide = reference.proto_attention(
            feat.float(), protos.float(), offsets, temperature=temperature, eps=eps, concat=concat
        )
        return wide.to(feat.dtype)
    return reference.proto_attention(
        feat, protos, offsets, temperature=temperature, eps=eps, concat=concat
    )


def _autocast(feat: Tensor, protos: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast: one dtype, the region's; float64 is left alone, as torch does."""
    if feat.dtype == torch.float64 or protos.dtype == torch.float64:
        return feat, protos
    dtype = torch.get_autocast_dtype(feat.device.type)
    return feat.to(dtype), protos.to(dtype)


def _check(
    feat: Tensor, protos: Tensor, offsets: Tensor, temperature: float | Tensor, eps: float
) -> None:
    """Everything that can be checked without reading a tensor's values."""
    if feat.dim() != 5:
        raise ArgumentError("feat", found=f"shape {tuple(feat.shape)}", allowed="[E, Q, D, H, W]")
    if feat.dtype not in _DTYPES:
        raise ArgumentError(
            "feat", found=str(feat.dtype), allowed="float32, bfloat16, float16, float64"
        )
    if protos.dim() != 2 or protos.shape[1] != feat.shape[2] or feat.shape[2] == 0:
        raise ArgumentError(
            "protos",
            found=f"shape {tuple(protos.shape)}",
            allowed=f"[N_total, D] with the D of feat, {feat.shape[2]}, at least 1",
        )
    if protos.dtype != feat.dtype:
        raise ArgumentError(
            "protos", found=str(protos.dtype), allowed=f"the dtype of feat, {feat.dtype}"
        )
    if offsets.dtype != torch.int32:
        raise ArgumentError("offsets", found=str(offsets.dtype), allowed="torch.int32")
    episodes = feat.shape[0]
    if (
        offsets.dim() != 1
        or episodes == 0
        or offsets.shape[0] < 2
        or (offsets.shape[0] - 1) % episodes != 0
    ):
        raise ArgumentError(
            "offsets",
            found=f"shape {tuple(offsets.shape)} for {episodes} episodes",
            allowed="[E*K + 1] with the E of feat, E and K at least 1",
        )
    for name, tensor in (("protos", protos), ("offsets", offsets)):
        if tensor.device != feat.device:
            raise ArgumentError(
                name, found=str(tensor.device), allowed=f"the device of feat, {feat.device}"
            )
    if isinstance(temperature, Tensor):
        if temperature.device != feat.device:
            raise ArgumentError(
                "temperature",
                found=f"a tensor on {temperature.device}",
                allowed=f"a number, or a tensor on the device of feat, {feat.device}",
            )
        if temperature.numel() != 1:
            raise ArgumentError(
                "temperature",
                found=f"a tensor of shape {tuple(temperature.shape)}",
                allowed="a number above 0 or a tensor with one element",
            )
    elif not temperature > 0:
        raise ArgumentError("temperature", found=str(temperature), allowed="a number above 0")
    if not eps > 0:
        raise ArgumentError("eps", found=str(eps), allowed="a number above 0")


def _check_values(offsets: Tensor, protos: Tensor, temperature: float | Tensor) -> None:
    """Checks that read values: free on the CPU, a synchronisation elsewhere."""
    bounds = offsets.tolist()
    if bounds[0] != 0 or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ArgumentError(
            "offsets", found=str(bounds), allowed="numbers that never fall, the first 0"
        )
    if bounds[-1] > protos.shape[0]:
        raise ArgumentError(
            "offsets",
            found=f"{bounds[-1]} last",
            allowed=f"at most the number of rows of protos, {protos.shape[0]}",
        )
    if isinstance(temperature, Tensor) and not temperature.item() > 0:
        raise ArgumentError(
            "temperature", found=f"a tensor of {temperature.item()}", allowed="a number above 0"
        )
