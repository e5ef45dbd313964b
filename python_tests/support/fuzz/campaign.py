# SPDX-License-Identifier: Apache-2.0
"""Many cases of a format, in a process that may crash or hang without ending the campaign."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from support.fuzz import FORMATS
from support.fuzz.judge import RIGHT, Verdict, judge
from support.fuzz.mutate import Case

HANG_SECONDS = 10.0
_IMPORT_SECONDS = 120.0
_MEMORY_BYTES = 12 << 30  # of addresses; torch alone maps some
_SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Result:
    """What became of a format's cases: how many of each kind, and every failure."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    slowest_s: float = 0.0


def make(name: str, seed: int, index: int) -> Case:
    """The case of this number; always the same one."""
    return FORMATS[name].make(np.random.default_rng([seed, zlib.crc32(name.encode()), index]))


def write(case: Case, folder: Path) -> None:
    """Put the files of a case into a folder, in place of what lies there."""
    for old in folder.iterdir():
        old.unlink()
    for name, content in case.files.items():
        (folder / name).write_bytes(content)


def run(cases: Iterable[tuple[str, int]], seed: int) -> dict[str, Result]:
    """Judge cases, given as format and index, in a process begun anew after a crash or a hang."""
    todo = list(cases)
    results = {name: Result() for name, _ in todo}
    parent = str(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="fastproto-fuzz-", dir=parent))
    try:
        while todo:
            for verdict, seconds in _until_death(todo, seed, folder):
                name, index = todo.pop(0)
                result = results[name]
                result.counts[verdict.kind] += 1
                result.slowest_s = max(result.slowest_s, round(seconds, 2))
                if verdict.kind not in RIGHT:
                    failure = {"index": index, "kind": verdict.kind, "why": verdict.why}
                    result.failures.append({**failure, "done": make(name, seed, index).done})
    finally:
        shutil.rmtree(folder)
    return results


def _until_death(
    todo: list[tuple[str, int]], seed: int, folder: Path
) -> Iterator[tuple[Verdict, float]]:
    """Verdicts and their seconds, one after the other, up to that which ends the process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, todo[:], seed, folder), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(_IMPORT_SECONDS):
            raise TimeoutError("the process of the fuzz campaign does not start")
        ours.recv()
        for _ in range(len(todo)):
            began = time.perf_counter()
            try:
                if ours.poll(HANG_SECONDS):
                    verdict = Verdict(*ours.recv())
                else:
                    verdict = Verdict("hang", f"no end after {HANG_SECONDS:g} s")
            except EOFError:
                process.join()
                code = process.exitcode or 0
                death = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                verdict = Verdict("crash", death)
            yield verdict, time.perf_counter() - began
            if verdict.kind in ("hang", "crash"):
                return
    finally:
        process.kill()
        process.join()
        ours.close()


def _work(channel: Connection, todo: list[tuple[str, int]], seed: int, folder: Path) -> None:
    """The process: judge one case after the other. What native code prints is nobody's to read."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(os.devnull, "wb") as sink:
        os.dup2(sink.fileno(), 2)
    channel.send("ready")
    for name, index in todo:
        case = make(name, seed, index)
        write(case, folder)
        channel.send(tuple(judge(case, FORMATS[name], folder)))
