# SPDX-License-Identifier: Apache-2.0
"""Host side of the kernels that pack prototypes: like launch.py, nothing here reads a value."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastproto.errors import ArgumentError
from fastproto.layout import pixel_stride
from fastproto.triton import pack
from fastproto.triton.configs import Config
from fastproto.triton.launch import MAX_INT32, Launch, Run, search_block, walkable

_SELECT = Config(1024, 0, 0, 1, False, 4, 1)
_COPY = Config(32, 0, 64, 1, False, 4, 1)
# One program walks over all cells of a bag, so there are many of few channels each.
_AVERAGE = Config(256, 0, 16, 1, False, 4, 1)


def run_pack(
    run: Run, features: Tensor, share: Tensor, threshold: float, append_global: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The packed bags, and what the backward needs.

    Args:
        run: Carries out a launch.
        features: ``[E, S, D, h, w]``, not empty.
        share: ``[E, K, C]`` float32, C = S*h*w: how much of every cell belongs to the class.
        threshold: The share above which a cell is kept.
        append_global: Whether every bag with a share gets its average, or only one without cells.

    Returns:
        protos ``[E*K*(C+1), D]``, offsets ``[E*K+1]``, position ``[E*K, C+1]``, mass ``[E*K]``.

    Raises:
        ArgumentError: More rows than int32 offsets can count.
    """
    features, share = walkable(features), share.contiguous()
    episodes, shots, dim, height, width = features.shape
    _, ways, cells = share.shape
    bags = episodes * ways
    rows = bags * (cells + 1)
    if rows > MAX_INT32:
        raise ArgumentError(
            "masks",
            found=f"{bags} bags of {cells + 1} candidates",
            allowed=f"at most {MAX_INT32} candidates with backend 'triton'",
        )
    protos = features.new_empty([rows, dim])
    offsets = share.new_empty([bags + 1], dtype=torch.int32)
    position = share.new_empty([bags, cells + 1], dtype=torch.int32)
    counts = share.new_empty([bags], dtype=torch.int32)
    mass = share.new_empty([bags])
    run(
        Launch(
            pack.select_kernel,
            bags,
            {
                "share": share,
                "position": position,
                "counts": counts,
                "mass": mass,
                "threshold": threshold,
                "cells": cells,
            },
            {"APPEND_GLOBAL": append_global, "BLOCK": _SELECT.block_m},
            _SELECT,
        )
    )
    copy, average = _COPY.fit(dim), _AVERAGE.fit(dim)
    tiles = episodes * ways * shots * triton.cdiv(height * width, copy.block_m)
    run(
        Launch(
            pack.pack_kernel,
            bags * average.chunks(dim) + tiles * copy.chunks(dim),
            {
                "features": features,
                "share": share,
                "position": position,
                "counts": counts,
                "mass": mass,
                "protos": protos,
                "offsets": offsets,
                "bags": bags,
                "ways": ways,
                "shots": shots,
                "pixels": height * width,
                "feat_e": features.stride(0),
                "feat_s": features.stride(1),
                "feat_d": features.stride(2),
                "feat_hw": pixel_stride(features),
            },
            {
                "D": dim,
                "BLOCK": copy.block_m,
                "CHUNK": copy.chunk,
                "AVERAGE_BLOCK": average.block_m,
                "AVERAGE_CHUNK": average.chunk,
                "BAGS": search_block(bags),
            },
            copy,
        )
    )
    return protos, offsets, position, mass


def run_pack_backward(
    run: Run,
    grad_protos: Tensor,
    share: Tensor,
    position: Tensor,
    mass: Tensor,
    offsets: Tensor,
    height: int,
    width: int,
    channels_last: bool,
) -> Tensor:
    """Gradient of the features ``[E, S, D, h, w]``, in their layout."""
    grad_protos, share = grad_protos.contiguous(), share.contiguous()
    dim = grad_protos.shape[1]
    episodes, ways, cells = share.shape
    pixels = height * width
    shots = cells // pixels
    if channels_last:
        shape = [episodes, shots, height, width, dim]
        grad_features = grad_protos.new_empty(shape).movedim(-1, -3)
    else:
        grad_features = grad_protos.new_empty([episodes, shots, dim, height, width])
    config = _COPY.fit(dim)
    tiles = episodes * shots * triton.cdiv(pixels, config.block_m)
    run(
        Launch(
            pack.pack_backward_kernel,
            tiles * config.chunks(dim),
            {
                "grad_protos": grad_protos,
                "share": share,
                "position": position,
                "mass": mass,
                "offsets": offsets,
                "grad_features": grad_features,
                "ways": ways,
                "shots": shots,
                "pixels": pixels,
                "feat_d": grad_features.stride(2),
                "feat_hw": pixel_stride(grad_features),
            },
            {"D": dim, "BLOCK": config.block_m, "CHUNK": config.chunk},
            config,
        )
    )
    return grad_features
