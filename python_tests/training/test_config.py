# SPDX-License-Identifier: Apache-2.0
"""The configuration goes to JSON and back, refuses what makes no sense, and tells runs apart."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from fastproto.errors import ArgumentError
from fastproto.training.config import TrainConfig


def test_json_round_trip(tmp_path: Path):
    config = TrainConfig(
        data=tmp_path / "data", output="run", holdout=["liver", 3], validation_cases=("a",), ways=2
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert TrainConfig.load(tmp_path / "config.json") == config
    assert config.holdout == ("liver", 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("steps", 1.5), ("steps", True), ("ways", 0), ("batch", -1),
     ("learning_rate", 0), ("learning_rate", math.nan), ("clip_norm", 0), ("ce", -1),
     ("superpixel_fraction", 1.1), ("mask_threshold", -0.1), ("plane", "oblique"),
     ("precision", "float16"), ("superpixel_source", "volume"), ("seed", -1),
     ("min_pixels", 0), ("temperature", "warm")],
)  # fmt: skip
def test_values_out_of_range_are_named(name: str, value: object):
    with pytest.raises(ArgumentError, match=f"^{name}: found "):
        TrainConfig(data="d", output="o", **{name: value})


def test_contradictions_are_refused():
    with pytest.raises(ArgumentError, match="loss weight above 0"):
        TrainConfig(data="d", output="o", ce=0, align=0, cycle=0)
    with pytest.raises(ArgumentError, match="validation_cases"):
        TrainConfig(data="d", output="o", holdout_cases=["a"], validation_cases=["a", "b"])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"data": "d"}', '{"data": "d", "output": "o", "stepz": 3}']
)
def test_unreadable_files_are_refused(tmp_path: Path, text: str):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ArgumentError):
        TrainConfig.load(path)


def test_differences_name_what_changes_the_numbers():
    old = TrainConfig(data="d", output="o")
    new = TrainConfig(data="e", output="p", progress=False, seed=4, steps=20)
    assert new.differences(old.to_dict()) == ["steps: 10000 -> 20", "seed: 0 -> 4"]
    assert old.differences(json.loads(json.dumps(old.to_dict()))) == []


def test_a_configuration_needs_no_torch(tmp_path: Path):
    """Unless ``import fastproto`` itself brings it."""
    code = (
        "import sys, fastproto; before = 'torch' in sys.modules\n"
        "import fastproto.training.config\n"
        "assert ('torch' in sys.modules) == before and 'scipy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classes", 3),
        ("holdout", "spleen"),
        ("holdout_cases", [1]),
        ("augment", "no"),
        ("encoder", "vgg"),
        ("mask_threshold", 1.0),
    ],
)
def test_values_of_a_wrong_type_are_refused_by_name(name, value):
    with pytest.raises(ArgumentError) as caught:
        TrainConfig(data="d", output="o", **{name: value})
    assert caught.value.subject == name
