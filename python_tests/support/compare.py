# SPDX-License-Identifier: Apache-2.0
"""The yardstick for every backend: the float64 reference, and what rounding may do to it.

A result passes when each of its numbers is off by at most ``ROUNDINGS`` times a model of its error,
"Rounding" in docs/math.md, which is made of exact intermediates alone: no machine has a say in it.
What eager PyTorch reaches is only told beside a failure.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastproto.op import reference
from support.problems import Problem

NAMES = ("out", "grad_feat", "grad_protos", "grad_temperature")
ROUNDINGS = 4


@dataclass(frozen=True)
class Result:
    """Output and gradients of one call, temperature's too; or a model of their errors."""

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


class _Vectors:
    """Vectors x [n, D] with their means and reciprocal norms r [n, 1], and (x - mean) r.

    ``size`` is the magnitude of the terms of (x - mean) r, ``condition`` is 1 + |mean| / std.
    """

    def __init__(self, x: Tensor) -> None:
        self.x, self.mean = x, x.mean(-1, keepdim=True)
        norm = torch.linalg.vector_norm(x - self.mean, dim=-1, keepdim=True)
        self.rnorm = 1 / norm.clamp(min=1e-6)
        self.unit = (x - self.mean) * self.rnorm
        # A constant vector must be centred to zeros: its mean excuses nothing.
        shift = torch.where(norm > 1e-6, self.mean.abs() * self.rnorm, 0.0)
        self.size = self.unit.abs() + 2 * shift
        self.condition = 1 + shift * x.shape[-1] ** 0.5


def _bag_errors(
    f: _Vectors, p: _Vectors, dy: Tensor, t: float, dtype: torch.dtype, rounding: float
) -> tuple[Tensor, ...]:
    """Of one bag: errors of G * F, dF without dY1, dP; and dt's, squared.

    ``x_error`` is the error of ``x``, letters as in docs/math.md.
    """
    # Sums, exponents and statistics; cosines; operands of products, and results.
    fine = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    cosine, coarse = max(fine, rounding), max(torch.finfo(dtype).eps, rounding)
    # The smallest numbers of the type, and of exponentials in float32.
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    tiny = max(tiny, torch.finfo(torch.float32).smallest_normal)
    sum_n, sum_d, sum_i = (fine * max(n, 1) ** 0.5 for n in (len(p.x), p.x.shape[1], len(f.x)))

    c = f.unit @ p.unit.T
    # Products of half types are exact in float32, and the means are taken off the sums.
    half = dtype.itemsize == 2
    condition = f.condition * p.condition.T if half else f.condition + p.condition.T
    c_error = cosine * (c.abs() + (f.unit.square() @ p.unit.square().T).sqrt()) + fine * condition
    a = torch.softmax(c / t, dim=-1)
    by_exponent = a * c_error / t
    a_error = by_exponent + a * (by_exponent.sum(-1, keepdim=True) + coarse + sum_n) + tiny
    g = a @ p.x
    # sum_j A_j e_j (P_j - G), where e is the exponent's error, is at most |e| std(P), both under A.
    std = (a @ p.x.square() - g.square()).clamp(min=0).sqrt()
    g_error = (by_exponent * c_error / t).sum(-1, keepdim=True).sqrt() * std
    values = p.x.abs() + p.mean.abs()  # float32's operands may be centred
    g_error += coarse * (a @ (p.x.abs() if half else values)) + sum_n * (a @ values)

    do = dy * f.x
    delta = (do * g).sum(-1, keepdim=True)
    excess = do @ p.x.T - delta  # dA - delta
    size = (do.square() @ p.x.square().T).sqrt() + (do * g).square().sum(-1, keepdim=True).sqrt()
    by_weights = a_error * excess.abs()
    excess_error = (coarse + sum_d) * size + by_weights.sum(-1, keepdim=True)
    ds = a * excess / t
    ds_error = (by_weights + a * excess_error) / t + tiny * (1 / f.rnorm + 1 / p.rnorm.T)
    ds_c, ds_c_error = ds * c, ds_error * c.abs() + ds.abs() * c_error

    df = dy.abs() * g_error + coarse * (dy * g).abs()
    df += f.rnorm * (ds_error @ p.unit.abs() + (cosine + sum_n) * (ds.abs() @ p.size))
    df += f.rnorm * f.unit.abs() * ds_c_error.sum(-1, keepdim=True)
    df += f.rnorm * f.size * cosine * ds_c.sum(-1, keepdim=True).abs()

    through_c = ds_c.sum(0)[:, None]
    dp = a.T @ do + p.rnorm * (ds.T @ f.unit - p.unit * through_c)
    squares = ds_error.square().T @ f.unit.square()
    squares += ((cosine + sum_i) * ds).square().T @ f.size.square()
    squares += p.unit.square() * ds_c_error.square().sum(0)[:, None]
    squares = p.rnorm.square() * squares + (a_error + sum_i * a).square().T @ do.square()
    dp_error = squares.sqrt() + coarse * dp.abs() + cosine * p.rnorm * p.size * through_c.abs()

    dt = ds_c_error.sum(-1) + sum_i * ds_c.abs().sum(-1)
    return f.x.abs() * g_error + tiny, df + tiny, dp_error + tiny, (dt / t).square().sum()


