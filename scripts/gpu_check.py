# SPDX-License-Identifier: Apache-2.0
"""Everything that wants a GPU, in one go: build, tests, kernels' resources, sanitizers, benchmark.

Runs with any Python that has torch with CUDA, triton, pytest and what the build needs (setuptools,
pybind11, cmake, ninja; nvcc for the native kernels); installs nothing else and needs no network.
The package is built into a folder of its own, so that the environment stays as it is. A step that
fails does not stop those after it, nor does one that hangs: all of them share ``--minutes``. The
exit code is 1 if any failed.

    make gpu-check                              # results to benchmarks/results
    python scripts/gpu_check.py --out OUT --minutes 8
    python scripts/gpu_check.py --installed     # what `import fastproto` finds, no fresh build
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Which backends run, or why not; it fails where the native one was wanted and does not.
INSTALLED = """
import os, fastproto
from fastproto.op import backends, library
reasons = {name: backends.why_not(name, "cuda") for name in ("native", "triton")}
print(fastproto.__file__, *(f"{name}: {why or 'runs'}" for name, why in reasons.items()), sep="; ")
wanted = os.environ.get("FASTPROTO_CUDA") != "0" and "CUDACXX" in os.environ
built = library.build_info().get("cuda_compiler")
raise SystemExit(bool(library.cuda_is_broken() or (wanted and not built)))
"""
INSTALL = (
    "{python} -m pip install --no-build-isolation --no-deps --no-index --verbose"
    " --disable-pip-version-check --upgrade --target {package} {root}"
)
PYTEST = "{python} -m pytest -c {root}/pyproject.toml --rootdir {root} -p no:cacheprovider {root}/"
# Which tests run together, as pytest's -k has it.
GROUPS = {
    "triton": "triton",
    "native": "not triton and not sm80 and not sm90",
    **{f"sm{n}-{kind}": f"sm{n}-{kind}" for n in (80, 90) for kind in ("latency", "throughput")},
}
TESTS = {k: f"{PYTEST}python_tests/gpu -m gpu --tb=short -v -k '{v}'" for k, v in GROUPS.items()}
# Every tensor is an allocation of its own, or a block of many would hide what is outside. Our own
# kernels alone are watched but by initcheck: who wrote the inputs must be seen.
SANITIZER = "env PYTORCH_NO_CUDA_MEMORY_CACHING=1 {sanitizer} --error-exitcode 86 --tool "
PROBLEMS = " {python} {root}/scripts/sanitize_gpu.py --for "
OURS = " --kernel-name kns=fastproto"
BENCHMARK = "benchmarks/run_gpu.py --out {out} --checks {checks} --budget {budget}"
NETWORK = PYTEST + "benchmarks/bench_network.py -k cuda --record {out}"
STEPS: dict[str, tuple[float, dict[str, str]]] = {
    "install": (0.14, {"install": INSTALL}),
    "installed": (0.01, {"installed": "{python} -c {program}"}),
    "tests": (0.25, TESTS),
    "cuda_resources": (0.05, {"cuda_resources": "{python} {root}/scripts/cuda_resources.py"}),
    "memcheck": (0.1, {"memcheck": f"{SANITIZER}memcheck{OURS}{PROBLEMS}memcheck"}),
    "racecheck": (
        0.1,
        {"racecheck": f"{SANITIZER}racecheck{OURS} --racecheck-report all{PROBLEMS}racecheck"},
    ),
    "network": (0.15, {"network": NETWORK}),
    "initcheck": (0, {"initcheck": f"{SANITIZER}initcheck{PROBLEMS}initcheck"}),
    "resources": (0, {"resources": "{python} {root}/scripts/triton_resources.py"}),
    "benchmark": (0.2, {"benchmark": f"{{python}} {{root}}/{BENCHMARK}"}),
}
"""Shares of the whole time (what a step leaves, the next has; 0: it runs if asked for), and
commands by the names of their logs, all at once; ``main`` fills the braces."""
DEFAULT = [name for name, (share, _) in STEPS.items() if share]
UNABLE = (
    r".*(?:cannot run: |nothing to run|Device not supported|Unable to find injection library"
    r"|env: .*No such file|fixture 'benchmark' not found).*"
)
"""Lines with which a program says that there was nothing to check: no failure."""
SAID = r"^.*SUMMARY.*|^.* (?:passed|skipped).* in .*|^\d+ problems|.*\S.*\Z"
"""What is told of a step: the summary of a sanitizer or of pytest, and the last line."""


def toolkit(program: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, beside CUDACXX, or where toolkits are installed."""
    folders = [Path(os.environ.get("CUDACXX", "")).parent]
    folders += sorted(Path("/usr/local").glob("cuda*/bin"), reverse=True)
    return shutil.which(program, path=os.pathsep.join([os.environ["PATH"], *map(str, folders)]))


