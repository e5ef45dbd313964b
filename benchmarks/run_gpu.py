# SPDX-License-Identifier: Apache-2.0
"""Speed of proto_attention on a GPU beside its peers, against what the machine could reach.

Writes FOLDER/<date>-<gpu>.json after every setting, also when time runs out or something fails;
then the exit code is 1. How it is measured: docs/performance.md.

    python benchmarks/run_gpu.py                          # into benchmarks/results
    python benchmarks/run_gpu.py --only "512x256 bfloat16" --out /tmp
    TRITON_INTERPRET=1 python benchmarks/run_gpu.py --quick --device cpu --out /tmp
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "python_tests"))

import problems
import record
import torch
from roofline import Ceilings
from suite import Suite
from timers import CudaTimer, HostTimer

import fastproto

RESULTS = Path(__file__).resolve().parent / "results"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument(
        "--budget", type=float, default=6.0, metavar="MINUTES", help="no setting starts after it"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="settings whose name has it")
    parser.add_argument(
        "--families",
        action="store_true",
        help="measure every family of the native kernels, not only the one that the plan picks",
    )
    parser.add_argument(
        "--checks", type=Path, metavar="FILE", help="JSON rows for the record, of gpu_check.py"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny settings, two rounds: does the suite run?"
    )
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: with --quick alone"
    )
    found = parser.parse_args()
    if found.device == "cpu" and not found.quick:
        parser.error("--device cpu measures nothing; allowed: with --quick, to try the suite")
    return found


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "fastproto": fastproto.__version__,
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
    }


def goal_rows(suite: Suite, ceilings: Ceilings | None) -> list[dict[str, Any]]:
    """The goals of the backend that users get, and those of the native one."""
    found = []
    for backend, goals in ((suite.chosen, record.GOALS), ("native", record.NATIVE_GOALS)):
        if backend in suite.ours:
            completed = [record.complete(case, backend, ceilings) for case in suite.cases]
            rows = record.compare_goals(completed, backend, goals)
            found += [{"backend": backend} | row for row in rows]
    return found


def build_record(
    suite: Suite, timer: HostTimer, seconds: float, checks: Path | None = None
) -> dict[str, Any]:
    """Everything there is so far."""
    gpu = timer.describe()
    ceilings = record.ceilings_of(suite.ceilings)
    completed = [record.complete(case, suite.chosen, ceilings) for case in suite.cases]
    sizes = ""
    if "multiprocessors" in gpu:
        sizes = (
            f", driver {gpu['driver']}, {gpu['multiprocessors']} SMs, {gpu['memory_gib']} GiB, "
            f"L2 {gpu['l2_mib']} MiB, clocks as found"
        )
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/run_gpu.py", *sys.argv[1:]]),
        "machine": gpu["name"] + sizes,
        "versions": versions(),
        "gpu": gpu,
        "ours": suite.chosen,
        "seconds": round(seconds),
        "goals": goal_rows(suite, ceilings),
        "checks": [] if checks is None else json.loads(checks.read_text(encoding="utf-8")),
        "ceilings": record.ceiling_rows(suite.ceilings),
        "failed": suite.failed,
        "left_out": suite.left_out,
        "cases": completed,
    }


def report(found: dict[str, Any]) -> None:
    """What the suite has not printed yet, for a terminal: goals and gaps."""
    for row in found["goals"]:
        reached = "not measured"
        if row["reached"] is not None:
            reached = f"{row['reached']} {row['unit']} ({'met' if row['met'] else 'NOT met'})"
        print(f"goal ({row['backend']}): {row['goal']}: wanted {row['wanted']}, reached {reached}")
    for row in found["left_out"]:
        print(f"left out: {row['setting']}: {row['why']}")


def main() -> int:
    """Measure, write, print."""
    options = arguments()
    began = time.monotonic()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("run_gpu.py: torch finds no CUDA device; nothing was measured.", file=sys.stderr)
        return 2
    timer: HostTimer = CudaTimer() if options.device == "cuda" else HostTimer()
    settings = problems.QUICK_SETTINGS if options.quick else problems.SETTINGS
    settings = [setting for setting in settings if options.only in setting.name]
    if not settings:
        print(f"run_gpu.py: no setting's name has {options.only!r}.", file=sys.stderr)
        return 2
    suite = Suite(timer, options.budget * 60, options.quick, options.families)

    def write_so_far() -> Path:
        found = build_record(suite, timer, time.monotonic() - began, options.checks)
        name = f"{found['date']}-{record.tag(found['gpu']['name'])}.json"
        return record.write(options.out / name, found)

    suite.run(settings, write_so_far)
    path = write_so_far()
    report(json.loads(path.read_text(encoding="utf-8")))
    print(f"Result: {path}")
    return 1 if suite.failed or not suite.cases else 0


if __name__ == "__main__":
    sys.exit(main())