def error_model(
    problem: Problem,
    dtype: torch.dtype,
    *,
    rounding: float | None = None,
    temperature: float = 0.05,
    concat: bool = True,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Result:
    """What the roundings of a run add up to, number by number.

    ``rounding`` is that of cosines and products where it is coarser than theirs: TF32's, or that of
    a half type in which vectors are normalised.
    """
    rounding = rounding or 0.0
    feat, protos, offsets = (x.double() for x in problem.make(dtype, seed, device))
    pixels = feat.flatten(3).transpose(2, 3)  # [E, Q, HW, D]
    grad = _gradient(problem, concat, seed).to(dtype).to(feat).flatten(4).transpose(3, 4)
    out, grad_protos, dt = torch.zeros_like(grad), torch.zeros_like(protos), feat.new_zeros(())
    copied = grad[..., : -problem.dim].abs().sum(2) if concat else torch.zeros_like(pixels)
    grad_feat = max(torch.finfo(dtype).eps, rounding) * copied
    bounds = offsets.long().tolist()
    for bag in range(len(bounds) - 1):
        episode, way = divmod(bag, problem.ways)
        f, dy = pixels[episode], grad[episode, :, way, :, -problem.dim :]
        p = protos[bounds[bag] : bounds[bag + 1]]
        enhanced, df, grad_protos[bounds[bag] : bounds[bag + 1]], squares = _bag_errors(
            _Vectors(f.flatten(0, 1)), _Vectors(p), dy.flatten(0, 1), temperature, dtype, rounding
        )
        out[episode, :, way, :, -problem.dim :] = enhanced.view_as(f)
        grad_feat[episode] += df.view_as(f)
        dt += squares
    out, grad_feat = (x.transpose(-1, -2).unflatten(-1, feat.shape[3:]) for x in (out, grad_feat))
    return Result(out, grad_feat, grad_protos, dt.sqrt())


def worst(value: Tensor, truth: Tensor, model: Tensor) -> float:
    """Largest error in units of its model; what overflows may do so."""
    limit = torch.finfo(value.dtype).max
    error = (value.double().clamp(-limit, limit) - truth.clamp(-limit, limit)).abs()
    return float(torch.where(error == 0, 0.0, error / model).max()) if error.numel() else 0.0


@functools.lru_cache(maxsize=16)
def _truth(
    problem: Problem, dtype: torch.dtype, rounding: float | None, **options: Any
) -> tuple[Result, Result]:
    """Exact results and the model of their errors: of many ops on the same problem."""
    exact = run(reference.proto_attention, problem, dtype, compute=torch.float64, **options)
    return exact, error_model(problem, dtype, rounding=rounding, **options)


def out_within_rounding(out: Tensor, problem: Problem, dtype: torch.dtype, **options: Any) -> bool:
    """Whether a result alone, found without gradients perhaps, is held by that rule."""
    exact, model = _truth(problem, dtype, None, **options)
    return worst(out, exact.out, model.out) <= ROUNDINGS


def assert_within_rounding(
    op: Callable[..., Tensor],
    problem: Problem,
    dtype: torch.dtype,
    *,
    names: Sequence[str] = NAMES,
    rounding: float | None = None,
    **options: Any,
) -> None:
    """Hold ``op`` to the float64 reference by the rule of this module, ``names`` of its results.

    ``rounding`` is as for ``error_model``, ``options`` are as for ``run``.
    """
    exact, model = _truth(problem, dtype, rounding, **options)
    ours = run(op, problem, dtype, **options)
    for name in names:
        truth, value, allowed = (getattr(r, name) for r in (exact, ours, model))
        assert value.shape == truth.shape, name
        assert torch.equal(value.isnan(), truth.isnan()), f"{name}: NaN in other places"
        found = worst(value, truth, allowed)
        if not found <= ROUNDINGS:
            eager = getattr(run(reference.proto_attention, problem, dtype, **options), name)
            theirs = worst(eager, truth, allowed)
            raise AssertionError(
                f"{name}: error {found:.3g} models, allowed {ROUNDINGS}; eager PyTorch {theirs:.3g}"
            )
