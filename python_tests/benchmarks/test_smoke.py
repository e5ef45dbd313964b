# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, write their record, and the tables are made from it. No time is judged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastproto.op import backends

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("performance", "training", "results", "provenance")
NO_RECORD = "No record in `benchmarks/results` yet."


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """A folder with the pages that hold tables, and no results."""
    (tmp_path / "docs").mkdir()
    for page in ("README.md", *(f"docs/{name}.md" for name in PAGES)):
        shutil.copy(ROOT / page, tmp_path / page)
    return tmp_path


def run(*command: str | Path, cwd: Path, **environment: str) -> None:
    """Run a program of this repository, away from its sources."""
    result = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def update_tables(pages: Path) -> str:
    """The page of the benchmarks with its tables filled."""
    run(ROOT / "scripts" / "update_tables.py", "--root", pages, cwd=pages)
    return (pages / "docs" / "performance.md").read_text(encoding="utf-8")


def provenance(pages: Path) -> str:
    """The page of all records."""
    return (pages / "docs" / "provenance.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(
    backends.why_not("native", "cpu") is not None, reason="there is no native op to measure"
)
def test_measure_record_tables(pages: Path) -> None:
    results = pages / "benchmarks" / "results"
    configuration = ["-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider"]
    part = ["-k", "1t or test_overhead or test_network or (test_memory and forward)"]
    options = ["--quick", "--record", results, *part]
    run("-m", "pytest", *configuration, ROOT / "benchmarks", *options, cwd=pages)
    (path,) = results.glob("????-??-??-cpu-*.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert [case["what"] for case in record["cases"]] == ["forward", "backward", "both"]
    for case in record["cases"]:
        assert case["rounds"] == 2
        assert set(case["ms"]) == {"native", "eager", "eager_nchw", "sdpa", "broadcast"}
        assert {"fastest_peer", "peer_over_native", "of_matmul", "of_fma_loop"} <= set(case)
    assert {row["rate"] for row in record["ceilings"]} == {"fma_loop", "matmul_float32"}
    assert len(record["overhead"]) == 5
    assert [row["what"] for row in record["network"]] == ["inference", "training"]
    for row in record["network"]:
        assert {"unet", "unet direct", "baseline"} <= set(row["ms"])
    text = update_tables(pages)
    assert f"(provenance.md#{path.stem})" in text
    assert f"## {path.stem}\n\n{record['machine']}; fastproto " in provenance(pages)
    assert f"`{record['command']}`" in provenance(pages)
    assert "**forward, float32, 1 thread**" in text
    assert "| training, 1 at once, float32, cpu, ResNet-34, 256 x 256 |" in text
    assert "| inference 2x faster than the ResNet-101 baseline | " in text
    assert "| under 100 ms an image on a GPU | not measured | - |" in text


@pytest.mark.slow
def test_gpu_suite_record_tables(pages: Path) -> None:
    """All of it but the clock and the graphs: interpreted kernels on CPU tensors."""
    pytest.importorskip("triton")
    results = pages / "benchmarks" / "results"
    program = ROOT / "benchmarks" / "run_gpu.py"
    options = ["--quick", "--device", "cpu", "--out", results]
    run(program, *options, cwd=pages, TRITON_INTERPRET="1")
    (path,) = results.glob("*.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["failed"] == record["left_out"] == []
    assert [(case["size"], case["what"]) for case in record["cases"]] == [
        (size, what) for size in ("1x5", "mixed") for what in ("forward", "backward", "both")
    ]
    for case in record["cases"]:
        assert {"triton", "eager", "eager_nchw", "sdpa"} <= set(case["us"])
        assert case["relative_errors"]["triton"] < 1e-4
        assert {"fastest_peer", "peer_over_ours", "measured_over_expected", "of_copy"} <= set(case)
        assert ("wall_us" in case) == (case["size"] == "1x5" and case["what"] != "backward")
    assert {row["rate"] for row in record["ceilings"]} > {"copy", "bfloat16", "tf32"}
    assert all(row["met"] is None for row in record["goals"])
    text = update_tables(pages)
    assert text.count(f"(provenance.md#{path.stem})") == 2
    assert "**none: CPU tensors: both, float32, " in text
    assert "| not measured | - |" in text


def test_tables_without_a_record(pages: Path) -> None:
    text = update_tables(pages)
    assert text.count(NO_RECORD) == text.count("<!-- table: ")
    assert NO_RECORD in (pages / "README.md").read_text(encoding="utf-8")


def test_cross_validations_become_a_table(pages: Path) -> None:
    """Columns for what was measured, rows for organs, and the numbers of others as quoted."""

    def entry(protocol: str, method: str, variant: str, liver: float, std: float | None) -> dict:
        dice = {"mean": liver, "std": std}
        organs = [{"organ": "liver", "dice": dice}]
        names = {"protocol": protocol, "method": method, "variant": variant}
        return names | {"organs": organs, "mean": {"dice": dice}}

    record = {
        "date": "2026-11-24",
        "command": "fastproto crossval --data SCANS",
        "machine": "a desk",
        "versions": {"fastproto": "1"},
        "data": "CHAOS",
        "model": "base",
        "tests": {"test": ["a", "b", "c"]},
        "annotated": ["a"],
        "training": {},
        "training_minutes": {},
        "results": [
            entry("ep1", "fastproto", "network", 0.8, 0.0312),
            entry("whole", "fastproto", "network + prior", 0.7, 0.01),
            entry("whole", "registration", "box", 0.5, None),
        ],
        "quoted": [{"method": "theirs", "setting_1": 0.9, "setting_2": 0.8, "source": "a paper"}],
    }
    results = pages / "benchmarks" / "results"
    results.mkdir(parents=True)
    file = results / "2026-11-24-crossval-chaos.json"
    file.write_text(json.dumps(record), encoding="utf-8")
    update_tables(pages)
    assert "| CHAOS, base | 2 | 0.70 | - | - | - |" in (pages / "README.md").read_text("utf-8")
    text = (pages / "docs" / "results.md").read_text(encoding="utf-8")
    assert "**CHAOS: model base; 2 unseen patients, annotated: a**" in text
    assert "| organ | network + prior | prior alone: box | EP1 |" in text
    assert "| liver | 0.70 | 0.50 | 0.80 |" in text
    assert "| **mean** | **0.70** ± 0.01 | **0.50** | **0.80** ± 0.03 |" in text
    assert "| theirs | 0.90 | 0.80 | a paper |" in text
    assert f"(provenance.md#{file.stem})" in text
    assert "`fastproto crossval --data SCANS`" in provenance(pages)
