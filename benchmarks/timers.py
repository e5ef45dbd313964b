# SPDX-License-Identifier: Apache-2.0
"""Clocks - the host's, CUDA events around graph replays - and taking turns before them."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from baselines import Call
from torch import Tensor


def seconds_of(call: Callable[[], object]) -> float:
    """Wall time of one call; its result is dropped within it."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def rounds_for(
    calls: Mapping[str, Callable[[], object]], budget: float = 0.5, least: int = 7, most: int = 101
) -> int:
    """Rounds that take about ``budget`` seconds; the calls must be warm."""
    one = sum(seconds_of(call) for call in calls.values())
    return min(max(least, round(budget / max(one, 1e-6))), most)


def turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Who runs when: each name once per round, in an order drawn anew for every round.

    Nobody always follows the same one, in whose caches and on whose heap it would then start. The
    seed is fixed.
    """
    draw = random.Random(0)
    for _ in range(rounds):
        yield from draw.sample(names, len(names))


def in_turns(samples: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each of ``samples`` gives, once per round."""
    seconds: dict[str, list[float]] = {name: [] for name in samples}
    for name in turns(list(samples), rounds):
        seconds[name].append(samples[name]())
    return seconds


def medians(seconds: Mapping[str, Sequence[float]], unit: float, digits: int) -> dict[str, float]:
    """Of each, in ``unit`` per second."""
    return {name: round(statistics.median(v) * unit, digits) for name, v in seconds.items()}


def quartiles(
    seconds: Mapping[str, Sequence[float]], unit: float, digits: int
) -> dict[str, list[float]]:
    """First and third of each."""
    return {
        name: [round(q * unit, digits) for q in statistics.quantiles(v, method="inclusive")[::2]]
        for name, v in seconds.items()
    }


@dataclasses.dataclass
class Replay:
    """Calls made ready to be timed.

    Attributes:
        results: Of the first call; ``sample`` writes them anew.
        sample: Runs all calls once; seconds per call.
    """

    results: list[Tensor]
    sample: Callable[[], float]


class HostTimer:
    """The host's clock around plain calls on CPU tensors.

    Its times say nothing about a GPU: it is there to run the rest of the suite where there is none.
    """

    device = "cpu"
    cache_bytes = 1 << 10
    """Of the last-level cache; what is timed rotates among inputs of several times as much."""

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Where everything that is timed is made and called."""
        return contextlib.nullcontext()

    def replay(self, calls: Sequence[Call]) -> Replay:
        """Make ``calls``, which have run before, ready to be timed: here the calls themselves.

        Their results are copied to where the first ones were.
        """
        results = calls[0]()

        def sample() -> float:
            began = time.perf_counter()
            latest = [call() for call in calls]
            seconds = time.perf_counter() - began
            with torch.no_grad():
                for old, new in zip(results, latest[0], strict=True):
                    old.copy_(new)
            return seconds / len(calls)

        return Replay(results, sample)

    def wall(self, call: Call) -> float:
        """Seconds of one call from the host, until its result is there."""
        return seconds_of(call)

    def alive(self) -> str | None:
        """None, or why nothing can be measured any more."""
        return None

    def describe(self) -> dict[str, Any]:
        """The device, for the record."""
        return {"name": "none: CPU tensors", "driver": "none", "host": platform.machine()}


class CudaTimer(HostTimer):
    """Events around the replay of a CUDA graph of all calls.

    Calls, and the forward passes that backward passes differentiate, run on one stream: autograd
    runs a backward pass on the stream of its forward pass. Before every sample a buffer of four
    times the L2 cache is written, on the same stream and outside the events: the cache then holds
    no inputs, and the replay is enqueued before the device gets to it.
    """

    FLUSHES = 3  # long enough for the host to enqueue a replay meanwhile
    HEAD_START = 4_000_000  # clock cycles, about two milliseconds

    device = "cuda"

    def __init__(self) -> None:
        self._properties: Any = torch.cuda.get_device_properties("cuda")
        self.cache_bytes = int(self._properties.L2_cache_size)
        self._stream = torch.cuda.Stream()
        self._buffer = torch.empty(4 * self.cache_bytes, dtype=torch.uint8, device="cuda")

    @contextlib.contextmanager
    def scope(self) -> Any:
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.synchronize()

    def replay(self, calls: Sequence[Call]) -> Replay:
        """Capture ``calls`` in one graph; each has outputs of its own."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            results = [call() for call in calls]
        first = results[0]
        del results  # their memory stays the graph's

        def sample() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(self.FLUSHES):
                self._buffer.zero_()
            # The GPU waits while the host launches, or a gap before a large graph would count.
            torch.cuda._sleep(self.HEAD_START)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3 / len(calls)

        return Replay(first, sample)

    def wall(self, call: Call) -> float:
        """From an idle device to an idle device."""

        def until_idle() -> object:
            result = call()
            torch.cuda.synchronize()
            return result

        torch.cuda.synchronize()
        return seconds_of(until_idle)

    def alive(self) -> str | None:
        """An error of a kernel ends the process's use of the device."""
        try:
            torch.cuda.synchronize()
            return None if float(torch.ones(1, device="cuda")) == 1 else "the device computes wrong"
        except RuntimeError as error:
            return f"the CUDA context is lost: {error}".splitlines()[0]

    def describe(self) -> dict[str, Any]:
        """Name, driver and sizes. Clocks and power limits are left alone."""
        p = self._properties
        return {
            "name": p.name,
            "driver": driver_version(),
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_gib": round(p.total_memory / 2**30, 1),
            "l2_mib": round(p.L2_cache_size / 2**20, 1),
        }


def driver_version() -> str:
    """NVIDIA's driver, as nvidia-smi names it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
