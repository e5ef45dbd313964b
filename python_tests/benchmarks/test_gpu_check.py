# SPDX-License-Identifier: Apache-2.0
"""scripts/gpu_check.py where there is no GPU: it says so; and its parts that need none."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from _pytest.mark.expression import Expression  # what -k reads

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.py"
Rows = dict[str, dict[str, str]]


@pytest.fixture
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, Rows]]:
    """Runs the script as if there were a GPU: its exit code, and the rows by step."""
    monkeypatch.setattr(gpu_check, "why_not", lambda: None)

    def main(*options: str) -> tuple[int, Rows]:
        arguments = ["--out", str(tmp_path), "--logs", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
        code = gpu_check.main()
        rows = json.loads((tmp_path / "checks.json").read_text())
        return code, {row["check"]: row for row in rows}

    return main


def test_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path, "--logs", tmp_path / "logs"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("gpu-check: cannot run: ")
    assert list(tmp_path.iterdir()) == []


def saying(text: str, code: int = 0) -> str:
    """A command with this output and exit code."""
    return f'printf "{text}" >&2; exit {code}'


def test_all_steps_run_whatever_fails(
    gpu_check: ModuleType,
    check: Callable[..., tuple[int, Rows]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcomes = {
        "install": (saying(r"error: no cmake\n", 1), "failed", "exit code 1; error: no cmake"),
        "sm80-latency": (saying("== 7 passed, 2 skipped in 3s =="), "passed", "7 passed, 2 skip"),
        "sm90-latency": (saying("== 9 skipped in 3s =="), "failed", "exit code 0; 9 skipped in 3s"),
        "native": (saying("== 1 failed, 9 passed in 3s ==", 1), "failed", "exit code 1; 1 failed"),
        "cuda_resources": (saying("x.py: cannot run: no library", 2), "skipped", "x.py: cannot"),
        "memcheck": (
            saying(r"12 problems\n=== ERROR SUMMARY: 0 errors\n"),
            "passed",
            "12 problems; ERROR SUMMARY: 0 errors",
        ),
        "racecheck": (
            saying(r"9 problems\n=== RACECHECK SUMMARY: 1 hazard displayed\n", 86),
            "failed",
            "exit code 86; 9 problems; RACECHECK SUMMARY: 1 hazard displayed",
        ),
        "initcheck": (saying("=== Error: Device not supported.", 1), "skipped", "Error: Device"),
        "network": (saying("$X|3"), "passed", "seen/3"),
        "resources": ("exec no-sanitizer", "failed", "exit code 127"),
        # What a step started, and what holds its output open, ends with it.
        "benchmark": ("sleep 600 & sleep 600", "failed", "stopped after 3 s"),
    }
    steps = {
        name: (share, {log: f"sh -c '{outcomes[log][0]}'" for log in logs if log in outcomes})
        for name, (share, logs) in gpu_check.STEPS.items()
    }
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    monkeypatch.setenv("X", "seen")
    limits: dict[str, float] = {}
    run = gpu_check.run

    def timed(commands: dict[str, str], logs: Path, limit: float, *rest: object) -> object:
        limits.update(dict.fromkeys(commands, limit))
        return run(commands, logs, 3 if "benchmark" in commands else limit, *rest)

    monkeypatch.setattr(gpu_check, "run", timed)
    code, rows = check("--only", *steps)
    text = capsys.readouterr().out
    assert code == 1
    for name, (_, result, detail) in outcomes.items():
        assert (rows[name]["result"], rows[name]["detail"][: len(detail)]) == (result, detail), name
        assert f"| {name} | {result} | {rows[name]['detail']} |" in text
    assert (tmp_path / "summary.md").read_text().strip() in text
    assert (tmp_path / "native.log").read_text() == "== 1 failed, 9 passed in 3s =="
    # Eight minutes for all; each leaves the next ones their share.
    assert limits["install"] == pytest.approx(480 * (1 - 0.86), abs=5)
    assert limits["sm80-latency"] == pytest.approx(480 * (1 - 0.6), abs=5)
    assert limits["benchmark"] == pytest.approx(480, abs=5)
    # What an earlier call found stays, until the step runs again.
    steps["network"][1]["network"] = f"sh -c '{saying('worse', 1)}'"
    code, rows = check("--only", "network")
    assert (code, rows["network"]["result"], rows["memcheck"]["result"]) == (1, "failed", "passed")


def test_commands_of_the_steps(
    gpu_check: ModuleType, check: Callable[..., tuple[int, Rows]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "toolkit", lambda program: None)
    commands = {log: words for _, logs in gpu_check.STEPS.values() for log, words in logs.items()}
    assert "--kernel-name" in commands["memcheck"]
    assert "--kernel-name" not in commands["initcheck"]
    code, rows = check("--only", "memcheck")
    assert (code, rows["memcheck"]["result"]) == (0, "skipped")
    assert "no-sanitizer" in rows["memcheck"]["detail"]


def test_every_gpu_test_is_in_one_group(gpu_check: ModuleType) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu"]
    command += [str(ROOT / "python_tests" / "gpu")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    tests = [line.partition("::")[2] for line in result.stdout.splitlines() if "::" in line]
    assert tests
    groups = [Expression.compile(words) for words in gpu_check.GROUPS.values()]
    for test in tests:
        names = test.__contains__
        found = [g for g in groups if g.evaluate(lambda word, names=names, **_: names(word))]
        assert len(found) == 1, test


PRETENDED = """
from types import SimpleNamespace
import torch
from fastproto.op import library
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
gpu = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
torch.cuda.get_device_properties = lambda index: gpu
library.build_info = lambda: {build_info}
library.why_not_cuda = lambda: {reason!r}
"""
BUILT = {"cuda_compiler": "13.0", "cuda_architectures": "80 90a"}


@pytest.mark.parametrize(
    ("program", "nvcc", "result", "detail"),
    [
        (PRETENDED.format(build_info=BUILT, reason="old driver"), "nvcc", "failed", "old driver"),
        (PRETENDED.format(build_info={}, reason="it is not there"), "nvcc", "failed", "it is not"),
        (PRETENDED.format(build_info={}, reason="it is not there"), None, "passed", "it is not"),
        (PRETENDED.format(build_info=BUILT, reason=None), "nvcc", "passed", "runs"),
        ("import os; os._exit(3)", "nvcc", "failed", None),
    ],
)
def test_a_native_backend_that_was_built_and_does_not_run_fails_the_installation(
    gpu_check: ModuleType,
    check: Callable[..., tuple[int, Rows]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    nvcc: str | None,
    result: str,
    detail: str | None,
) -> None:
    monkeypatch.setattr(gpu_check, "toolkit", lambda program: nvcc)
    for name in ("FASTPROTO_CUDA", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "sitecustomize.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    code, rows = check("--installed", "--only", "installed")
    assert (code, rows["installed"]["result"]) == (int(result == "failed"), result)
    expected = "exit code 3" if detail is None else f"native: {detail}"
    assert expected in rows["installed"]["detail"]
