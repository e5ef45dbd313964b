# SPDX-License-Identifier: Apache-2.0
"""Options that subcommands share."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from fastproto.cli.options import (
    add_runtime_options,
    labels_beside,
    progress_bar,
    read_labels,
    runtime,
    steps,
)
from fastproto.errors import ArgumentError, LabelError


@pytest.mark.parametrize(
    "content",
    [
        {"0": "background", "1": "liver", "7": "left kidney"},
        {"background": 0, "liver": 1, "left kidney": 7},
        {"name": "a data set", "labels": {"0": "background", "1": "liver", "7": "left kidney"}},
    ],
)
def test_label_table_from_json(tmp_path, content):
    path = tmp_path / "organs.json"
    path.write_text(json.dumps(content))
    assert read_labels([str(path)]) == {1: "liver", 7: "left kidney"}


def test_label_table_from_pairs():
    assert read_labels(["liver=1", "left kidney=7"]) == {1: "liver", 7: "left kidney"}
    assert read_labels(["a=b=3"]) == {3: "a=b"}


@pytest.mark.parametrize(
    ("items", "found"),
    [
        (["liver=one"], "value 'one'"),
        (["liver=-1"], "value '-1'"),
        (["liver=1", "spleen=1"], "'1' for 'spleen'"),
        (["background=0"], "no label"),
        (["liver=1", "organs.json"], "organs.json"),
        (["absent.json"], "no readable JSON"),
        ("[1, 2]", r"organs\.json: found list"),
        ("{", r"organs\.json: found no readable JSON"),
        ('{"1": "liver", "liver": 1}', r"organs\.json: found value '1'"),
        ("{}", r"organs\.json: found no label"),
    ],
)
def test_unusable_label_tables(tmp_path, items, found):
    path = tmp_path / "organs.json"
    if isinstance(items, str):
        path.write_text(items)
        items = [str(path)]
    with pytest.raises(LabelError, match=found):
        read_labels(items)


@pytest.mark.parametrize("folder", ["labels", "labelsTr"])
def test_labels_of_the_data_set_that_a_label_map_is_in(tmp_path, folder, monkeypatch):
    label = tmp_path / "set" / folder / "case.nii.gz"
    label.parent.mkdir(parents=True)
    assert labels_beside(label) is None
    table = tmp_path / "set" / "dataset.json"
    table.write_text('{"modality": "CT", "labels": {"background": 0, "liver": 1}}')
    assert labels_beside(label) == {1: "liver"}
    monkeypatch.chdir(label.parent)
    assert labels_beside(Path("case.nii.gz")) == {1: "liver"}
    assert labels_beside(tmp_path / "set" / "masks" / "case.nii.gz") is None
    table.write_text("{")
    with pytest.raises(LabelError, match=r"dataset\.json"):
        labels_beside(label)


def test_a_bar_on_a_terminal_shows_the_loss(monkeypatch, capsys):
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=terminal: answer)
        with progress_bar("adapting", "step") as advance:
            for done in (1, 3, 4):
                time.sleep(0.15)  # longer than between two drawings
                advance(done, 4, 0.5 / done)
        drawn = capsys.readouterr().err
        assert bool(drawn) == terminal
    assert "adapting" in drawn
    assert "3/4" in drawn
    assert "loss=0.167" in drawn


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_runtime_options(parser)
    return parser.parse_args(arguments)


def test_runtime_options_apply_and_are_set_back(monkeypatch):
    before = torch.get_num_threads()
    with runtime(parse("--threads", str(before + 1), "--device", "cpu")) as device:
        assert device == torch.device("cpu")
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with runtime(parse()) as device:
        assert torch.get_num_threads() == before
        assert device.type == "cpu"
    with pytest.raises(ArgumentError, match="no CUDA device"), runtime(parse("--device", "cuda")):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, kind in {"auto": "cuda", "cpu": "cpu"}.items():
        with runtime(parse("--device", name)) as device:
            assert device.type == kind


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_threads_must_be_a_whole_number_above_0(text, capsys):
    with pytest.raises(SystemExit):
        parse("--threads", text)
    assert "whole number above 0" in capsys.readouterr().err


def test_steps_are_a_number_or_auto():
    assert [steps(text) for text in ("auto", "0", "12")] == ["auto", 0, 12]
