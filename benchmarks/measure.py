# SPDX-License-Identifier: Apache-2.0
"""How the benchmarks measure: taking turns, the machine's ceilings, and the record of a run."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import platform
import random
import re
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

import fastproto
import fastproto.op.native  # loads the native library
from fastproto import _C

Call = Callable[[], None]
OURS = "native"


def available_threads() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


THREADS = [threads for threads in (1, 2) if threads <= available_threads()]


def seconds_of(call: Call) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def turns(names: Sequence[str], rounds: int) -> list[str]:
    """Who runs when: each name once per round, in an order drawn anew for every round.

    Nobody always follows the same one, in whose caches and on whose heap it would then start. The
    seed is fixed.
    """
    draw = random.Random(0)
    return [name for _ in range(rounds) for name in draw.sample(names, len(names))]


def rounds_for(calls: dict[str, Call], budget: float = 0.5, least: int = 7) -> int:
    """Rounds that take about ``budget`` seconds; the calls must be warm."""
    one = sum(seconds_of(call) for call in calls.values())
    return min(max(least, round(budget / one)), 101)


def take_turns(
    benchmark: BenchmarkFixture, calls: dict[str, Call], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each call in ``rounds`` rounds of all of them, ours timed by pytest-benchmark.

    pytest-benchmark calls ours and, before that and outside its clock, ``setup``, where the peers
    whose turn comes earlier run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = iter(turns(list(calls), rounds))

    def until_ours() -> None:
        for name in order:
            if name == OURS:
                return
            seconds[name].append(seconds_of(calls[name]))

    benchmark.pedantic(calls[OURS], setup=until_ours, rounds=rounds)
    until_ours()  # the peers after our last turn
    if benchmark.stats is not None:  # None with --benchmark-disable
        seconds[OURS] = list(benchmark.stats.stats.data)
    return seconds


def milliseconds(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, quartiles and the comparison with the fastest peer."""
    median = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
    fastest = min((name for name in median if name != OURS), key=lambda name: median[name])
    return {
        "rounds": len(seconds[OURS]),
        "ms": {name: round(value, 4) for name, value in median.items()},
        "quartiles_ms": {
            name: [round(q * 1e3, 4) for q in statistics.quantiles(values, method="inclusive")[::2]]
            for name, values in seconds.items()
        },
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
        record = {
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
        tag = re.sub(r"\((?:r|tm)\)|[^a-z0-9]+", "-", f"{model} {cores}c".lower())
        folder.mkdir(parents=True, exist_ok=True)
        kind = "network" if alone else "cpu"
        path = folder / f"{date}-{kind}-{re.sub('-+', '-', tag).strip('-')}.json"
        path.write_text(_one_line_per_row(record), encoding="utf-8")
        return path

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


def flops(bounds: Sequence[int], queries: int, pixels: int, dim: int, what: str) -> int:
    """Floating-point operations that are counted, whatever an implementation really does.

    Forward: two matrix products. Backward: five, as in attention (the scores again, and one for
    each gradient and intermediate); our kernel does seven.
    """
    products = {"forward": 2, "backward": 5, "both": 7}[what]
    prototypes = sum(b - a for a, b in itertools.pairwise(bounds))
    return 2 * products * queries * pixels * prototypes * dim


def _one_line_per_row(record: dict[str, Any]) -> str:
    """JSON in which every row of a list has a line: thousands of lines otherwise."""
    entries = []
    for key, value in record.items():
        text = json.dumps(value, indent=1).replace("\n", "\n ")
        if isinstance(value, list):
            text = "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
        entries.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"
