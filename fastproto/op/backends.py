# SPDX-License-Identifier: Apache-2.0
"""Which code runs the op: one ladder, from the fastest to the one that always exists.

``native`` is the compiled library, ``triton`` the Triton kernels, ``reference`` plain PyTorch. The
first rung that can run the problem is taken, unless the ``backend`` argument or
``FASTPROTO_BACKEND`` (read when fastproto is imported) names one. On a kind of GPU that the native
kernels were never measured on, they run only where they are named.
"""

from __future__ import annotations

import functools
import os

import torch

from fastproto.errors import ArgumentError, require
from fastproto.op import library
from fastproto.op.chips import chip_of
from fastproto.op.explain import explain, plan, why_failed, why_no_plan

__all__ = ["choose", "describe", "explain", "ladder", "padded_dim", "plan", "why_failed", "why_not"]

LADDER = ("native", "triton", "reference")
CUDA_DIMS = (256, 512)
"""Channels that the native CUDA kernels are compiled for (csrc/cuda/plan.h); fewer are padded."""
CUDA_FAMILIES = ("sm80-latency", "sm80-throughput", "sm90-latency", "sm90-throughput")
"""Of the native CUDA kernels: values of FASTPROTO_CUDA_KERNELS, which also takes "sm80", "sm90"."""
RECORDS = {90: "2026-11-27-h200.json"}
"""Compute capability times ten -> the file of benchmarks/results with the native kernels' times."""
_FORCED = os.environ.get("FASTPROTO_BACKEND") or None


def ladder(device: str | torch.device) -> tuple[str, ...]:
    """The rungs that are tried on ``device`` where nobody names one."""
    device = _indexed(device)
    if device.type == "cpu":  # Triton is interpreted there, for tests
        return ("native", "reference")
    if device.type == "cuda" and chip_of(device).capability not in RECORDS:
        return LADDER[1:]
    return LADDER


def padded_dim(dim: int) -> int:
    """The least of CUDA_DIMS that holds ``dim`` channels; where none does, more than all of them.

    The choice of a backend depends on channels no further, which torch.compile can guard on.
    """
    for most in CUDA_DIMS:
        if dim <= most:
            return most
    return CUDA_DIMS[-1] + 1


def why_not(
    name: str, device: str | torch.device, dtype: torch.dtype | None = None, dim: int | None = None
) -> str | None:
    """Why backend ``name`` cannot run on ``device``, in a sentence; None if it can.

    With a ``dtype`` or a :func:`padded_dim` of the features, whether it can run those.
    """
    if name == "reference":
        return None
    device = _indexed(device)
    if name == "triton":
        from fastproto.op.triton import support

        reason = support.why_not(device)
        if reason is None and dtype == torch.float64 and device.type != "cpu":
            return "it computes float64 only interpreted, for tests"
        return reason
    if device.type == "cuda":
        return (
            library.why_not_cuda()
            or _why_no_plan(device, dtype or torch.bfloat16, dim or CUDA_DIMS[0])
            or _why_no_code(device)
        )
    if device.type == "cpu":
        return library.why_not_cpu()
    return f"it has no kernels for device type {device.type!r}"


def _indexed(device: str | torch.device) -> torch.device:
    """With the number of the current GPU where it has none: each is asked by itself."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _why_no_code(device: torch.device) -> str | None:
    """Why the CUDA library has no code that the GPU runs; None where it has."""
    # Its lowest architecture is there as PTX too, for all that are newer.
    lowest = min((int(name.rstrip("af")) for name in library.built_for()), default=0)
    capability = chip_of(device).capability
    if capability >= lowest:
        return None
    built_for = library.built_for()
    wanted = [*built_for, "90a" if capability == 90 else str(capability)]
    return (
        f"it was built for FASTPROTO_CUDA_ARCHS={';'.join(built_for)}, the GPU has capability "
        f"{capability // 10}.{capability % 10}; reinstall with "
        f"FASTPROTO_CUDA_ARCHS='{';'.join(wanted)}'"
    )


def _why_no_plan(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    """Why the CUDA kernels of the library cannot run on a GPU, or such features."""
    if dim > CUDA_DIMS[-1]:
        return f"its CUDA kernels hold {CUDA_DIMS[-1]} channels at most"
    if dtype == torch.float64:
        return "its CUDA kernels take float32, bfloat16 and float16, not float64"
    return why_no_plan(chip_of(device), dim=dim, dtype=dtype, save=True)


@functools.cache
def _choose(
    device: torch.device,
    dtype: torch.dtype | None,
    dim: int | None,
    forced: str | None,
    source: str,
) -> str:
    if forced is not None:
        require(forced in LADDER, source, found=repr(forced), allowed=", ".join(LADDER))
        reason = why_not(forced, device, dtype, dim)
        if reason is None:
            return forced
        able = (name for name in LADDER if why_not(name, device, dtype, dim) is None)
        found = f"{forced!r}, which cannot run on '{device}': {reason}"
        raise ArgumentError(source, found=found, allowed=", ".join(able))
    reasons: list[str] = []
    for name in ladder(device):  # ends with the reference, which runs everywhere
        reason = why_not(name, device, dtype, dim)
        if reason is None:
            break
        reasons.append(f"backend {name} does not: {reason}")
    if name == "reference" and reasons:
        library.say_once(f"fastproto: on {device} plain PyTorch runs; {'; '.join(reasons)}.")
    library.logger.debug("proto_attention on %s: backend %s", device, name)
    return name


def choose(
    device: str | torch.device,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    dim: int | None = None,
) -> str:
    """Name of the backend to use on ``device`` for features of a ``dtype`` and :func:`padded_dim`.

    Raises:
        ArgumentError: ``backend`` (or FASTPROTO_BACKEND) is unknown or cannot run there; says why.
    """
    forced, source = (_FORCED, "FASTPROTO_BACKEND") if backend is None else (backend, "backend")
    return _choose(_indexed(device), dtype, dim, forced, source)


# Both depend on the installation and on what torch.compile guards anyway (device, dtype, a range of
# channels), so it may take them as constants and need not look at files. This is what
# @torch.compiler.assume_constant_result does, without importing torch._dynamo (70 MB).
choose._dynamo_marked_constant = why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def describe() -> list[tuple[str, bool, str]]:
    """(name and device, available, why not or remark) of every backend, for ``fastproto info``."""
    rows = []
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = ["cpu", *(f"cuda:{i}" for i in range(gpus))] if gpus > 1 else ["cpu", "cuda"]
    for name in LADDER:
        for device in devices:
            reason = why_not(name, device)
            if name == "reference" and device != "cpu" and not torch.cuda.is_available():
                reason = "torch finds no CUDA device"
            remark = "" if name in ladder(device) else "not measured on such a GPU: only by name"
            rows.append((f"{name} ({device})", reason is None, reason or remark))
    return rows
