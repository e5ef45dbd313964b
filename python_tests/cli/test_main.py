# SPDX-License-Identifier: Apache-2.0
"""The program as a whole: speed of help, errors, exit statuses, examples."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
import tempfile
import time

import pytest

import fastproto
from fastproto.cli import _parser, main
from fastproto.errors import InputError

# Not the sources: the installed package.
ELSEWHERE = tempfile.gettempdir()
COMMANDS = [
    "phantom",
    "train",
    "learn",
    "segment",
    "evaluate",
    "report",
    "crossval",
    "export",
    "info",
]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ELSEWHERE, capture_output=True, text=True, check=False)


def test_help_needs_no_heavy_import():
    script = (
        "import sys\n"
        "from fastproto.cli import main\n"
        f"for command in ('', *{COMMANDS}):\n"
        "    try:\n"
        "        main([*command.split(), '--help'])\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'SimpleITK', 'scipy', 'PIL', 'tqdm'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: fastproto") == 1 + len(COMMANDS)


def test_help_appears_at_once():
    times = []
    for _ in range(5):
        started = time.perf_counter()
        assert run_python("-m", "fastproto", "segment", "--help").returncode == 0
        times.append(time.perf_counter() - started)
    assert min(times) < 0.3, f"--help took {min(times):.2f} s at best"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_ends_with_an_example_that_parses(command, capsys):
    example = importlib.import_module(f"fastproto.cli.{command}".rstrip(".")).EXAMPLE
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert capsys.readouterr().out.endswith(f"example:\n{example}\n")
    lines = example.replace("\\\n", " ").splitlines()
    assert any(line.split()[1] == command for line in lines) or not command
    for line in lines:
        program, *arguments = shlex.split(line.split(">")[0])
        assert program == "fastproto"
        _parser().parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [(["--version"], 0, f"fastproto {fastproto.__version__}\n"), ([], 2, "")],
)
def test_version_and_no_command(arguments, status, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == status
    assert capsys.readouterr().out == said


def test_input_error_prints_one_line_and_exits_with_2(tmp_path, capsys):
    arguments = ["evaluate", "--prediction", str(tmp_path / "no.nii"), "--truth", str(tmp_path)]
    done = run_python("-m", "fastproto", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("fastproto: error: ")
    assert done.stderr.count("\n") == 1
    assert "no.nii" in done.stderr
    assert main([*arguments, "--verbose"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_exits_with_130_and_a_bug_is_not_hidden(monkeypatch, capsys, tmp_path):
    raised = [RuntimeError("a bug"), KeyboardInterrupt()]

    def fail(*_, **__):
        raise raised.pop()

    monkeypatch.setattr("fastproto.data.phantom.write_phantom", fail)
    assert main(["phantom", "--out", str(tmp_path / "phantom")]) == 130
    assert capsys.readouterr().err == "fastproto: interrupted\n"
    with pytest.raises(RuntimeError, match="a bug"):
        main(["phantom", "--out", str(tmp_path / "phantom")])


def test_error_family_is_public():
    assert issubclass(fastproto.InputError, ValueError)
    assert fastproto.InputError is InputError


def test_phantom_writes_a_data_set(tmp_path, capsys, monkeypatch):
    calls = {}
    monkeypatch.setattr(
        "fastproto.data.phantom.write_phantom",
        lambda folder, **options: calls.update(options) or folder,
    )
    arguments = ["--patients", "3", "--modality", "mr", "--seed", "5"]
    assert main(["phantom", "--out", str(tmp_path), *arguments]) == 0
    assert calls == {"patients": 3, "modality": "mr", "seed": 5}
    assert capsys.readouterr().out == f"{tmp_path}: 3 MR patients\n"


def test_info_as_text_and_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fastproto"] == fastproto.__version__
    assert facts["cpu"]["cores"] >= 1
    available = {backend["name"]: backend["available"] for backend in facts["backends"]}
    assert available["reference (cpu)"] is True
    for backend in facts["backends"]:
        assert backend["available"] or backend["reason"]
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for name in ("fastproto", "torch", "SimpleITK", "processor", "backend reference"):
        assert name in text
