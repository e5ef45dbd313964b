# SPDX-License-Identifier: Apache-2.0
"""Native kernels that were never measured on a kind of GPU are no default there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastproto.cli import info
from fastproto.op import backends
from fastproto.op.chips import Chip

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
A100 = Chip(80, 108, 163 * 1024)


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
