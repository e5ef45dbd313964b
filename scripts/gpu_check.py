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
import functools
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
RESOURCES = ROOT / "scripts" / "triton_resources.py"
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
PIP = [PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
PIP += ["--disable-pip-version-check", "--verbose", str(ROOT), "--target", "{package}"]
PYTEST = [PYTHON, "-m", "pytest", "-c", f"{ROOT}/pyproject.toml", "--rootdir", str(ROOT)]
PYTEST += ["-p", "no:cacheprovider"]
TESTS = [*PYTEST, f"{ROOT}/python_tests/gpu", "-m", "gpu", "--tb=short", "--verbose"]
NETWORK = [*PYTEST, f"{ROOT}/benchmarks/bench_network.py", "-k", "cuda", "--record", "{out}"]
SUITE = [PYTHON, f"{ROOT}/benchmarks/run_gpu.py", "--out", "{out}"]
SUITE += ["--checks", "{checks}", "--budget", "{budget}"]
# Every tensor is an allocation of its own, or a block of many would hide what is outside.
SANITIZER = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "{sanitizer}", "--error-exitcode", "86"]
# The kernels of ours alone are watched; for initcheck all: who wrote the inputs must be seen.
SANITIZERS = {
    "memcheck": ["--kernel-name", "kns=fastproto"],
    "racecheck": ["--kernel-name", "kns=fastproto", "--racecheck-report", "all"],
    "initcheck": [],
}
UNABLE = ("Device not supported", "Unable to find injection library", "nothing to run")
# Which tests run together, as pytest's -k has it.
GROUPS = {
    "triton": "triton",
    "native": "not triton and not sm80 and not sm90",
    "sm80-latency": "sm80-latency",
    "sm80-throughput": "sm80-throughput",
    "sm90-latency": "sm90-latency",
    "sm90-throughput": "sm90-throughput",
}


class Result(NamedTuple):
    """What came of a step: "passed", "failed" or "skipped"; counts, or why."""

    name: str
    result: str
    seconds: float
    detail: str
    log: Path | None = None


class Step(NamedTuple):
    """A step.

    Attributes:
        share: Of the whole time; what it leaves, the next has. 0: it runs only if asked for.
        commands: By the names of their logs, all at once; ``Check._call`` fills the braces.
        why_not: Why it is skipped, if it is.
        unable: Words with which a program says that there was nothing to check: no failure.
    """

    share: float
    commands: dict[str, list[str]]
    why_not: Callable[[Check], str | None] = lambda check: None
    unable: tuple[str, ...] = ()


def sanitizer(share: float, tool: str) -> Step:
    """The small problems of sanitize_gpu.py under a tool of compute-sanitizer."""
    command = [*SANITIZER, "--tool", tool, *SANITIZERS[tool], PYTHON]
    command += [f"{ROOT}/scripts/sanitize_gpu.py", "--for", tool]
    missing = "there is no compute-sanitizer"
    return Step(share, {tool: command}, lambda _: None if find_sanitizer() else missing, UNABLE)


STEPS = {
    "install": Step(
        0.15, {"install": PIP}, lambda c: "--installed" if c.options.installed else None
    ),
    "tests": Step(
        0.25, {k: [*TESTS, "-k", v, f"--junitxml={{logs}}/{k}.xml"] for k, v in GROUPS.items()}
    ),
    "cuda_resources": Step(
        0.05,
        {"cuda_resources": [PYTHON, f"{ROOT}/scripts/cuda_resources.py"]},
        unable=("cuda_resources.py: cannot run: ",),
    ),
    "memcheck": sanitizer(0.1, "memcheck"),
    "racecheck": sanitizer(0.1, "racecheck"),
    "network": Step(
        0.15,
        {"network": NETWORK},
        lambda _: None if has_tool("pytest_benchmark") else "there is no pytest-benchmark",
    ),
    "initcheck": sanitizer(0, "initcheck"),
    "resources": Step(
        0,
        {"resources": [PYTHON, str(RESOURCES)]},
        lambda _: None if RESOURCES.is_file() else f"there is no scripts/{RESOURCES.name}",
    ),
    "benchmark": Step(0.2, {"benchmark": SUITE}),
}
DEFAULT = [name for name, step in STEPS.items() if step.share]


