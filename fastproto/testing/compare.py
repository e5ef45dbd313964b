# SPDX-License-Identifier: Apache-2.0
"""The yardstick for every backend: the float64 reference, and what eager PyTorch reaches.

A result passes when its largest error against float64 is at most twice that of the same op in
eager PyTorch in the same dtype (the rule of FlashAttention's tests), give or take a few roundings
of the largest value, which small problems need where eager happens to be exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastproto import reference
from fastproto.testing.problems import Problem

ROUNDINGS = 8


@dataclass(frozen=True)
class Result:
    """Output and gradients of one call; temperature's too."""

    out: Tensor
    grad_feat: Tensor
    grad_protos: Tensor
    grad_temperature: Tensor


def _gradient(problem: Problem, concat: bool, seed: int) -> Tensor:
    """The gradient that comes in: normal numbers in float64."""
    shape = list(problem.out_shape)
    if not concat:
        shape[3] //= 2
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def run(
    op: Callable[..., Tensor],
    problem: Problem,
    dtype: torch.dtype,
    *,
    compute: torch.dtype | None = None,
    temperature: float = 0.05,
    concat: bool = True,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Result:
    """Forward and backward of ``op`` on ``problem`` made in ``dtype``, computed in ``compute``."""
    feat, protos, offsets = problem.make(dtype, seed, device)
    compute = compute or dtype
    # `to` keeps strides; the leaf keeps the layout under test.
    feat = feat.detach().to(compute).requires_grad_()
    protos = protos.to(compute).requires_grad_()
    scalar = torch.float64 if compute == torch.float64 else torch.float32
    t = torch.tensor(temperature, dtype=scalar, device=device, requires_grad=True)
    out = op(feat, protos, offsets, temperature=t, concat=concat)
    grad = _gradient(problem, concat, seed).to(dtype).to(out)
    inputs = (feat, protos, t)
    grads = torch.autograd.grad(out, inputs, grad, allow_unused=True, materialize_grads=True)
    return Result(out.detach(), *grads)


def _temperature_terms(
    problem: Problem, dtype: torch.dtype, temperature: float, concat: bool, seed: int
) -> float:
    """Sum of the magnitudes of the terms whose signed sum is the gradient of the temperature.

    The terms are A (dA - sum_j A dA) c / t^2, and rounding c / t moves each by eps c / t of itself.
    """
    feat, protos, offsets = (x.double() for x in problem.make(dtype, seed))
    grad = _gradient(problem, concat, seed).to(dtype).double()[:, :, :, -problem.dim :]
    bounds = offsets.long().tolist()
    total = 0.0
    for bag in range(len(bounds) - 1):
        episode, way = divmod(bag, problem.ways)
        bag_protos = protos[bounds[bag] : bounds[bag + 1]]
        if bag_protos.shape[0] < 2:
            continue
        query = feat[episode].flatten(2).transpose(1, 2)
        grad_out = grad[episode, :, way].flatten(2).transpose(1, 2) * query
        cos = reference.normalize(query, 1e-6) @ reference.normalize(bag_protos, 1e-6).T
        weight = torch.softmax(cos / temperature, dim=-1)
        grad_weight = grad_out @ bag_protos.T
        excess = grad_weight - (weight * grad_weight).sum(-1, keepdim=True)
        total += float((weight * excess * cos).abs().sum())
    return total / temperature**2 * max(1.0, 1 / temperature / ROUNDINGS)


def assert_as_good_as_eager(
    op: Callable[..., Tensor],
    problem: Problem,
    dtype: torch.dtype,
    *,
    temperature: float = 0.05,
    concat: bool = True,
    seed: int = 0,
    device: torch.device | str = "cpu",
    rounding: float | None = None,
) -> None:
    """Hold ``op`` to the float64 reference by the rule of this module, gradients included.

    All three run on ``device``, eager PyTorch with its settings there, e.g. for TF32. ``rounding``
    is that of the products where they are coarser than ``dtype``.
    """
    options: dict[str, Any] = {"temperature": temperature, "concat": concat, "seed": seed}
    options["device"] = device
    exact = run(reference.proto_attention, problem, dtype, compute=torch.float64, **options)
    eager = run(reference.proto_attention, problem, dtype, **options)
    ours = run(op, problem, dtype, **options)
    eps = rounding or torch.finfo(dtype).eps
    for name in ("out", "grad_feat", "grad_protos", "grad_temperature"):
        truth, baseline, value = (getattr(r, name) for r in (exact, eager, ours))
        assert value.shape == truth.shape, name
        if truth.numel() == 0:
            continue
        assert torch.equal(value.isnan(), truth.isnan()), f"{name}: NaN in other places"
        scale = float(truth.abs().max())
        if name == "grad_temperature":
            scale = _temperature_terms(problem, dtype, temperature, concat, seed)
        error = float((value.double() - truth).abs().max())
        allowed = 2 * float((baseline.double() - truth).abs().max()) + ROUNDINGS * eps * scale
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
