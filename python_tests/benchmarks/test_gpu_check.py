# SPDX-License-Identifier: Apache-2.0
"""scripts/gpu_check.py where there is no GPU: it says so; and its parts that need none."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from _pytest.mark.expression import Expression  # what -k reads

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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


def test_a_step_keeps_its_output(gpu_check: ModuleType, tmp_path: Path) -> None:
    program = "import os; print('seen', os.environ['X']); raise SystemExit(3)"
    log = tmp_path / "log"
    environment = dict(os.environ) | {"X": "5"}
    code, expired = gpu_check.run([sys.executable, "-c", program], log, environment, tmp_path, 60)
    assert (code, expired, log.read_text()) == (3, False, "seen 5\n")


def test_a_step_is_stopped_in_the_end(gpu_check: ModuleType, tmp_path: Path) -> None:
    # A helper of the step that holds its output open must not keep us waiting.
    program = "import subprocess; subprocess.run(['sleep', '600'])"
    log = tmp_path / "log"
    command = [sys.executable, "-c", program]
    code, expired = gpu_check.run(command, log, dict(os.environ), tmp_path, 3)
    assert expired
    assert code != 0


JUNIT = (
    '<testsuites><testsuite name="pytest" errors="{2}" failures="{1}" '
    'skipped="{3}" tests="{0}"></testsuite></testsuites>'
)


@pytest.mark.parametrize(
    ("counts", "words", "good"),
    [
        ((9, 0, 0, 2), "7 passed, 0 failed, 2 skipped", True),
        ((9, 1, 1, 2), "5 passed, 2 failed, 2 skipped", False),
        ((9, 0, 0, 9), "0 passed, 0 failed, 9 skipped", False),
    ],
)
def test_counts(
    gpu_check: ModuleType, tmp_path: Path, counts: tuple[int, ...], words: str, good: bool
) -> None:
    path = tmp_path / "junit.xml"
    assert gpu_check.count(path) == ("no junit file was written", False)
    path.write_text(JUNIT.format(*counts))
    assert gpu_check.count(path) == (words, good)


def test_all_steps_run_whatever_fails(
    gpu_check: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcomes = {
        "install": (1, False, ""),
        **dict.fromkeys(gpu_check.GROUPS, (0, False, "")),
        "cuda_resources": (2, False, "cuda_resources.py: cannot run: there is no library.\n"),
        "memcheck": (0, False, "12 problems\n========= ERROR SUMMARY: 0 errors\n"),
        "racecheck": (86, False, "9 problems\n========= RACECHECK SUMMARY: 1 hazard displayed\n"),
        "initcheck": (1, False, "========= Error: Device not supported.\n"),
        "network": (0, False, ""),
        "benchmark": (-9, True, ""),
    }
    limits: dict[str, float] = {}
    commands: dict[str, list[str]] = {}

    def run(command: list[str], log: Path, *rest: Any) -> tuple[int, bool]:
        code, expired, text = outcomes[log.stem]
        commands[log.stem], limits[log.stem] = command, rest[-1]
        log.write_text(text)
        return code, expired

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "why_not", lambda: None)
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: Path("/bin/compute-sanitizer"))
    monkeypatch.setattr(gpu_check, "RESOURCES", tmp_path / "none.py")
    logs = tmp_path / "logs"
    arguments = ["--out", str(tmp_path), "--logs", str(logs), "--only", *gpu_check.STEPS]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    assert gpu_check.main() == 1
    text = capsys.readouterr().out
    assert "| install | failed |" in text
    assert "| tests | failed |" in text  # exit code 0, but no test is known to have passed
    assert "sm90-latency: no junit file was written" in text
    assert "| resources | skipped | 0 | there is no scripts/none.py |" in text
    assert "| cuda_resources | skipped | 0 | cuda_resources.py: cannot run: there is no" in text
    assert "| memcheck | passed | 0 | ERROR SUMMARY: 0 errors; 12 problems |" in text
    assert "| racecheck | failed | 0 | exit code 86; RACECHECK SUMMARY: 1 hazard" in text
    assert "| initcheck | skipped | 0 | Error: Device not supported. |" in text
    assert "| network | passed |" in text
    assert "| benchmark | failed |" in text
    assert f"stopped after {limits['benchmark']:.0f} s" in text
    # Eight minutes for all; each leaves the next ones their share.
    assert limits["install"] == pytest.approx(480 * (1 - 0.85), abs=5)
    assert limits["sm80-latency"] == pytest.approx(480 * (1 - 0.6), abs=5)
    assert limits["benchmark"] == pytest.approx(480, abs=5)
    assert (logs / "summary.md").read_text().strip() in text
    assert "--kernel-name" in commands["memcheck"]
    assert "--kernel-name" not in commands["initcheck"]
    # The benchmark's record gets what the steps before it found.
    assert commands["benchmark"][-4:-2] == ["--checks", str(logs / "checks.json")]
    rows = {row["check"]: row["result"] for row in json.loads((logs / "checks.json").read_text())}
    assert rows["memcheck"] == "passed"
    assert rows["racecheck"] == "failed"


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


def test_without_a_sanitizer(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--logs", str(tmp_path)])
    step = gpu_check.Check(gpu_check.arguments()).step("memcheck")
    assert (step.result, step.detail) == ("skipped", "there is no compute-sanitizer")


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


@pytest.mark.parametrize(
    ("build_info", "reason", "finds_nvcc", "expected"),
    [
        ({"cuda_compiler": "13.0"}, "the driver is too old", True, True),
        ({"cuda_compiler": ""}, "it is not there", True, True),
        ({"cuda_compiler": ""}, "it is not there", False, False),
        ({"cuda_compiler": "13.0", "cuda_architectures": "80 90a"}, None, True, False),
    ],
)
def test_a_native_backend_that_was_built_and_does_not_run_fails_the_installation(
    gpu_check: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    build_info: dict[str, str],
    reason: str | None,
    finds_nvcc: bool,
    expected: bool,
) -> None:
    monkeypatch.setattr(gpu_check, "find_nvcc", lambda: tmp_path if finds_nvcc else None)
    monkeypatch.delenv("FASTPROTO_CUDA", raising=False)
    check = gpu_check.Check(argparse.Namespace(logs=tmp_path, installed=True, minutes=8))
    program = PRETENDED.format(build_info=build_info, reason=reason)
    (tmp_path / "sitecustomize.py").write_text(program)
    path = check.environment.get("PYTHONPATH", "")
    check.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tmp_path), path]))
    wrong, text = check.what_is_installed()
    assert wrong == expected, text
    assert f"native: {reason or 'runs'}; triton: " in text


def test_a_package_that_dies_fails_the_installation(gpu_check: ModuleType, tmp_path: Path) -> None:
    check = gpu_check.Check(argparse.Namespace(logs=tmp_path, installed=True, minutes=8))
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(3)")
    check.environment["PYTHONPATH"] = str(tmp_path)
    assert check.what_is_installed() == (True, "does not import: exit code 3")