def run(
    commands: dict[str, str], logs: Path, limit: float, values: Any, environment: dict[str, str]
) -> list[dict[str, str]]:
    """Rows of what came of the commands, all started at once, killed after ``limit`` seconds."""
    ends, processes = time.monotonic() + limit, {}
    for name, template in commands.items():
        command = [word.format_map(values) for word in shlex.split(template)]
        print(f"== {name}: {' '.join(command)}", flush=True)
        with (logs / f"{name}.log").open("w", encoding="utf-8") as log:
            # A group of its own, to stop its helpers with it; away from the sources.
            processes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=logs, start_new_session=True
            )
    rows = []
    for name, process in processes.items():
        try:
            ending = f"exit code {process.wait(max(ends - time.monotonic(), 0))}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ending = f"stopped after {limit:.0f} s"
        text = (logs / f"{name}.log").read_text(encoding="utf-8", errors="replace").strip()
        print("\n".join(text.splitlines()[-40:]), flush=True)
        # Tests of which all are skipped have shown nothing.
        good = process.returncode == 0 and (name not in GROUPS or " passed" in text)
        unable = re.findall(UNABLE, text) if process.returncode else []
        result = "passed" if good else "skipped" if unable else "failed"
        said = dict.fromkeys(unable[:1] or re.findall(SAID, text, re.MULTILINE))
        detail = "; ".join([ending] * (result == "failed") + [line.strip("= ") for line in said])
        rows.append({"check": name, "result": result, "detail": detail.replace("|", "/")})
    return rows


def why_not() -> str | None:
    """Why nothing can be checked here, in a sentence; None if it can."""
    for name in ("torch", "triton", "pytest"):
        if importlib.util.find_spec(name) is None:
            return f"{sys.executable} has no {name}"
    import torch

    found = torch.cuda.is_available()
    return None if found else f"torch {torch.__version__} finds no CUDA device"


def main() -> int:
    """Run the steps, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "benchmarks/results", help="for the benchmark's record")
    add("--logs", type=Path, default=ROOT / "build/gpu-check", help="for every step's output")
    add("--minutes", type=float, default=8.0, help="for everything; what is late is cut short")
    add("--installed", action="store_true", help="do not build and install")
    add("--only", nargs="+", choices=STEPS, default=DEFAULT, help="some of the steps")
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(f"gpu-check: cannot run: {reason}.", file=sys.stderr)
        return 2
    logs, out = options.logs.resolve(), options.out.resolve()
    package, checks = logs / "package", logs / "checks.json"
    logs.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONUNBUFFERED"] = "1"
    if nvcc := toolkit("nvcc"):
        environment.setdefault("CUDACXX", nvcc)
    if not options.installed:
        # Before the environment's own packages; the sources last, should the build fail.
        path = [str(package), os.environ.get("PYTHONPATH", ""), str(ROOT)]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    values = {"root": ROOT, "python": sys.executable, "program": INSTALLED, "out": out}
    values |= {"package": package, "checks": checks}
    values |= {"sanitizer": toolkit("compute-sanitizer") or "no-sanitizer"}
    deadline = time.monotonic() + options.minutes * 60
    before = json.loads(checks.read_text(encoding="utf-8")) if checks.is_file() else []
    rows: list[dict[str, str]] = []
    for name in STEPS:
        if name not in options.only or (name == "install" and options.installed):
            continue
        after = DEFAULT[DEFAULT.index(name) + 1 :] if name in DEFAULT else []
        kept = sum(STEPS[step][0] for step in after) * options.minutes * 60
        limit = max(deadline - time.monotonic() - kept, 20)
        # No setting starts after the budget; the last one takes its time, and so do the tables.
        values["budget"] = f"{max(limit - 40, 10) / 60:.2f}"
        rows += run(STEPS[name][1], logs, limit, values, environment)
        done = {row["check"] for row in rows}
        checks.write_text(json.dumps([r for r in before if r["check"] not in done] + rows))
    lines = ["| step | result | |", "|---|---|---|"]
    lines += [f"| {row['check']} | {row['result']} | {row['detail']} |" for row in rows]
    if "benchmark" in options.only:
        sys.path.append(str(ROOT / "scripts"))
        from update_tables import PAGES

        tables = PAGES["docs/performance.md"]
        lines += ["", tables["gpu"](out), "", tables["gpu-goals"](out)]
    (logs / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("", *lines, sep="\n")
    return 1 if any(row["result"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
