# SPDX-License-Identifier: Apache-2.0
"""How the benchmarks measure: taking turns, the machine's ceilings, and the record of a run."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import record
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from timers import medians, quartiles, seconds_of, turns

import fastproto
import fastproto.op.native  # loads the native library
from fastproto import _C

Call = Callable[[], object]
OURS = "native"


def available_threads() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


THREADS = [threads for threads in (1, 2) if threads <= available_threads()]


def take_turns(
    benchmark: BenchmarkFixture, calls: Mapping[str, Call], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each call in ``rounds`` rounds of all of them, ours timed by pytest-benchmark.

    pytest-benchmark calls ours and, before that and outside its clock, ``setup``, where the peers
    whose turn comes earlier run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = turns(list(calls), rounds)

    def until_ours() -> None:
        for name in order:
            if name == OURS:
                return
            seconds[name].append(seconds_of(calls[name]))

    def ours() -> None:
        calls[OURS]()  # the result is dropped here: everyone's clock includes freeing it

    benchmark.pedantic(ours, setup=until_ours, rounds=rounds)
    until_ours()  # the peers after our last turn
    if benchmark.stats is not None:  # None with --benchmark-disable
        seconds[OURS] = list(benchmark.stats.stats.data)
    return seconds


def milliseconds(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, quartiles and the comparison with the fastest peer."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    fastest = min((name for name in median if name != OURS), key=lambda name: median[name])
    return {
        "rounds": len(seconds[OURS]),
        "ms": medians(seconds, 1e3, 4),
        "quartiles_ms": quartiles(seconds, 1e3, 4),
        "fastest_peer": fastest,
        "peer_over_native": round(median[fastest] / median[OURS], 3),
    }


class Ceilings:
    """The machine's arithmetic rates in GFLOP/s, measured again and again during a run.

    One measurement is the best of several tries; the machine's rate is the median of these bests,
    so that neither a lucky nor a disturbed moment decides what the percentages are percentages of.
    """

    PAUSE = 20.0  # seconds before the same rates are measured again

    def __init__(self, sizes: Sequence[int] = (1024, 1536, 2048), tries: int = 3) -> None:
        self._sizes, self._tries = sizes, tries
        self._samples: dict[tuple[str, int], list[float]] = {}
        self._latest: dict[tuple[torch.dtype, int], float] = {}

    def sample(self, dtype: torch.dtype) -> None:
        """Measure FMA loop and matrix product of ``dtype`` on the current number of threads."""
        threads = torch.get_num_threads()
        if time.monotonic() - self._latest.get((dtype, threads), -self.PAUSE) < self.PAUSE:
            return
        self._add("fma_loop", threads, max(self._fma_loop() for _ in range(self._tries)))
        self._add(f"matmul_{str(dtype)[6:]}", threads, self._matmul(dtype))
        self._latest[dtype, threads] = time.monotonic()

    def rate(self, name: str, threads: int) -> float:
        """The median of the measurements so far."""
        return statistics.median(self._samples[name, threads])

    def doubt(self) -> str | None:
        """Why the times on several threads deserve none of your trust; None if they may."""
        counts = sorted(threads for name, threads in self._samples if name == "fma_loop")
        for threads in counts[1:] if counts[:1] == [1] else []:
            scaling = self.rate("fma_loop", threads) / self.rate("fma_loop", 1)
            if scaling < 0.75 * threads:
                return (
                    f"{threads} threads do {scaling:.1f} times the multiply-adds of one: the "
                    "machine is busy, or its threads share cores. On a busy machine every "
                    "barrier waits, which flatters whoever has the fewest: ours."
                )
        return None

    def rows(self) -> list[dict[str, Any]]:
        """For the record."""
        return [
            {
                "rate": name,
                "threads": threads,
                "gflops": round(self.rate(name, threads), 1),
                "measurements": [round(value, 1) for value in values],
            }
            for (name, threads), values in sorted(self._samples.items())
        ]

    def _add(self, name: str, threads: int, gflops: float) -> None:
        self._samples.setdefault((name, threads), []).append(gflops)

    def _fma_loop(self) -> float:
        operations = torch.zeros(1, dtype=torch.float64)
        seconds = seconds_of(lambda: torch.ops.fastproto.fma_loop(operations, 3_000_000))
        return operations.item() / seconds / 1e9

    def _matmul(self, dtype: torch.dtype) -> float:
        best = 0.0
        for size in self._sizes:
            a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
            out = torch.empty_like(a)

            def call(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
                torch.mm(a, b, out=out)

            call()
            best = max(best, *(2e-9 * size**3 / seconds_of(call) for _ in range(self._tries)))
        return best


class Record:
    """What one run of the benchmarks measured, and where."""

    def __init__(self, ceilings: Ceilings) -> None:
        self.ceilings = ceilings
        self.cases: list[dict[str, Any]] = []
        self.overhead: list[dict[str, Any]] = []
        self.memory: list[dict[str, Any]] = []
        self.network: list[dict[str, Any]] = []

    def write(self, folder: Path, arguments: Sequence[str]) -> Path:
        """Write ``folder/<date>-cpu-<machine>.json``; with the network's rows alone "network"."""
        date = datetime.date.today().isoformat()
        model, cores = cpu_model(), available_threads()
        found = {
            "date": date,
            "command": shlex.join(["pytest", *arguments]),
            "machine": f"{platform.machine()}, {model}, {cores} cores",
            "versions": {
                "fastproto": fastproto.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "cpu_level": _C.cpu_level(),
            },
            "ceilings": self.ceilings.rows(),
            "cases": [case | self._of_ceilings(case) for case in self.cases],
            "overhead": self.overhead,
            "memory": self.memory,
            "network": self.network,
        }
        alone = bool(self.network) and not (self.cases or self.overhead or self.memory)
        if alone and self.network[-1]["device"] != "cpu":
            model = self.network[-1]["device"]
        kind = "network" if alone else "cpu"
        return record.write(
            folder / f"{date}-{kind}-{record.slug(f'{model} {cores}c')}.json", found
        )

    def _of_ceilings(self, case: dict[str, Any]) -> dict[str, float]:
        """Fractions of the machine's rates, which are known once the run is over."""
        rates = {"of_matmul": f"matmul_{case['dtype']}", "of_fma_loop": "fma_loop"}
        return {
            key: round(case["native_gflops"] / self.ceilings.rate(name, case["threads"]), 4)
            for key, name in rates.items()
        }


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"
