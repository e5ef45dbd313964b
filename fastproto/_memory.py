# SPDX-License-Identifier: Apache-2.0
"""The machine's memory, and keeping the process near what its tensors need."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_THRESHOLD = 4 << 20  # bytes
_CGROUP = Path("/sys/fs/cgroup")


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


def machine_memory() -> int:
    """Bytes that this machine, or the container, has; 8 GiB where the system does not say."""
    limits = [2**33]
    if hasattr(os, "sysconf"):
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # control groups, version 2 and 1
        path = _CGROUP / name
        if path.is_file():
            text = path.read_text(encoding="utf-8").strip()
            limits += [int(text)] if text.isdecimal() else []
    return min(limits)
