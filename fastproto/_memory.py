# SPDX-License-Identifier: Apache-2.0
"""Keeping the process's resident memory near what its tensors need."""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_THRESHOLD = 4 << 20  # bytes


def return_large_buffers() -> None:
    """Make glibc give buffers of 4 MiB and more back to the system as soon as they are freed.

    By default glibc raises that limit to 32 MiB by itself, and activations of a training step
    leave holes in its heap: 130 MiB at 256 x 256. Elsewhere than on glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
