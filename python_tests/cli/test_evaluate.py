# SPDX-License-Identifier: Apache-2.0
"""``evaluate`` from files to files: the report, what is left out of it, and the exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fastproto.cli import main

from .conftest import ORGANS


def evaluate(prediction: object, truth: object, *more: str) -> int:
    folders = ["--prediction", str(prediction), "--truth", str(truth), "--labels", *ORGANS]
    return main(["evaluate", *folders, *more])


@pytest.fixture
def predicted(phantom, tmp_path) -> Path:
    return Path(shutil.copytree(phantom / "labels", tmp_path / "predicted"))


def test_evaluate_prints_and_writes_the_report(phantom, results, tmp_path, capsys):
    truth = phantom / "labels" / "mr_000.nii.gz"
    assert evaluate(truth, truth, "--json", str(tmp_path / "scores.json")) == 0
    text = capsys.readouterr().out
    assert "liver" in text
    assert "Dice" in text
    report = json.loads((tmp_path / "scores.json").read_text())
    assert {row["organ"] for row in report["rows"]} == {"liver", "spine"}
    assert all(row["dice"] == 1 for row in report["rows"])
    assert evaluate(truth, truth, "--tolerance", "-1") == 2
    assert evaluate(results[0], phantom, "--z-margin", "0") == 0
    assert "mr_002" in capsys.readouterr().out


def test_a_damaged_prediction_does_not_stop_the_report(phantom, predicted, tmp_path, capsys):
    damaged = predicted / "mr_001.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    assert evaluate(predicted, phantom, "--json", str(tmp_path / "scores.json")) == 2
    out, err = capsys.readouterr()
    assert "2 patient(s)" in out
    assert f"not measured: mr_001 ({damaged}: found" in out
    assert err == "fastproto: 1 case(s) not measured, as the report says\n"
    report = json.loads((tmp_path / "scores.json").read_text())
    assert list(report["failed"]) == ["mr_001"]
    assert {row["case"] for row in report["rows"]} == {"mr_000", "mr_002"}
    assert report["overall"]["dice"] == 1


def test_a_missing_prediction_changes_the_exit_code(phantom, predicted, capsys):
    (predicted / "mr_002.nii.gz").unlink()
    assert evaluate(predicted, phantom) == 2
    out, err = capsys.readouterr()
    assert "no prediction for: mr_002" in out
    assert err == "fastproto: 1 case(s) not measured, as the report says\n"
    assert evaluate(predicted / "mr_000.nii.gz", phantom) == 0  # the others were not asked for
    assert "no prediction" not in "".join(capsys.readouterr())


def test_a_report_that_cannot_be_written_is_still_printed(phantom, tmp_path, capsys):
    assert evaluate(phantom / "labels", phantom, "--json", str(tmp_path)) == 2
    out, err = capsys.readouterr()
    assert "3 patient(s)" in out
    assert f"error: {tmp_path}: found a folder" in err
