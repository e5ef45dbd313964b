# SPDX-License-Identifier: Apache-2.0
"""The log is JSON lines, and a resumed run continues it without repeating a step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fastproto.errors import ArgumentError, CheckpointError
from fastproto.training.log import RunLog


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_resumed_log_drops_what_will_be_done_again(tmp_path: Path):
    with RunLog(tmp_path, 0) as log:
        for step in range(1, 6):
            log.write(step, loss=step / 2)
        log.sync()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 6, "los')  # killed while writing
    with RunLog(tmp_path, 3) as log:
        log.write(4, loss=2.0)
    assert steps(tmp_path) == [1, 2, 3, 4]
    with RunLog(tmp_path, 0):
        pass
    assert steps(tmp_path) == []


def test_every_record_is_in_the_file_at_once(tmp_path: Path):
    with RunLog(tmp_path, 0) as log:
        log.write(1, loss=0.5, note="text")
        text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "loss": 0.5, "note": "text"}


def test_tensorboard_gets_the_numbers(tmp_path: Path):
    pytest.importorskip("tensorboard")
    with RunLog(tmp_path, 0, tensorboard=True) as log:
        log.write(1, loss=0.5, note="text")
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_missing_tensorboard_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ArgumentError, match=r"pip install 'fastproto\[tensorboard\]'"):
        RunLog(tmp_path, 0, tensorboard=True)


def test_a_damaged_line_is_refused_by_name(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\nnot json\n')
    with pytest.raises(CheckpointError, match="not json"):
        RunLog(tmp_path, 1)
