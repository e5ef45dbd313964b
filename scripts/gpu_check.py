# SPDX-License-Identifier: Apache-2.0
"""Everything that wants a GPU, in one go: build, tests, kernels' resources, sanitizers, benchmark.

Runs with any Python that has torch with CUDA, triton, pytest and what the build needs (setuptools,
pybind11, cmake, ninja; nvcc for the native kernels); installs nothing else and needs no network.
The package is built and installed into a folder of its own, so that the environment stays as it
is. A step that fails does not stop those after it, nor does one that hangs: all of them share
``--minutes``. The exit code is 1 if any failed.

    make gpu-check                              # results to benchmarks/results
    python scripts/gpu_check.py --out OUT --minutes 8
    python scripts/gpu_check.py --installed     # what `import fastproto` finds, no fresh build
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RESOURCES = ROOT / "scripts" / "triton_resources.py"
CUDA_RESOURCES = ROOT / "scripts" / "cuda_resources.py"
SANITIZED = ROOT / "scripts" / "sanitize_gpu.py"
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck")
# What can run, and whether something is wrong with the native backend; the last line is for us.
INSTALLED = """
import json
import fastproto
from fastproto.op import library, backends

reasons = {name: backends.why_not(name, "cuda") for name in ("native", "triton")}
text = "; ".join([fastproto.__file__, *(f"{n}: {why or 'runs'}" for n, why in reasons.items())])
compiler = library.build_info().get("cuda_compiler")
print(json.dumps({"text": text, "compiler": compiler, "broken": library.cuda_is_broken()}))
"""
BUILD_TOOLS = ("setuptools", "pybind11", "cmake", "ninja")


@dataclasses.dataclass(frozen=True)
class Step:
    """What came of a step.

    Attributes:
        name: For the table.
        result: "passed", "failed" or "skipped".
        seconds: Wall time.
        detail: Counts, or why.
        log: Its output, if it had any.
    """

    name: str
    result: str
    seconds: float
    detail: str
    log: Path | None = None


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="FOLDER", help="for the benchmark's record"
    )
    parser.add_argument(
        "--logs",
        type=Path,
        default=ROOT / "build" / "gpu-check",
        metavar="FOLDER",
        help="for every step's output and the summary",
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="for everything; what is late is cut short"
    )
    parser.add_argument("--installed", action="store_true", help="do not build and install")
    parser.add_argument(
        "--only", nargs="+", choices=STEPS, default=list(DEFAULT), help="some of the steps"
    )
    return parser.parse_args()


def why_not() -> str | None:
    """Why nothing can be checked here, in a sentence; None if it can."""
    for name in ("torch", "triton", "pytest"):
        if importlib.util.find_spec(name) is None:
            return f"{sys.executable} has no {name}"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return None


class Check:
    """The steps; all run in processes of their own, away from the sources."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.deadline = time.monotonic() + options.minutes * 60
        self.logs: Path = options.logs.resolve()
        self.checks = self.logs / "checks.json"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.environment = {
            key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"
        }
        nvcc = find_nvcc()
        if nvcc is not None:
            self.environment.setdefault("CUDACXX", str(nvcc))
        if not options.installed:
            self._look_first_in(self.logs / "package")

    def _look_first_in(self, folder: Path) -> None:
        """Before the environment's own packages; the sources last, should the build fail."""
        path = [str(folder), os.environ.get("PYTHONPATH", ""), str(ROOT)]
        self.environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)

    def remember(self, step: Step) -> None:
        """For the benchmark's record; also across calls, until something else is installed."""
        rows: list[dict[str, str]] = []
        if step.name != "install" and self.checks.is_file():
            rows = json.loads(self.checks.read_text(encoding="utf-8"))
        rows = [row for row in rows if row["check"] != step.name]
        rows.append({"check": step.name, "result": step.result, "detail": step.detail})
        self.checks.write_text(json.dumps(rows), encoding="utf-8")

    def install(self) -> Step:
        """Build and install into a folder."""
        if self.options.installed:
            return Step("install", "skipped", 0.0, "--installed")
        folder = self.logs / "package"
        shutil.rmtree(folder, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
        pip += ["--disable-pip-version-check", "--no-index", "--verbose", "--target", str(folder)]
        step = self._step("install", [*pip, str(ROOT)])
        if step.result == "failed":
            missing = [name for name in BUILD_TOOLS if not has_tool(name)]
            tools = f"the build needs {', '.join(missing)}" if missing else ""
            detail = "; ".join(filter(None, [step.detail, tools]))
            return dataclasses.replace(step, detail=detail)
        problem, found = self._what_is_installed()
        return dataclasses.replace(step, result="failed" if problem else "passed", detail=found)

    def _what_is_installed(self) -> tuple[bool, str]:
        """Whether something is wrong with it, and which backends it has or why not."""
        found = subprocess.run(
            [sys.executable, "-c", INSTALLED],
            cwd=self.logs,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if found.returncode != 0:
            said = found.stderr.strip().splitlines() or [f"exit code {found.returncode}"]
            return True, f"does not import: {said[-1]}"
        facts = json.loads(found.stdout.splitlines()[-1])
        wants_native = self.environment.get("FASTPROTO_CUDA") != "0" and find_nvcc() is not None
        return bool(facts["broken"]) or (wants_native and not facts["compiler"]), facts["text"]

    def left(self, name: str) -> float:
        """Seconds that a step may take, so that those after it get their share; some, at least."""
        after = (
            [SHARE[step] for step in DEFAULT[DEFAULT.index(name) + 1 :]] if name in SHARE else []
        )
        return max(self.deadline - time.monotonic() - sum(after) * self.options.minutes * 60, 20)

    def tests(self) -> Step:
        """The tests marked gpu: each group in a process of its own, all at once.

        A kernel that hangs or spoils its process takes no other group's tests with it.
        """
        with concurrent.futures.ThreadPoolExecutor(len(GROUPS)) as pool:
            parts = list(pool.map(self._group, GROUPS))
        bad = [part for part in parts if part.result == "failed"]
        detail = "; ".join(f"{part.name}: {part.detail}" for part in parts)
        seconds = max(part.seconds for part in parts)
        return Step("tests", "failed" if bad else "passed", seconds, detail, (bad or parts)[0].log)

    def _group(self, name: str) -> Step:
        junit = self.logs / f"{name}.xml"
        junit.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml")]
        command += ["--rootdir", str(ROOT), "-p", "no:cacheprovider", "-m", "gpu", "--tb=short"]
        command += ["--verbose", f"--junitxml={junit}", "-k", GROUPS[name]]
        command += [str(ROOT / "python_tests" / "gpu")]
        limit = self.left("tests")
        return self._step(name, command, lambda: count(junit), lambda: passed(junit), limit=limit)

    def resources(self) -> Step:
        """Compile every configuration of the table for this device."""
        if not RESOURCES.is_file():
            return Step("resources", "skipped", 0.0, f"there is no scripts/{RESOURCES.name}")
        return self._step("resources", [sys.executable, str(RESOURCES)])

    def cuda_resources(self) -> Step:
        """Read the machine code of the CUDA library."""
        step = self._step("cuda_resources", [sys.executable, str(CUDA_RESOURCES)])
        if "exit code 2" in step.detail:  # there is no library, or nothing to read it with
            return dataclasses.replace(step, result="skipped", detail=self._last_line(step))
        return step

    def memcheck(self) -> Step:
        """Accesses out of bounds or misaligned, in the CUDA library's kernels."""
        return self._sanitizer("memcheck", ["--kernel-name", "kns=fastproto"])

    def racecheck(self) -> Step:
        """Races in shared memory."""
        options = ["--kernel-name", "kns=fastproto", "--racecheck-report", "all"]
        return self._sanitizer("racecheck", options)

    def initcheck(self) -> Step:
        """Global memory that is read before it was written."""
        # All kernels are watched: who wrote the inputs must have been seen.
        return self._sanitizer("initcheck", [])

    def _sanitizer(self, tool: str, options: Sequence[str]) -> Step:
        program = find_sanitizer()
        if program is None:
            return Step(tool, "skipped", 0.0, "there is no compute-sanitizer")
        command = [str(program), "--tool", tool, "--error-exitcode", "86", *options]
        command += [sys.executable, str(SANITIZED), "--for", tool]
        # Every tensor is an allocation of its own, or a block of many would hide what is outside.
        step = self._step(
            tool,
            command,
            extra={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        log = step.log.read_text(encoding="utf-8") if step.log is not None else ""
        reason = why_not_sanitized(log)
        if step.result == "failed" and reason is not None:
            return dataclasses.replace(step, result="skipped", detail=reason)
        found = [line.strip("= ") for line in log.splitlines() if "SUMMARY" in line]
        details = [step.detail, *found, self._last_line(step)]
        return dataclasses.replace(step, detail="; ".join(dict.fromkeys(filter(None, details))))

    def _last_line(self, step: Step) -> str:
        """What a program said last, its sanitizer aside."""
        text = step.log.read_text(encoding="utf-8") if step.log is not None else ""
        lines = [line for line in text.splitlines() if line and not line.startswith("=====")]
        return lines[-1] if lines else ""

    def network(self) -> Step:
        """The whole network beside the baseline; the record goes beside the other one."""
        if not has_tool("pytest_benchmark"):
            return Step("network", "skipped", 0.0, "there is no pytest-benchmark")
        folder = self.options.out.resolve()
        command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml")]
        command += ["--rootdir", str(ROOT), "-p", "no:cacheprovider", "-k", "cuda"]
        command += [str(ROOT / "benchmarks" / "bench_network.py"), "--record", str(folder)]
        return self._step("network", command)

    def benchmark(self) -> Step:
        """The GPU suite; what the steps before found goes into its record."""
        program = ROOT / "benchmarks" / "run_gpu.py"
        out = self.options.out.resolve()
        command = [sys.executable, str(program), "--out", str(out)]
        if self.checks.is_file():
            command += ["--checks", str(self.checks)]
        # No setting starts after the budget; the last one takes its time, and so do the tables.
        command += ["--budget", f"{max(self.left('benchmark') - 40, 10) / 60:.2f}"]
        return self._step("benchmark", command, describe=lambda: str(out))

    def _step(
        self,
        name: str,
        command: Sequence[str],
        describe: Callable[[], str] = lambda: "",
        accept: Callable[[], bool] = lambda: True,
        limit: float | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> Step:
        log = self.logs / f"{name}.log"
        print(f"\n== {name}: {' '.join(command)}", flush=True)
        began = time.monotonic()
        limit = self.left(name) if limit is None else limit
        environment = self.environment | dict(extra or {})
        code, timed_out = run(command, log, environment, self.logs, limit)
        seconds = time.monotonic() - began
        details = [f"stopped after {limit:.0f} s" if timed_out else "", describe()]
        if code != 0 and not timed_out:
            details.insert(0, f"exit code {code}")
        result = "passed" if code == 0 and accept() else "failed"
        return Step(name, result, seconds, "; ".join(filter(None, details)), log)


# What the steps that run by default need, about, of the whole time; what one leaves the next has.
SHARE = {
    "install": 0.15,
    "tests": 0.25,
    "cuda_resources": 0.05,
    "memcheck": 0.1,
    "racecheck": 0.1,
    "network": 0.15,
    "benchmark": 0.2,
}
DEFAULT = tuple(SHARE)
STEPS = (*DEFAULT[:-1], "initcheck", "resources", "benchmark")
FAMILIES = ("sm80-latency", "sm80-throughput", "sm90-latency", "sm90-throughput")
# Which tests run together, as pytest's -k has it.
GROUPS = {
    "triton": "triton",
    "native": "not triton and not sm80 and not sm90",
    **{family: family for family in FAMILIES},
}


def has_tool(name: str) -> bool:
    """Whether the build finds a package of this Python, or a program."""
    return importlib.util.find_spec(name) is not None or shutil.which(name) is not None


def find_nvcc() -> Path | None:
    """nvcc: what CUDACXX names, or on PATH, or where toolkits are installed."""
    return _find(os.environ.get("CUDACXX") or "nvcc", [])


def find_sanitizer() -> Path | None:
    """compute-sanitizer: on PATH, or beside nvcc, or where toolkits are installed."""
    nvcc = find_nvcc()
    return _find("compute-sanitizer", [] if nvcc is None else [nvcc.resolve().parent])


def _find(program: str, folders: Sequence[Path]) -> Path | None:
    found = shutil.which(program)
    if found is not None:
        return Path(found)
    toolkits = sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    candidates = [folder / program for folder in (*folders, *(path / "bin" for path in toolkits))]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def why_not_sanitized(log: str) -> str | None:
    """Why a sanitizer could not watch this GPU, or this program; None if it could."""
    for words in ("Device not supported", "Unable to find injection library", "nothing to run"):
        if words in log:
            line = next(line for line in log.splitlines() if words in line)
            return line.strip("= ")
    return None


def run(
    command: Sequence[str], log: Path, environment: dict[str, str], cwd: Path, limit: float
) -> tuple[int, bool]:
    """Exit code, and whether time ran out; the output goes to the terminal and to ``log``."""
    expired = threading.Event()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a group of its own, to stop its helpers with it
        )

        def stop() -> None:
            expired.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                print(line, end="", flush=True)
            code = process.wait()
        finally:
            timer.cancel()
    return code, expired.is_set()


def _suite(junit: Path) -> dict[str, int]:
    """Counts of a junit file; empty where there is none."""
    if not junit.is_file():
        return {}
    keys = ("tests", "failures", "errors", "skipped")
    totals = dict.fromkeys(keys, 0)
    for suite in xml.etree.ElementTree.parse(junit).getroot().iter("testsuite"):
        for key in keys:
            totals[key] += int(suite.get(key, 0))
    return totals


def count(junit: Path) -> str:
    """Passed, failed and skipped, in words."""
    totals = _suite(junit)
    if not totals:
        return "no junit file was written"
    bad = totals["failures"] + totals["errors"]
    good = totals["tests"] - bad - totals["skipped"]
    return f"{good} passed, {bad} failed, {totals['skipped']} skipped"


def passed(junit: Path) -> bool:
    """Whether something ran and nothing failed: all skipped is no success."""
    totals = _suite(junit)
    bad = totals.get("failures", 0) + totals.get("errors", 0)
    return bool(totals) and bad == 0 and totals["tests"] > totals["skipped"]


def summary(steps: Sequence[Step]) -> str:
    """The table of the steps, in markdown."""
    lines = ["| step | result | seconds | | output |", "|---|---|---:|---|---|"]
    lines += [
        f"| {s.name} | {s.result} | {s.seconds:.0f} | {s.detail.replace('|', '/')} | "
        f"{'' if s.log is None else s.log} |"
        for s in steps
    ]
    return "\n".join(lines)


def tables(results: Path) -> str:
    """The tables of the newest record in ``results``, as docs/performance.md has them."""
    spec = importlib.util.spec_from_file_location(
        "update_tables", ROOT / "scripts" / "update_tables.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return "\n\n".join((module.gpu(results), module.gpu_goals(results)))


def main() -> int:
    """Run the steps, print the tables."""
    options = arguments()
    reason = why_not()
    if reason is not None:
        print(f"gpu-check: cannot run: {reason}.", file=sys.stderr)
        return 2
    check = Check(options)
    methods: dict[str, Callable[[], Step]] = {name: getattr(check, name) for name in STEPS}
    steps = []
    for name in STEPS:
        if name in options.only:
            try:
                steps.append(methods[name]())
            except Exception as error:  # the next step may still tell something
                steps.append(Step(name, "failed", 0.0, f"{type(error).__name__}: {error}"))
            check.remember(steps[-1])
    text = summary(steps)
    if "benchmark" in options.only:
        text += "\n\n" + tables(options.out)
    (check.logs / "summary.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    return 1 if any(step.result == "failed" for step in steps) else 0


if __name__ == "__main__":
    sys.exit(main())
