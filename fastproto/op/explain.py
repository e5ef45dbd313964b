# SPDX-License-Identifier: Apache-2.0
"""Which CUDA kernels the native backend runs a problem with, and why: asked of csrc/cuda/plan.h."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from fastproto.errors import ArgumentError
from fastproto.op import library
from fastproto.op.chips import Chip, chip_of
from fastproto.op.layout import is_channels_last


def plan(
    chip: Chip,
    *,
    dtype: torch.dtype,
    channels_last: bool = False,
    save: bool = False,
    kernels: str = "",
    **sizes: int,
) -> dict[str, Any]:
    """The CUDA library's plan on a chip, for tensors that begin at multiples of 16 bytes.

    ``sizes`` and the rest are those of :func:`explain`, 1 unless given; ``kernels`` is
    FASTPROTO_CUDA_KERNELS.

    Raises:
        ValueError: There is none; says why.
    """
    from fastproto import _C

    of = dict.fromkeys(("episodes", "queries", "ways", "dim", "pixels", "total"), 1) | sizes
    row = of["dim" if channels_last or of["pixels"] == 1 else "pixels"]
    return _C.cuda_plan(
        capability=chip.capability,
        multiprocessors=chip.multiprocessors,
        shared_memory=chip.shared_memory,
        dtype=str(dtype).removeprefix("torch."),
        save=save,
        tma_ok=of["dim"] % 8 == 0 and row % 8 == 0,  # 16 bytes of a half type
        has_sm90="90a" in library.built_for() or not library.built_for(),
        kernels=kernels,
        **of,
    )


def why_no_plan(chip: Chip, **problem: Any) -> str | None:
    """What :func:`plan` says where there is none; None where there is one."""
    try:
        plan(chip, **problem)
    except ValueError as error:
        return str(error)
    return None


def why_failed(feat: Tensor, protos: Tensor, offsets: Tensor) -> str | None:
    """Why the CUDA library has no plan for a call that failed; None where it has one.

    Asked afterwards, since the library's own words are lost on the way in torch < 2.13.
    """
    episodes, queries, dim, height, width = feat.shape
    return why_no_plan(
        chip_of(feat.device),
        dtype=feat.dtype,
        channels_last=is_channels_last(feat),
        kernels=os.environ.get("FASTPROTO_CUDA_KERNELS", ""),
        episodes=episodes,
        queries=queries,
        ways=(offsets.shape[0] - 1) // episodes,
        dim=dim,
        pixels=height * width,
        total=protos.shape[0],
    )


def explain(
    *,
    episodes: int = 1,
    queries: int = 1,
    ways: int = 1,
    dim: int = 512,
    pixels: int = 256,
    total: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    channels_last: bool = False,
    save: bool = False,
) -> str:
    """Which CUDA kernels the native backend runs a problem with, and why; for people.

    Sizes are those of docs/math.md: E episodes of Q queries and K ways, D channels (``dim``), H * W
    ``pixels``, and the rows of ``protos`` (``total``). Features are of ``dtype`` and NCHW unless
    ``channels_last``; tensors are taken to begin at multiples of 16 bytes, as new ones do. ``save``
    is set where a backward follows.

    Returns:
        Sentences and one line for every launch, on the current GPU; on an H200 where there is none.

    Raises:
        ArgumentError: There is no plan; says why.
    """
    try:
        found = plan(
            chip_of(torch.device("cuda")),
            dtype=dtype,
            channels_last=channels_last,
            save=save,
            kernels=os.environ.get("FASTPROTO_CUDA_KERNELS", ""),
            episodes=episodes,
            queries=queries,
            ways=ways,
            dim=dim,
            pixels=pixels,
            total=total,
        )
    except ValueError as error:
        raise ArgumentError("explain", found=str(error), allowed="a problem with a plan") from error
    lines: list[str] = found.pop("reasons")
    for name in found if save else ("stats", "forward"):
        one = found[name]
        if one["kernel"] != "none":
            lines.append(
                f"{name}: {one['kernel']}, {one['tile_m']} pixels x {one['tile_n']} prototypes, "
                f"{one['slices']} slices, {one['blocks']} blocks of {one['threads']} threads in "
                f"clusters of {one['cluster']}, {one['shared_bytes']} bytes of shared memory"
            )
    return "\n".join(lines)
