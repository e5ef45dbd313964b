# SPDX-License-Identifier: Apache-2.0
"""Which code runs the op: one ladder, from the fastest to the one that always exists.

``native`` is the compiled library, ``triton`` the Triton kernels, ``reference`` plain PyTorch. The
first rung that can run the problem is taken, unless the ``backend`` argument or
``FASTPROTO_BACKEND`` (read when fastproto is imported) names one. On a GPU, rungs that have been
measured on one come before those that have not.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from fastproto import _library
from fastproto.errors import ArgumentError

LADDER = ("native", "triton", "reference")
MAX_CUDA_DIM = 512
"""Channels that the native CUDA kernels can hold on a multiprocessor (csrc/cuda/plan.h)."""
MEASURED_ON_GPU: dict[str, str] = {}
"""Backend -> the file of benchmarks/results with its measurements on a GPU; python_tests/backends
holds the two together. A kernel that has never run on a GPU is no default."""
_FORCED = os.environ.get("FASTPROTO_BACKEND") or None


def ladder(device: str) -> tuple[str, ...]:
    """The rungs that are tried on device type ``device`` where nobody names one."""
    if device == "cpu":  # Triton is interpreted there, for tests
        return ("native", "reference")
    if device != "cuda":
        return LADDER
    measured = tuple(name for name in LADDER if name in MEASURED_ON_GPU)
    # Of the unmeasured, Triton's compiler has run on GPUs, if not its kernels here.
    return (*measured, *(n for n in ("triton", "native", "reference") if n not in measured))


def why_not(
    name: str, device: str, dtype: torch.dtype | None = None, wide: bool = False
) -> str | None:
    """Why backend ``name`` cannot run on device type ``device``, in a sentence; None if it can.

    With a ``dtype`` of the features, whether it can run that; ``wide``: more than MAX_CUDA_DIM
    channels.
    """
    if name == "reference":
        return None
    if name == "triton":
        from fastproto.triton import support

        reason = support.why_not(device)
        if reason is None and dtype == torch.float64 and device != "cpu":
            return "it computes float64 only interpreted, for tests"
        return reason
    if device == "cuda":
        return _library.why_not_cuda() or _why_no_plan(dtype, wide)
    if device == "cpu":
        return _library.why_not_cpu()
    return f"it has no kernels for device type {device!r}"


def _why_no_plan(dtype: torch.dtype | None, wide: bool) -> str | None:
    """Why the CUDA kernels of the library cannot run on this GPU, or such features."""
    try:
        _plan(1, 1, 1, MAX_CUDA_DIM + wide, 1, 1, dtype or torch.bfloat16, True)
    except ValueError as error:
        return str(error)
    return None


def _plan(
    episodes: int,
    queries: int,
    ways: int,
    dim: int,
    pixels: int,
    total: int,
    dtype: torch.dtype,
    save: bool,
    kernels: str = "",
) -> dict[str, Any]:
    """The CUDA library's plan on the current GPU; on an H200 where there is none."""
    from fastproto import _C

    chip = (90, 132, 227 * 1024)
    if torch.cuda.is_available():
        gpu: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        chip = (
            10 * gpu.major + gpu.minor,
            gpu.multi_processor_count,
            gpu.shared_memory_per_block_optin,
        )
    built_for = _library.build_info().get("cuda_architectures", "")
    return _C.cuda_plan(
        capability=chip[0],
        multiprocessors=chip[1],
        shared_memory=chip[2],
        dtype=str(dtype).removeprefix("torch."),
        episodes=episodes,
        queries=queries,
        ways=ways,
        dim=dim,
        pixels=pixels,
        total=total,
        save=save,
        has_sm90="90a" in built_for.split() or not built_for,
        kernels=kernels,
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
    save: bool = False,
) -> str:
    """Which CUDA kernels the native backend runs a problem with, and why; for people.

    Args:
        episodes: E.
        queries: Q, query images per episode.
        ways: K, classes.
        dim: D.
        pixels: H * W.
        total: Rows of ``protos``.
        dtype: That of the features.
        save: Whether a backward follows.

    Returns:
        Sentences and one line for every launch; for an H200 where no GPU is there. Tensors that TMA
        cannot read are not considered.

    Raises:
        ArgumentError: There is no plan; says why.
    """
    kernels = os.environ.get("FASTPROTO_CUDA_KERNELS", "")
    try:
        plan = _plan(episodes, queries, ways, dim, pixels, total, dtype, save, kernels)
    except ValueError as error:
        raise ArgumentError("explain", found=str(error), allowed="a problem with a plan") from error
    lines = plan.pop("reasons")
    for name in plan if save else ("stats", "forward"):
        one = plan[name]
        if one["kernel"] != "none":
            lines.append(
                f"{name}: {one['kernel']}, {one['tile_m']} pixels x {one['tile_n']} prototypes, "
                f"{one['slices']} slices, {one['blocks']} blocks of {one['threads']} threads in "
                f"clusters of {one['cluster']}, {one['shared_bytes']} bytes of shared memory"
            )
    return "\n".join(lines)


