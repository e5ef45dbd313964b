# SPDX-License-Identifier: Apache-2.0
"""Memory one call needs beyond its inputs and results, in a process of its own (Linux).

    python benchmarks/peak_memory.py native 8x256 forward 2

prints two numbers of bytes: what the call needs at its peak, and what the implementation keeps for
the next call (our kernel its scratch memory, the peers the buffers of the matrix library).

The kernel's own count is read: VmHWM, the peak of the resident memory, set back before the call.
Everything is called before at the same size, so that pages of code do not count, and the heap is
made to return what is freed, so that a buffer which is used again counts again.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "python_tests"))

import baselines
import torch
from problems import find
from support.problems import Problem
from torch import Tensor

_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # man 5 proc_pid_clear_refs
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_PR_SET_THP_DISABLE = 41  # linux/prctl.h


def why_not() -> str | None:
    """Why the peak cannot be measured here; None if it can."""
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        return "the C library has no mallopt"
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError as error:
        return f"the peak of resident memory cannot be set back: {error}"
    return None


def peak_memory(name: str, problem: Problem, what: str, threads: int) -> tuple[int, int]:
    """(bytes needed during the call, bytes kept after it), measured in a fresh process."""
    command = [sys.executable, __file__, name, problem.name, what, str(threads)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    needed, kept = result.stdout.split()
    return int(needed), int(kept)


def resident(key: str) -> int:
    """Bytes of a line of /proc/self/status, e.g. "VmRSS"."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status: found no {key}")


class _Work:
    """One implementation on one problem."""

    def __init__(self, name: str, problem: Problem, what: str) -> None:
        self._op: baselines.Op = getattr(baselines, name)
        feat, protos, offsets = problem.make(torch.float32)
        self._gradient = what == "both"
        self._inputs = [x.requires_grad_(self._gradient) for x in (feat, protos)]
        self._bounds = tuple(offsets.tolist())
        self._grad = torch.ones(problem.out_shape) if self._gradient else None

    def run(self) -> list[Tensor]:
        """The results; with gradients the output is among them."""
        with torch.set_grad_enabled(self._gradient):
            out = self._op(*self._inputs, self._bounds)
        if not self._gradient:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, self._inputs, self._grad)]


def main() -> None:
    """Measure what the command line says."""
    name, size, what, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 64 << 10)
    libc.mallopt(_M_TRIM_THRESHOLD, 64 << 10)
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    tiny = _Work(name, Problem("tiny", ((4,),), dim=8, height=1, width=1), what)
    work = _Work(name, find(size), what)
    for _ in range(2):
        tiny.run()
    before = resident("RssAnon")
    for _ in range(2):
        work.run()
    kept = resident("RssAnon") - before
    _CLEAR_REFS.write_text(_RESET_PEAK)
    before = resident("VmRSS")
    results = work.run()
    needed = resident("VmHWM") - before - sum(x.nbytes for x in results)
    # Counters of the kernel lag by a few pages.
    print(max(needed, 0), max(kept, 0))


if __name__ == "__main__":
    main()
