# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation whose batch is spread over several processes.

``nn.SyncBatchNorm`` wants a GPU and cannot know of the map that the decoder normalises without
making it (:mod:`fastproto.nn.decoder`); this one is plain PyTorch and runs wherever ranks do.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` over the batches of all ranks together, which are of one shape."""

    def forward(self, input: Tensor) -> Tensor:
        """``[N, C, H, W]`` of each rank -> the same; in training every rank must call it."""
        if not self.training:
            return super().forward(input)
        assert self.weight is not None
        with torch.autocast(input.device.type, enabled=False):
            x = input.to(torch.promote_types(input.dtype, torch.float32))
            var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            mean, var = over_ranks(mean, var)
            update_running(self, mean, var, input.numel() // len(mean))
            scale = self.weight * (var + self.eps).rsqrt()
            shift = self.bias - mean * scale
            out = torch.addcmul(shift[:, None, None], x, scale[:, None, None])
        return out.to(input.dtype)


def synchronise_norms(module: nn.Module) -> None:
    """Make every ``nn.BatchNorm2d`` inside ``module`` a :class:`SyncBatchNorm2d`, weights kept."""
    for name, child in [*module.named_children()]:
        synchronise_norms(child)
        if isinstance(child, nn.BatchNorm2d):
            norm = SyncBatchNorm2d(child.num_features, child.eps, child.momentum)
            for key, parameter in child.named_parameters(recurse=False):
                norm.register_parameter(key, parameter)
            for key, buffer in child.named_buffers(recurse=False):
                norm.register_buffer(key, buffer)
            setattr(module, name, norm.train(child.training))


def over_ranks(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all ranks from those of each, with gradients."""
    whole = _average(mean)
    return whole, _average(var + (mean - whole).square())


@torch.no_grad()
def update_running(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Move the running statistics of ``norm`` towards a batch's.

    Args:
        norm: Whose buffers change.
        mean: [C], or with more axes of size 1.
        var: Of the same shape; biased.
        count: Values of a channel that they are of, on this rank.
    """
    assert norm.momentum is not None
    if isinstance(norm, SyncBatchNorm2d):
        count *= dist.get_world_size()
    unbiased = var.flatten() * count / max(1, count - 1)
    norm.get_buffer("running_mean").lerp_(mean.flatten(), norm.momentum)
    norm.get_buffer("running_var").lerp_(unbiased, norm.momentum)
    norm.get_buffer("num_batches_tracked").add_(1)


class _Average(torch.autograd.Function):
    """The mean over ranks; its gradient is the mean of theirs, of the sum of the ranks' losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Average.forward(ctx, gradient.contiguous())


def _average(x: Tensor) -> Tensor:
    averaged: Tensor = _Average.apply(x)
    return averaged