@functools.cache
def _choose(
    device: str, dtype: torch.dtype | None, wide: bool, forced: str | None, source: str
) -> str:
    if forced is not None:
        if forced not in LADDER:
            raise ArgumentError(source, found=repr(forced), allowed=", ".join(LADDER))
        reason = why_not(forced, device, dtype, wide)
        if reason is not None:
            able = (name for name in LADDER if why_not(name, device, dtype, wide) is None)
            raise ArgumentError(
                source,
                found=f"{forced!r}, which cannot run on {device!r}: {reason}",
                allowed=", ".join(able),
            )
        return forced
    reasons: list[str] = []
    for name in ladder(device):
        reason = why_not(name, device, dtype, wide)
        if reason is None:
            if name == "reference" and reasons:
                _library.say_once(
                    f"fastproto: on {device} plain PyTorch runs; {'; '.join(reasons)}."
                )
            remark = _remark(name, device)
            _library.logger.debug(
                "proto_attention on %s: backend %s%s", device, name, remark and f" ({remark})"
            )
            return name
        reasons.append(f"backend {name} does not: {reason}")
    raise AssertionError("the reference runs everywhere")


def _remark(name: str, device: str) -> str:
    """What there is to say of a backend that can run."""
    if device != "cuda" or name == "reference" or name in MEASURED_ON_GPU:
        return ""
    before = ladder(device)[: ladder(device).index(name)]
    place = f"comes after {' and '.join(before)}" if before else "is tried first"
    return f"not measured on a GPU yet; {place} unless it is named"


def choose(
    device: str,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    wide: bool = False,
) -> str:
    """Name of the backend to use on device type ``device``, for features of type ``dtype``.

    ``wide``: of more than MAX_CUDA_DIM channels.

    Raises:
        ArgumentError: ``backend`` (or FASTPROTO_BACKEND) is unknown or cannot run there; says why.
    """
    if backend is not None:
        return _choose(device, dtype, wide, backend, "backend")
    return _choose(device, dtype, wide, _FORCED, "FASTPROTO_BACKEND")


# The choice depends on the installation alone, so torch.compile may take it as a constant. This is
# what @torch.compiler.assume_constant_result does, without importing torch._dynamo (70 MB).
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def describe() -> list[tuple[str, bool, str]]:
    """(name and device, available, why not or remark) of every backend, for ``fastproto info``."""
    rows = []
    for name in LADDER:
        for device in ("cpu", "cuda"):
            reason = why_not(name, device)
            if name == "reference" and device == "cuda" and not torch.cuda.is_available():
                reason = "torch finds no CUDA device"
            remark = _remark(name, device) if reason is None else reason
            rows.append((f"{name} ({device})", reason is None, remark))
    return rows
