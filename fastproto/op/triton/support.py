# SPDX-License-Identifier: Apache-2.0
"""Whether the Triton kernels can run here."""

from __future__ import annotations

import functools
import os

import torch

from fastproto.op.chips import chip_of

MINIMUM = (3, 6)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels are interpreted on CPU tensors; Triton decides it when a kernel is defined."""


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run on ``device``, in a sentence; None if they can."""
    try:
        import triton
    except ImportError as error:
        return f"triton is not installed ({error}); pip install triton"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MINIMUM:
        needed = ".".join(map(str, MINIMUM))
        return f"triton {triton.__version__} is too old; {needed} or newer is needed"
    if device.type == "cpu":
        return None if INTERPRETED else "Triton has no CPU target; TRITON_INTERPRET=1 interprets"
    if INTERPRETED:
        return "TRITON_INTERPRET=1 is set, which takes CPU tensors"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        capability = chip_of(device).capability
        if 0 < capability < 80:
            found = f"{capability // 10}.{capability % 10}"
            return f"the GPU has compute capability {found}; 8.0 or newer is needed"
        return None
    if device.type == "xpu":
        return None
    return f"Triton has no kernels for device type {device.type!r}"
