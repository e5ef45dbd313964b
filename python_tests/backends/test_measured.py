# SPDX-License-Identifier: Apache-2.0
"""A kernel that has never run on a GPU is no default there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastproto import backends
from fastproto.cli import info

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_the_table_of_what_was_measured_is_what_the_results_hold() -> None:
    measured: dict[str, set[str]] = {"native": set(), "triton": set()}
    for file in RESULTS.glob("*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        if "multiprocessors" not in record.get("gpu", {}):
            continue
        for case in record["cases"]:
            for name in measured.keys() & case["us"].keys():
                measured[name].add(file.name)
    assert backends.MEASURED_ON_GPU.keys() == {name for name, files in measured.items() if files}
    for name, file in backends.MEASURED_ON_GPU.items():
        assert file in measured[name]


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ((), ("triton", "native", "reference")),
        (("native",), ("native", "triton", "reference")),
        (("triton",), ("triton", "native", "reference")),
        (("triton", "native"), ("native", "triton", "reference")),
    ],
)
def test_measured_backends_come_first_on_a_gpu(
    measured: tuple[str, ...], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "MEASURED_ON_GPU", dict.fromkeys(measured, "some.json"))
    assert backends.ladder("cuda") == expected
    assert backends.ladder("cpu") == ("native", "reference")
    assert backends.ladder("xpu") == backends.LADDER


def test_what_can_run_but_was_never_measured_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "MEASURED_ON_GPU", {})
    monkeypatch.setattr(backends, "why_not", lambda name, device: None)
    said = {name: remark for name, available, remark in backends.describe() if available}
    expected = "not measured on a GPU yet; comes after triton unless it is named"
    assert said["native (cuda)"] == expected
    assert said["triton (cuda)"].endswith("first unless another is named")
    assert said["native (cpu)"] == ""
    text = info.to_text(info.describe())
    assert f"available: {expected}" in text
    monkeypatch.setattr(backends, "MEASURED_ON_GPU", {"native": "some.json"})
    assert {name: remark for name, _, remark in backends.describe()}["native (cuda)"] == ""
