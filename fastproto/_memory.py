# SPDX-License-Identifier: Apache-2.0
"""The machine's memory, and keeping the process near what its tensors need."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from fastproto.errors import ResourceError

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


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy, PyTorch (on whichever device) or SimpleITK ran out of memory."""
    # oneDNN, which convolves on the CPU, names no reason for the last two.
    words = r"allocate memory|out of memory|bad.alloc|could not (create|execute) a primitive$"
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(words, str(error).lower()) is not None
    )


@contextlib.contextmanager
def enough_memory(
    subject: object,
    fix: str = "Close other programs, take a machine with more memory, or cut the scan to what "
    "matters.",
) -> Iterator[None]:
    """Turn a lack of memory into one message that says how much was wanted.

    Raises:
        ResourceError: There is too little memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        text = str(error)
        match = re.search(r"(?:tried|unable) to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
        wanted = f"{match[1]} were wanted" if match else "more was wanted"
        found = f"too little memory on the GPU: {wanted}"
        # Names, as torch may not be imported; errors of the CUDA runtime have other classes.
        if type(error).__name__ != "OutOfMemoryError" and "CUDA" not in text:
            found = f"too little memory: {wanted} beyond the {used_memory() / 1e9:.1f} GB in use"
            found += f", of {machine_memory() / 1e9:.1f} GB"
        raise ResourceError(
            subject,
            found=found,
            allowed="what fits into memory",
            fix=fix,
        ) from error


def used_memory() -> int:
    """Bytes of memory that this process has at the moment; 0 where the system does not say."""
    path = Path("/proc/self/statm")
    if not path.is_file():
        return 0
    return int(path.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
