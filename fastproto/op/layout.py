# SPDX-License-Identifier: Apache-2.0
"""Memory layouts of feature maps [..., C, H, W]: NCHW and channels_last."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(maps: Tensor) -> bool:
    """Whether channels are contiguous, and that says something.

    Must agree with is_channels_last in csrc/api/layout.h.
    """
    return maps.stride(-3) == 1 and maps.shape[-3] > 1 and maps.shape[-2] * maps.shape[-1] > 1


def new_maps(
    like: Tensor, leading: list[int], channels: int, *, dtype: torch.dtype | None = None
) -> Tensor:
    """An empty [*leading, channels, H, W] with height, width and layout of ``like``."""
    height, width = like.shape[-2:]
    if is_channels_last(like):
        return like.new_empty([*leading, height, width, channels], dtype=dtype).movedim(-1, -3)
    return like.new_empty([*leading, channels, height, width], dtype=dtype)


def pixels_are_one_dim(maps: Tensor) -> bool:
    """Whether height and width run as one dimension (sizes of 1 have no say)."""
    height, width = maps.shape[-2:]
    return height == 1 or width == 1 or maps.stride(-2) == width * maps.stride(-1)


def pixel_stride(maps: Tensor) -> int:
    """Distance of neighbouring pixels where height and width run as one dimension."""
    return maps.stride(-1) if maps.shape[-1] > 1 else maps.stride(-2)
