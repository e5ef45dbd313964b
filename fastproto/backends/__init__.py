# SPDX-License-Identifier: Apache-2.0
"""Which code runs the op: one ladder, from the fastest to the one that always exists.

``native`` is the compiled library, ``triton`` the Triton kernels, ``reference`` plain PyTorch. The
first rung that can run the problem is taken, unless the ``backend`` argument or
``FASTPROTO_BACKEND`` (read when fastproto is imported) names one.
"""

from __future__ import annotations

import functools
import os

import torch

from fastproto import _library
from fastproto.errors import ArgumentError

LADDER = ("native", "triton", "reference")
# On the CPU Triton is interpreted, for tests: only who asks for it gets it.
_AUTOMATIC = {"cpu": ("native", "reference")}
_FORCED = os.environ.get("FASTPROTO_BACKEND") or None


def why_not(name: str, device: str, dtype: torch.dtype | None = None) -> str | None:
    """Why backend ``name`` cannot run on device type ``device``, in a sentence; None if it can.

    With a ``dtype`` of the features, whether it can run that.
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
        return _library.why_not_cuda() or "its CUDA kernels are not written yet"
    if device == "cpu":
        return _library.why_not_cpu()
    return f"it has no kernels for device type {device!r}"


@functools.cache
def _choose(device: str, dtype: torch.dtype | None, forced: str | None, source: str) -> str:
    if forced is not None:
        if forced not in LADDER:
            raise ArgumentError(source, found=repr(forced), allowed=", ".join(LADDER))
        reason = why_not(forced, device, dtype)
        if reason is not None:
            raise ArgumentError(
                source,
                found=f"{forced!r}, which cannot run on {device!r}: {reason}",
                allowed=", ".join(name for name in LADDER if why_not(name, device, dtype) is None),
            )
        return forced
    reasons: list[str] = []
    for name in _AUTOMATIC.get(device, LADDER):
        reason = why_not(name, device, dtype)
        if reason is None:
            if name == "reference" and reasons:
                _library.say_once(
                    f"fastproto: on {device} plain PyTorch runs; {'; '.join(reasons)}."
                )
            _library.logger.debug("proto_attention on %s: backend %s", device, name)
            return name
        reasons.append(f"backend {name} does not: {reason}")
    raise AssertionError("the reference runs everywhere")


def choose(device: str, backend: str | None = None, dtype: torch.dtype | None = None) -> str:
    """Name of the backend to use on device type ``device``, for features of type ``dtype``.

    Raises:
        ArgumentError: ``backend`` (or FASTPROTO_BACKEND) is unknown or cannot run there; says why.
    """
    if backend is not None:
        return _choose(device, dtype, backend, "backend")
    return _choose(device, dtype, _FORCED, "FASTPROTO_BACKEND")


# The choice depends on the installation alone, so torch.compile may take it as a constant. This is
# what @torch.compiler.assume_constant_result does, without importing torch._dynamo (70 MB).
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def describe() -> list[tuple[str, bool, str]]:
    """(name and device, available, why not or "") of every backend, for ``fastproto info``."""
    rows = []
    for name in LADDER:
        for device in ("cpu", "cuda"):
            reason = why_not(name, device)
            if name == "reference" and device == "cuda" and not torch.cuda.is_available():
                reason = "torch finds no CUDA device"
            rows.append((f"{name} ({device})", reason is None, reason or ""))
    return rows