class Check:
    """Runs steps in processes of their own, away from the sources."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options: argparse.Namespace = options
        self.deadline = time.monotonic() + options.minutes * 60
        self.logs: Path = options.logs.resolve()
        self.package, self.checks = self.logs / "package", self.logs / "checks.json"
        self.logs.mkdir(parents=True, exist_ok=True)
        if not self.checks.is_file():
            self.checks.write_text("[]", encoding="utf-8")
        self.environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        nvcc = find_nvcc()
        if nvcc is not None:
            self.environment.setdefault("CUDACXX", str(nvcc))
        if not options.installed:
            # Before the environment's own packages; the sources last, should the build fail.
            path = [str(self.package), os.environ.get("PYTHONPATH", ""), str(ROOT)]
            self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))

    def left(self, name: str) -> float:
        """Seconds that a step may take, so that those after it get their share; some, at least."""
        after = DEFAULT[DEFAULT.index(name) + 1 :] if name in DEFAULT else []
        kept = sum(STEPS[step].share for step in after) * self.options.minutes * 60
        return max(self.deadline - time.monotonic() - kept, 20)

    def step(self, name: str) -> Result:
        """What comes of a step, whatever happens; also kept for the benchmark's record."""
        try:
            result = self._step(name, STEPS[name])
        except Exception as error:  # the next step may still tell something
            result = Result(name, "failed", 0.0, f"{type(error).__name__}: {error}")
        rows = json.loads(self.checks.read_text(encoding="utf-8"))  # of calls before, too
        rows = [row for row in rows if "install" != name != row["check"]]
        rows.append({"check": name, "result": result.result, "detail": result.detail})
        self.checks.write_text(json.dumps(rows), encoding="utf-8")
        return result

    def _step(self, name: str, step: Step) -> Result:
        reason = step.why_not(self)
        if reason is not None:
            return Result(name, "skipped", 0.0, reason)
        if name == "install":
            shutil.rmtree(self.package, ignore_errors=True)
        limit = self.left(name)
        with concurrent.futures.ThreadPoolExecutor(len(step.commands)) as pool:
            parts = list(pool.map(lambda log: self._call(log, step, limit), step.commands))
        if len(parts) == 1:
            return parts[0]
        worst = min(parts, key=lambda part: part.result)  # "failed" < "passed"
        detail = "; ".join(f"{part.name}: {part.detail}" for part in parts)
        return Result(name, worst.result, max(p.seconds for p in parts), detail, worst.log)

    def _call(self, name: str, step: Step, limit: float) -> Result:
        log, junit, out = self.logs / f"{name}.log", self.logs / f"{name}.xml", self.options.out
        junit.unlink(missing_ok=True)
        values = {"logs": self.logs, "package": self.package, "checks": self.checks}
        # No setting starts after the budget; the last one takes its time, and so do the tables.
        values |= {"out": out.resolve(), "budget": f"{max(limit - 40, 10) / 60:.2f}"}
        values |= {"sanitizer": find_sanitizer()}
        command = [word.format_map(values) for word in step.commands[name]]
        print(f"\n== {name}: {' '.join(command)}", flush=True)
        began = time.monotonic()
        code, timed_out = run(command, log, self.environment, self.logs, limit)
        seconds = time.monotonic() - began
        lines = log.read_text(encoding="utf-8").splitlines()
        unable = [line for words in step.unable for line in lines if words in line]
        if code and unable:
            return Result(name, "skipped", seconds, unable[0].strip("= "), log)
        good, details = code == 0, []
        if timed_out or code:
            details = [f"stopped after {limit:.0f} s" if timed_out else f"exit code {code}"]
        if name == "install" and good:
            wrong, text = self.what_is_installed()
            good, details = not wrong, [text]
        elif name == "install":
            missing = [x for x in ("setuptools", "pybind11", "cmake", "ninja") if not has_tool(x)]
            details += [f"the build needs {', '.join(missing)}"] * bool(missing)
        elif name in GROUPS:
            words, some = count(junit)
            good, details = good and some, [*details, words]
        elif name in SANITIZERS:
            said = [line for line in lines if line and not line.startswith("=====")]
            details += [line.strip("= ") for line in lines if "SUMMARY" in line] + said[-1:]
        elif name == "benchmark":
            details.append(str(values["out"]))
        result = "passed" if good else "failed"
        return Result(name, result, seconds, "; ".join(dict.fromkeys(details)), log)

    def what_is_installed(self) -> tuple[bool, str]:
        """Whether something is wrong with it, and which backends it has or why not."""
        command = [sys.executable, "-c", INSTALLED]
        found = subprocess.run(
            command,
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


def has_tool(name: str) -> bool:
    """Whether the build finds a package of this Python, or a program."""
    return importlib.util.find_spec(name) is not None or shutil.which(name) is not None


def find_nvcc() -> Path | None:
    """nvcc: what CUDACXX names, or on PATH, or where toolkits are installed."""
    return _find(os.environ.get("CUDACXX") or "nvcc")


def find_sanitizer() -> Path | None:
    """compute-sanitizer: on PATH, or beside nvcc, or where toolkits are installed."""
    nvcc = find_nvcc()
    return _find("compute-sanitizer", *([] if nvcc is None else [nvcc.resolve().parent]))


def _find(program: str, *folders: Path) -> Path | None:
    found = shutil.which(program)
    if found is not None:
        return Path(found)
    toolkits = [path / "bin" for path in sorted(Path("/usr/local").glob("cuda*"), reverse=True)]
    candidates = [folder / program for folder in (*folders, *toolkits)]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


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
            for line in process.stdout or ():
                file.write(line)
                file.flush()
                print(line, end="", flush=True)
            code = process.wait()
        finally:
            timer.cancel()
    return code, expired.is_set()


def count(junit: Path) -> tuple[str, bool]:
    """Passed, failed and skipped, in words, and whether that is good: all skipped is no success."""
    if not junit.is_file():
        return "no junit file was written", False
    suites = list(xml.etree.ElementTree.parse(junit).getroot().iter("testsuite"))
    keys = ("tests", "failures", "errors", "skipped")
    tests, failures, errors, skipped = (sum(int(s.get(k, 0)) for s in suites) for k in keys)
    bad = failures + errors
    words = f"{tests - bad - skipped} passed, {bad} failed, {skipped} skipped"
    return words, bad == 0 and tests > skipped


def why_not() -> str | None:
    """Why nothing can be checked here, in a sentence; None if it can."""
    for name in ("torch", "triton", "pytest"):
        if importlib.util.find_spec(name) is None:
            return f"{sys.executable} has no {name}"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return None


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    folder = functools.partial(parser.add_argument, metavar="FOLDER", type=Path)
    folder("--out", default=ROOT / "benchmarks" / "results", help="for the benchmark's record")
    folder("--logs", default=ROOT / "build" / "gpu-check", help="for every step's output")
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="for everything; what is late is cut short")
    add("--installed", action="store_true", help="do not build and install")
    add("--only", nargs="+", choices=STEPS, default=list(DEFAULT), help="some of the steps")
    return parser.parse_args()


def main() -> int:
    """Run the steps, print the tables."""
    options = arguments()
    reason = why_not()
    if reason is not None:
        print(f"gpu-check: cannot run: {reason}.", file=sys.stderr)
        return 2
    check = Check(options)
    results = [check.step(name) for name in STEPS if name in options.only]
    lines = ["| step | result | seconds | | output |", "|---|---|---:|---|---|"]
    for r in results:
        row = [r.name, r.result, f"{r.seconds:.0f}", r.detail.replace("|", "/"), str(r.log or "")]
        lines.append("| " + " | ".join(row) + " |")
    if "benchmark" in options.only:
        sys.path.append(str(ROOT / "scripts"))
        from update_tables import PAGES

        tables = PAGES["docs/performance.md"]
        lines += ["", tables["gpu"](options.out), "", tables["gpu-goals"](options.out)]
    text = "\n".join(lines)
    (check.logs / "summary.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    return 1 if any(result.result == "failed" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
