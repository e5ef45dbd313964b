# SPDX-License-Identifier: Apache-2.0
"""Options that subcommands share."""

from __future__ import annotations

import argparse
import json
import sys
import time

import pytest
import torch

from fastproto.cli import _parser
from fastproto.cli.options import (
    add_runtime_options,
    progress_bar,
    read_labels,
    runtime,
    steps,
)
from fastproto.data.label_table import LabelTable
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
    assert read_labels([str(path)]) == LabelTable({1: "liver", 7: "left kidney"})


def test_label_table_from_pairs():
    table = LabelTable({1: "liver", 7: "left kidney"})
    assert read_labels(["liver=1", "left kidney=7"]) == table
    assert read_labels(["a=b=3", "ignore=4"]) == LabelTable({3: "a=b"}, ignore=4)


@pytest.mark.parametrize(
    ("items", "found"),
    [
        (["liver=one"], "value 'one'"),
        (["liver=-1"], "value '-1'"),
        (["liver=1", "spleen=1"], "value 1 for 'spleen'"),
        (["liver=1", "liver=2"], "value 2 for 'liver'"),
        (["liver=1", "ignore=1"], "value 1 for 'ignore'"),
        (["background=0"], "no label"),
        (["liver=1", "organs.json"], "organs.json"),
        (["absent.json"], r"absent\.json: found no such file"),
        ("[1, 2]", r"organs\.json: found JSON, but a list"),
        ("{", r"organs\.json: found no readable JSON"),
        ('{"1": "liver", "liver": 1}', r"organs\.json: found value 1 for 'liver'"),
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


COMMANDS = next(
    action.choices
    for action in _parser()._actions
    if isinstance(action, argparse._SubParsersAction)
)
LISTS = [
    (command, action)
    for command, parser in COMMANDS.items()
    for action in parser._actions
    if action.option_strings
    and (action.nargs in ("+", "*") or (isinstance(action.nargs, int) and action.nargs > 1))
]


def test_options_of_several_values_are_known():
    """Else the test below would look at nothing."""
    known = {(command, action.option_strings[0]) for command, action in LISTS}
    assert known >= {
        ("train", "--data"), ("train", "--holdout-classes"), ("train", "--set"),
        ("learn", "--labels"), ("segment", "--classes"), ("segment", "--example"),
        ("evaluate", "--labels"), ("crossval", "--methods"), ("crossval", "--set"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("command", "action"), [pytest.param(*each, id=f"{each[0]} {each[1].dest}") for each in LISTS]
)
def test_values_of_a_repeated_option_add_up(command, action):
    for _ in range(2):  # the second time, nothing is left of the first
        namespace = argparse.Namespace()
        if action.default is not argparse.SUPPRESS:
            setattr(namespace, action.dest, action.default)
        for values in (["a", "b"], ["c", "d"]):
            action(COMMANDS[command], namespace, values, action.option_strings[0])
        pairs = isinstance(action.nargs, int)
        several = [["a", "b"], ["c", "d"]] if pairs else ["a", "b", "c", "d"]
        assert getattr(namespace, action.dest) == several  # and no default before them


def test_an_option_with_one_value_is_given_once(capsys):
    with pytest.raises(SystemExit):
        _parser().parse_args(["segment", "--task", "a", "-i", "b", "--input", "c", "-o", "d"])
    assert "argument -i/--input: found twice; allowed: once" in capsys.readouterr().err


def test_repeated_options_on_the_command_line():
    words = ["train", "--data", "a", "b", "--data", "c", "--out", "run"]
    words += ["--holdout-classes", "spleen", "--holdout-classes", "liver", "7"]
    words += ["--set", "steps=1", "--set", "ce=2", "cycle=3"]
    args = _parser().parse_args(words)
    assert args.data == ["a", "b", "c"]
    assert args.holdout == ["spleen", "liver", 7]
    assert args.settings == ["steps=1", "ce=2", "cycle=3"]
    words = ["crossval", "--data", "a", "--out", "b", "--groups", "liver", "--groups", "x,y", "z"]
    args = _parser().parse_args([*words, "--methods", "registration", "--methods", "adapted"])
    assert args.groups == [("liver",), ("x", "y"), ("z",)]
    assert args.methods == ["registration", "adapted"]
    assert _parser().parse_args(["train", "--out", "run"]).settings == []


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
