# SPDX-License-Identifier: Apache-2.0
"""The configuration goes to JSON and back, refuses what makes no sense, and tells runs apart."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from fastproto.errors import ArgumentError
from fastproto.training.config import NETWORK, TrainConfig


def test_json_round_trip(tmp_path: Path):
    config = TrainConfig(
        data=[str(tmp_path / "a"), "b"], output="run", holdout=["liver", 3],
        validation_cases=("a",), ways=2, minutes=1.5, start=tmp_path / "model.safetensors",
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert TrainConfig.load(tmp_path / "config.json") == config
    assert config.holdout == ("liver", 3)
    assert config.start == str(tmp_path / "model.safetensors")


@pytest.mark.parametrize("data", ["scans", Path("scans"), ["scans"], ("scans",)])
def test_one_folder_of_scans_may_stand_alone(data: object):
    assert TrainConfig(data=data, output="o").data == ("scans",)


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("steps", 1.5), ("steps", True), ("ways", 0), ("batch", -1),
     ("learning_rate", 0), ("learning_rate", math.nan), ("clip_norm", 0), ("ce", -1),
     ("label_fraction", 1.1), ("absent_fraction", -0.1), ("mask_threshold", -0.1), ("gap", -1),
     ("plane", "oblique"), ("precision", "float16"), ("seed", -1), ("min_pixels", 0),
     ("temperature", "warm"), ("minutes", 0), ("minutes", math.inf), ("minutes", "ten"),
     ("image_size", 0), ("image_size", "large"), ("output_stride", 32), ("store_size", 0),
     ("data", ()), ("data", [1]), ("classes", 3), ("holdout", "spleen"), ("holdout_cases", [1]),
     ("augment", "no"), ("all_planes", 1), ("encoder", "vgg"), ("mask_threshold", 1.0)],
)  # fmt: skip
def test_values_out_of_range_or_of_a_wrong_type_are_named(name: str, value: object):
    with pytest.raises(ArgumentError, match=f"^{name}: found "):
        TrainConfig(**{"data": "d", "output": "o", name: value})


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


@pytest.mark.parametrize(
    ("gpu", "network"), [(True, ("resnet34", 256)), (False, ("resnet18", 128))]
)
def test_auto_suits_the_device(gpu: bool, network: tuple[str, int]):
    config = TrainConfig(data="d", output="o")
    assert (config.encoder, config.image_size, config.output_stride) == ("auto", "auto", 8)
    found = config.resolved(gpu=gpu)
    assert (found.encoder, found.image_size) == network
    assert found.resolved(gpu=not gpu) == found
    chosen = TrainConfig(data="d", output="o", encoder="resnet50", output_stride=16, image_size=64)
    assert chosen.resolved(gpu=gpu) == chosen


def test_differences_name_what_changes_the_numbers():
    old = TrainConfig(data="d", output="o")
    new = TrainConfig(data="e", output="p", progress=False, seed=4, steps=20)
    assert new.differences(old.to_dict()) == ["steps: 5000 -> 20", "seed: 0 -> 4"]
    assert old.differences(json.loads(json.dumps(old.to_dict()))) == []


def test_an_option_that_an_older_run_did_not_have_is_none_where_it_is_not_used():
    older = TrainConfig(data="d", output="o").to_dict()
    del older["align"], older["encoder"]
    assert TrainConfig(data="d", output="o").differences(older) == []
    assert TrainConfig(data="d", output="o", encoder="resnet18").differences(older) == [
        "encoder: 'auto' -> 'resnet18'"
    ]


def test_a_model_to_go_on_from_decides_on_the_network():
    old = TrainConfig(data="d", output="o", start="base")
    new = TrainConfig(data="d", output="o", start="base", encoder="resnet50", image_size=64)
    assert new.differences(old.to_dict()) == []
    fresh = TrainConfig(data="d", output="o", encoder="resnet50", image_size=64)
    assert [text.split(":")[0] for text in fresh.differences(old.to_dict())] == [
        "image_size", "encoder", "start"
    ]  # fmt: skip
    assert set(NETWORK) >= {"image_size", "encoder"}


def test_a_configuration_needs_no_torch(tmp_path: Path):
    """Unless ``import fastproto`` itself brings it."""
    code = (
        "import sys, fastproto; before = 'torch' in sys.modules\n"
        "import fastproto.training.config\n"
        "assert ('torch' in sys.modules) == before and 'scipy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_every_option_describes_itself():
    documented = TrainConfig.__doc__.split("Args:")[1]
    for option in fields(TrainConfig):
        assert f"\n    {option.name}: {option.metadata['help']}" in documented
        assert option.default is MISSING or option.metadata["allowed"].holds(option.default)
