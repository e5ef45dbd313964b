# SPDX-License-Identifier: Apache-2.0
"""Small scans with results on disk, and the report that the program writes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastproto.cli import main
from fastproto.data import Volume
from fastproto.data.volume import write_volume
from fastproto.evaluation.metrics import METRICS
from fastproto.report import Results

ORGANS = {1: "liver", 2: "<b>left</b> & 'right' \"kidney\" $x$"}
NASTY = '<script>alert(1) & "it\'s"'  # of a file


def write_case(folder: Path, name: str, size: int) -> None:
    """A scan in ``scans`` and a label map in ``results``, organ 1 of ``size`` slices."""
    shape = (10, 16, 20)
    array = np.random.default_rng(size).normal(100, 20, shape).astype(np.float32)
    label = np.zeros(shape, np.uint8)
    label[1 : 1 + size, 2:9, 3:12] = 1
    label[4:7, 11:14, 12:18] = 2
    array[label > 0] += 150.0 * label[label > 0]
    grid = Volume(array, (2.0, 2.0, 5.0))
    write_volume(folder / "scans" / f"{name}.nii.gz", array, grid)
    write_volume(folder / "results" / f"{name}.nii.gz", label, grid)


def write_scores(path: Path, cases: list[str]) -> Path:
    """What `evaluate --json` writes, with one organ that was missed."""
    rows = [
        {"case": case, "organ": organ, "status": "measured"}
        | {metric.name: 0.5 + 0.04 * number + 0.1 * label for metric in METRICS}
        for number, case in enumerate(cases)
        for label, organ in ORGANS.items()
    ]
    rows[0] |= {"status": "missed", "dice": 0.0, "nsd": 0.0, "hd95": None, "assd": None}
    definitions = {metric.name: metric.definition for metric in METRICS}
    scores = {"rows": rows, "definitions": definitions, "nsd_tolerance_mm": 2.0}
    path.write_text(json.dumps(scores | {"failed": {"lost": "damaged"}}), encoding="utf-8")
    return path


def write_run(folder: Path, steps: int = 30) -> Path:
    """A training's log and configuration; the last line is not finished."""
    folder.mkdir()
    config = {"data": ["/data/<scans>"], "encoder": "resnet18", "image_size": 128, "batch": 2}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    lines = []
    for step in range(1, steps + 1):
        losses = {"loss": 1 / step, "ce": 0.7 / step, "align": 0.3 / step, "cycle": 0.0}
        lines.append({"step": step, **losses, "learning_rate": 1e-3 / step, "seconds": 2.0})
        if step % 10 == 0:
            lines.append({"step": step, "validation_dice": 0.5 + step / 100})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text + '{"step": 31, "lo', encoding="utf-8")
    return folder


def parts(results: Results) -> dict[str, Any]:
    """A page of results alone."""
    return {"results": results.contents(), "scores": None, "training": None}


@pytest.fixture(scope="session")
def cases(tmp_path_factory) -> Path:
    """Seven scans with results, one of them with a liver of twice the size."""
    folder = tmp_path_factory.mktemp("cases")
    for number, size in enumerate((3, 3, 3, 3, 8, 3)):
        write_case(folder, f"case_{number}", size)
    write_case(folder, NASTY, 3)
    return folder


@pytest.fixture(scope="session")
def report(cases, tmp_path_factory) -> Path:
    """Everything that a report can hold, in one."""
    folder = tmp_path_factory.mktemp("report")
    names = [path.name.removesuffix(".nii.gz") for path in sorted((cases / "results").iterdir())]
    scores = write_scores(folder / "scores.json", names)
    run = write_run(folder / "run")
    labels = [f"{name}={value}" for value, name in ORGANS.items()]
    inputs = [cases / "results", scores, run, "--scans", cases / "scans", "--labels", *labels]
    output = folder / "report.html"
    assert main(["report", *map(str, inputs), "-o", str(output)]) == 0
    return output
