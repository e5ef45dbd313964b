# SPDX-License-Identifier: Apache-2.0
"""The backend ladder: what is picked, how it is forced, and what it says when it cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from fastproto import InputError, proto_attention
from fastproto.op import backends, library

CALL = (
    "import torch; from fastproto import proto_attention, backends; "
    "o = proto_attention(torch.ones(1, 1, 4, 2, 2), torch.ones(1, 4), "
    "torch.tensor([0, 1], dtype=torch.int32)); print(backends.choose('cpu'), o.sum().item())"
)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tempfile.gettempdir(),  # not the sources, whose package has no native library
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_native_is_first_on_the_cpu() -> None:
    assert backends.choose("cpu") == "native"
    assert backends.choose("cpu", "reference") == "reference"


def test_without_native_code_the_reference_runs_and_says_so_once() -> None:
    result = python(CALL + ";" + CALL, FASTPROTO_NATIVE="0")
    assert result.stdout.split() == ["reference", "32.0"] * 2
    assert result.stderr.count("FASTPROTO_NATIVE=0 is set") == 1


def test_the_environment_forces_a_backend() -> None:
    assert python(CALL, FASTPROTO_BACKEND="reference").stdout.split()[0] == "reference"
    result = python(CALL, FASTPROTO_BACKEND="fast")
    assert "FASTPROTO_BACKEND: found 'fast'; allowed: native, triton, reference" in result.stderr


def test_a_forced_backend_that_cannot_run_says_why() -> None:
    result = python(CALL, FASTPROTO_BACKEND="native", FASTPROTO_NATIVE="0")
    assert result.returncode != 0
    assert "cannot run on 'cpu': FASTPROTO_NATIVE=0 is set" in result.stderr


@pytest.mark.parametrize("name", backends.LADDER)
def test_a_compiled_graph_takes_the_answer_and_does_not_look_for_it(name: str) -> None:
    def step(feat: torch.Tensor) -> torch.Tensor:
        dim = backends.padded_dim(feat.shape[2])
        able = backends.why_not(name, feat.device, feat.dtype, dim) is None
        return feat + able

    feat = torch.zeros(1, 1, 8, 2, 2)
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert torch.equal(compiled(feat), step(feat))


def test_unknown_backend_argument() -> None:
    with pytest.raises(InputError, match="backend: found 'quick'"):
        proto_attention(
            torch.ones(1, 1, 4, 2, 2),
            torch.ones(1, 4),
            torch.tensor([0, 1], dtype=torch.int32),
            backend="quick",
        )


def test_importing_the_package_costs_little_more_than_torch() -> None:
    code = (
        "import sys, time, torch; began = time.process_time(); import fastproto; "
        "fastproto.FewShotUNet, fastproto.proto_attention; "
        "assert 'torch._dynamo' not in sys.modules; print(time.process_time() - began)"
    )
    assert min(float(python(code).stdout) for _ in range(2)) < 0.2


def test_describe_lists_every_backend_with_a_reason() -> None:
    rows = backends.describe()
    assert {name for name, _, _ in rows} >= {"native (cpu)", "native (cuda)", "reference (cpu)"}
    assert all(available or reason for _, available, reason in rows)


def test_build_info_and_cpu_level() -> None:
    info = library.build_info()
    assert info["stable_abi"] == "2.10"
    assert info["built_with_torch"].split("+")[0].count(".") >= 1
    assert library.cpu_level() in LEVELS


LEVELS = ["baseline", "avx2", "avx512", "avx512bf16", "amx"]


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_of_this_cpu_passes_the_op_tests(level: str) -> None:
    """Forced in a process of its own: the level is chosen once a process."""
    if LEVELS.index(level) > LEVELS.index(library.cpu_level()):
        pytest.skip(f"this CPU has no {level}")
    if level == library.cpu_level():
        pytest.skip("the level all other tests run on")
    names = "bfloat16", "conformance", "native"
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in names]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            *files,
            "-k",
            "not opcheck and not compile and not autocast and not fake",
        ],
        cwd=tempfile.gettempdir(),
        env=os.environ | {"FASTPROTO_CPU_LEVEL": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    assert " passed" in result.stdout


def test_an_unknown_instruction_set_is_refused() -> None:
    result = python(
        "from fastproto.op import library; print(library.cpu_level())", FASTPROTO_CPU_LEVEL="sse9"
    )
    assert (
        "FASTPROTO_CPU_LEVEL: found 'sse9'; allowed: baseline, avx2, avx512, avx512bf16 or amx"
        in result.stderr
    )
