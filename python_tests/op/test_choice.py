# SPDX-License-Identifier: Apache-2.0
"""The backend ladder: what is picked, how it is forced, and what it says when it cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from fastproto import InputError
from fastproto.cli import info
from fastproto.op import backends, library
from fastproto.op.chips import Chip

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
A100 = Chip(80, 108, 163 * 1024)
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


def test_without_native_code_the_reference_runs_and_says_so_once() -> None:
    result = python(CALL + ";" + CALL, FASTPROTO_NATIVE="0")
    assert result.stdout.split() == ["reference", "32.0"] * 2
    assert result.stderr.count("FASTPROTO_NATIVE=0 is set") == 1


def test_the_environment_forces_a_backend() -> None:
    assert backends.choose("cpu") == "native"  # the first, where nobody names another
    assert python(CALL, FASTPROTO_BACKEND="reference").stdout.split()[0] == "reference"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (
            {"FASTPROTO_BACKEND": "fast"},
            "BACKEND: found 'fast'; allowed: native, triton, ref",
        ),
        ({"FASTPROTO_BACKEND": "native", "FASTPROTO_NATIVE": "0"}, "on 'cpu': FASTPROTO_NATIVE=0"),
        (
            {"FASTPROTO_CPU_LEVEL": "sse9"},
            "LEVEL: found 'sse9'; allowed: baseline, avx2, avx512",
        ),
    ],
    ids=str,
)
def test_what_the_environment_asks_for_in_vain_is_refused(
    environment: dict[str, str], words: str
) -> None:
    result = python(CALL, **environment)
    assert result.returncode != 0
    assert words in result.stderr


@pytest.mark.parametrize("name", backends.LADDER)
def test_a_compiled_graph_takes_the_answer_and_does_not_look_for_it(name: str) -> None:
    def step(feat: torch.Tensor) -> torch.Tensor:
        dim = backends.padded_dim(feat.shape[2])
        able = backends.why_not(name, feat.device, feat.dtype, dim) is None
        return feat + able

    feat = torch.zeros(1, 1, 8, 2, 2)
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert torch.equal(compiled(feat), step(feat))


def test_the_argument_forces_a_backend() -> None:
    with pytest.raises(InputError, match="backend: found 'quick'"):
        backends.choose("cpu", "quick")
    assert backends.choose("cpu", "reference") == "reference"


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
    names = "bfloat16", "conformance"
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in names]
    slow = "not opcheck and not compile and not autocast and not fake"
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", slow]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=tempfile.gettempdir(),
        env=os.environ | {"FASTPROTO_CPU_LEVEL": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    assert " passed" in result.stdout


def test_every_record_is_there_and_of_that_gpu() -> None:
    for capability, name in backends.RECORDS.items():
        record = json.loads((RESULTS / name).read_text(encoding="utf-8"))
        assert float(record["gpu"]["capability"]) * 10 == capability
        assert any("native" in case["us"] for case in record["cases"])


def test_measured_kernels_come_first_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.ladder("cuda") == ("native", "triton", "reference")  # as on an H200
    assert backends.ladder("cpu") == ("native", "reference")
    assert backends.ladder("xpu") == backends.LADDER
    monkeypatch.setattr(backends, "chip_of", lambda device: A100)
    assert backends.ladder(torch.device("cuda", 0)) == ("triton", "reference")


def test_what_can_run_but_was_never_measured_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "why_not", lambda name, device: None)
    said = {name: remark for name, available, remark in backends.describe() if available}
    assert set(said.values()) == {"", "not measured on such a GPU: only by name"}
    assert said["native (cuda)"] == ""
    monkeypatch.setattr(backends, "chip_of", lambda device: A100)
    said = {name: remark for name, _, remark in backends.describe()}
    expected = "not measured on such a GPU: only by name"
    assert said["native (cuda)"] == expected
    assert said["triton (cuda)"] == said["native (cpu)"] == ""
    assert f"available: {expected}" in info.to_text(info.describe())
