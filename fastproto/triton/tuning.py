# SPDX-License-Identifier: Apache-2.0
"""The plan of a problem: the table's, or with ``FASTPROTO_TRITON_AUTOTUNE=1`` a measured one.

Measured once per shape, GPU, Triton and fastproto: the choice is kept in
``$FASTPROTO_CACHE/triton-plans.json``. Nothing is measured while a CUDA graph is captured or a
graph is compiled; what the file knows is used there too.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from fastproto import _library
from fastproto._files import cache_folder, write_text
from fastproto._version import __version__
from fastproto.triton import launch
from fastproto.triton.configs import KERNELS, Chip, Config, Plan, Shape, candidates, choose

PROTOTYPES = 256
"""Of every bag while measuring: the real number is not known to the host."""

Measure = Callable[[Shape, str, Plan], float]


def enabled() -> bool:
    """Whether the user asked for measured plans."""
    return os.environ.get("FASTPROTO_TRITON_AUTOTUNE") == "1"


class Tuner:
    """Chooses among the table's candidates by measurement, and remembers.

    Args:
        file: JSON file of past choices; written atomically, made where it is missing.
        measure: Seconds of one kernel under a plan.
        where: What a choice depends on beside the shape: GPU and versions.
    """

    def __init__(self, file: Path, measure: Measure, where: str) -> None:
        self._file, self._measure, self._where = file, measure, where
        self._known = self._read()
        self._plans: dict[Shape, Plan] = {}  # nothing is looked up twice

    def plan(self, shape: Shape, chip: Chip, may_measure: bool) -> Plan:
        """The remembered plan, or a new one if measuring is allowed now, or the table's."""
        if shape in self._plans:
            return self._plans[shape]
        key = f"{self._where}; {shape}"
        if key in self._known:
            self._plans[shape] = self._remembered(key, shape, chip)
            return self._plans[shape]
        plan = choose(shape, chip)
        if not may_measure:
            return plan
        seconds: dict[str, dict[str, float]] = {}
        for kernel in KERNELS:
            seconds[kernel] = {}
            best = float("inf")
            for config in candidates(kernel, shape, chip):
                one = self._measure(shape, kernel, plan.replaced(kernel, config))
                seconds[kernel][_text(config)] = one
                if one < best:
                    best, fastest = one, config
            plan = plan.replaced(kernel, fastest)
        self._known[key] = seconds
        self._write()
        self._plans[shape] = plan
        return plan

    def _remembered(self, key: str, shape: Shape, chip: Chip) -> Plan:
        """The fastest of the remembered configurations that the table still holds."""
        plan = choose(shape, chip)
        for kernel in KERNELS:
            entry = self._known[key]
            known = entry.get(kernel) if isinstance(entry, dict) else None
            if not isinstance(known, dict):
                continue
            measured = [c for c in candidates(kernel, shape, chip) if _text(c) in known]
            if measured:
                seconds = [known[_text(config)] for config in measured]
                plan = plan.replaced(kernel, measured[seconds.index(min(seconds))])
        return plan

    def _read(self) -> dict[str, dict[str, dict[str, float]]]:
        if not self._file.exists():
            return {}
        try:
            known = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            _library.say_once(f"fastproto: {self._file} cannot be read ({error}); measuring anew.")
            return {}
        return known if isinstance(known, dict) else {}

    def _write(self) -> None:
        write_text(self._file, json.dumps(self._known, indent=1))


def _text(config: Config) -> str:
    return json.dumps(dataclasses.astuple(config))


def measure(shape: Shape, kernel: str, plan: Plan) -> float:
    """Seconds on this GPU: of a backward kernel, or of the forward as inference launches it.

    Infinite where a program needs more than the chip has.
    """
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        values = torch.randn(*size, device="cuda", generator=generator)
        return values.relu().to(shape.dtype)

    bags = shape.episodes * shape.ways
    feat = random(shape.episodes, shape.queries, shape.dim, 1, shape.pixels)
    protos = random(bags * PROTOTYPES, shape.dim)
    offsets = torch.arange(bags + 1, dtype=torch.int32, device="cuda") * PROTOTYPES
    settings: Any = (feat, protos, offsets, 0.05, 1e-6, True)
    found: list[launch.Launch] = []

    def note(one: launch.Launch) -> None:
        found.append(one)
        launch.run_now(one)

    try:
        saving = kernel != "forward"
        run = launch.run_now if saving else note
        forward: Any = (run, plan, *settings, saving, "tf32x3")
        out, *saved = launch.run_forward(*forward)
        if saving:
            inputs, options = settings[:4], (*settings[4:], True, False, "tf32x3")
            backward: Any = (note, plan, torch.ones_like(out), *inputs, *saved, *options)
            launch.run_backward(*backward)
            found = [one for one in found if one.kernel.__name__ == f"{kernel}_kernel"]
    except OutOfResources:
        return float("inf")
    return statistics.median(_seconds(found) for _ in range(15))


def _seconds(launches: list[launch.Launch]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    torch.cuda._sleep(1_000_000)  # while the GPU waits the host gets ahead of it
    begin.record()
    for one in launches:
        launch.run_now(one)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


@functools.cache
def _tuner(device: int) -> Tuner:
    import triton

    name = torch.cuda.get_device_name(device)
    where = f"{name}; triton {triton.__version__}; fastproto {__version__}"
    return Tuner(cache_folder() / "triton-plans.json", measure, where)


_table_plan = functools.cache(choose)


def plan_for(shape: Shape, chip: Chip, device: torch.device) -> Plan:
    """The plan to run ``shape`` with on ``device``."""
    if not enabled() or device.type != "cuda" or not torch.cuda.is_available():
        return _table_plan(shape, chip)
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    may_measure = not traced and not torch.cuda.is_current_stream_capturing()
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        return _tuner(index).plan(shape, chip, may_measure)
