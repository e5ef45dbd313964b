# SPDX-License-Identifier: Apache-2.0
"""The whole network beside the ResNet-101 baseline: time and peak memory of what users do with it.

pytest benchmarks/bench_network.py --record benchmarks/results
"""

from __future__ import annotations

import statistics
from pathlib import Path

import networks
import pytest
import torch
from measure import OURS, THREADS, Record, take_turns
from pytest_benchmark.fixture import BenchmarkFixture
from timers import rounds_for

from fastproto.nn.inference import computes_bfloat16

# Our form of the U-Net is called as the peers' benchmarks call ours.
PEERS = {
    "inference": ["unet eager", "unet direct", "baseline", "baseline eager"],
    "training": ["unet recomputing", "unet direct", "baseline"],
}
BATCHES = {
    "cpu": {"inference": [1, 8], "training": [1], "inference, small": [8], "training, small": [8]},
    "cuda": {"inference": [1, 16, 64], "training": [1, 8]},
}

# What comes with the package, and what a CPU trains: without a baseline of its size.
SMALL = {"size": 128, "encoder": "resnet18", "output_stride": 8}


def dtypes(device: str) -> list[torch.dtype]:
    """Float32, and bfloat16 where the machine computes in it."""
    half = computes_bfloat16(torch.device(device))
    return [torch.float32, *([torch.bfloat16] if half else [])]


def has_peak(device: str, what: str, batch: int, dtype: torch.dtype) -> bool:
    """Whether memory is measured: a process for each takes long, so on a GPU of the largest."""
    if device == "cpu":
        return Path("/proc/self/status").exists()
    return batch == BATCHES[device][what][-1] and dtype == torch.bfloat16


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every device, pass and batch; the quick run is one tiny case."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if metafunc.config.getoption("quick"):
        cases = [("cpu", "inference", 1, torch.float32), ("cpu", "training", 1, torch.float32)]
    else:
        cases = [
            (device, what, batch, dtype)
            for device in devices
            for what, batches in BATCHES[device].items()
            for batch in batches
            for dtype in dtypes(device)
        ]
    names = ["-".join([d, w, str(b), str(t)[6:]]) for d, w, b, t in cases]
    metafunc.parametrize(("device", "what", "batch", "dtype"), cases, ids=names)


def test_network(
    benchmark: BenchmarkFixture,
    device: str,
    what: str,
    batch: int,
    dtype: torch.dtype,
    quick: bool,
    record: Record,
) -> None:
    threads = THREADS[-1]
    torch.set_num_threads(threads)
    what, _, small = what.partition(", ")
    options = SMALL if small else {}
    if quick:
        options = {"size": 32, "encoder": "resnet18"}
    titles = {OURS: "unet", **{name: name for name in PEERS[what]}}
    if small:
        titles = {key: name for key, name in titles.items() if name.startswith("unet")}
    if device == "cuda":
        titles.pop("unet direct")
    calls = {
        key: networks.make(name, what, batch, device, dtype, **options)
        for key, name in titles.items()
    }
    for call in calls.values():
        for _ in range(2 if device == "cpu" else 3):  # the second call captures a graph
            call()
    benchmark.group = f"{what}, {batch} at once, {dtype}, {device}"
    rounds = 2 if quick else rounds_for(calls, budget=5.0 if device == "cpu" else 1.0, least=3)
    seconds = take_turns(benchmark, calls, rounds)
    if not seconds[OURS]:  # --benchmark-disable
        return
    del calls
    row = {
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "what": what,
        "network": "ResNet-18, 128 x 128" if small else "ResNet-34, 256 x 256",
        "batch": batch,
        "dtype": str(dtype)[6:],
        "threads": threads,
        "rounds": rounds,
        "ms": {
            titles[key]: round(statistics.median(values) * 1e3, 3)
            for key, values in seconds.items()
        },
    }
    if not quick and not small and has_peak(device, what, batch, dtype):
        row["peak_mib"] = {
            name: networks.peak_mib(name, what, batch, device, dtype)
            for name in ("unet", "baseline", *(["unet recomputing"] * (what == "training")))
        }
    record.network.append(row)
