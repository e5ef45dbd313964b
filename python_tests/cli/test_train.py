# SPDX-License-Identifier: Apache-2.0
"""``fastproto train``: options reach the configuration, and a tiny run works and resumes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from fastproto.cli import main
from fastproto.segmentation import load_model
from fastproto.training import TrainConfig
from fastproto.training.config import Allowed, Option


@pytest.fixture
def configs(monkeypatch) -> list[tuple[TrainConfig, bool]]:
    seen: list[tuple[TrainConfig, bool]] = []

    def train(config: TrainConfig, *, resume: bool = False) -> str:
        seen.append((config, resume))
        return config.output

    monkeypatch.setattr("fastproto.training.train", train)
    return seen


def test_options_reach_the_configuration(configs, capsys):
    arguments = ["--holdout-classes", "spleen", "9", "--holdout-cases", "ct_007", "--steps", "400"]
    arguments += ["--image-size", "128", "--device", "cpu", "--set", "cycle=0.5", "crop=false"]
    arguments += ["--model", "base", "--batch", "3", "--label-fraction", "0.25"]
    assert main(["train", "--data", "phantom", "scans", "--out", "run", *arguments]) == 0
    expected = TrainConfig(
        data=("phantom", "scans"),
        output="run",
        start="base",
        batch=3,
        label_fraction=0.25,
        holdout=("spleen", 9),
        holdout_cases=("ct_007",),
        steps=400,
        image_size=128,
        device="cpu",
        cycle=0.5,
        crop=False,
    )
    assert configs == [(expected, False)]
    assert capsys.readouterr().out.startswith("run: model.safetensors")


def test_absent_options_keep_their_defaults_and_minutes_stand_for_steps(configs):
    shared = ["train", "--data", "phantom", "--out", "run"]
    for more in ([], ["--minutes", "2.5"], ["--minutes", "2.5", "--steps", "7"]):
        assert main([*shared, *more]) == 0
    (absent, resume), (alone, _), (both, _) = configs
    assert (absent, resume) == (TrainConfig(data="phantom", output="run"), False)
    assert (alone.minutes, both.minutes) == (2.5, 2.5)
    assert alone.steps >= 10**6
    assert both.steps == 7


def test_help_tells_the_defaults_of_the_configuration(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    config = TrainConfig(data="d", output="o")
    options = ("steps", "batch", "learning-rate", "shots", "label-fraction", "image-size")
    for option in (*options, "plane", "encoder", "seed"):
        default = text.split(f" --{option} ")[-1].split("(default: ")[1].split(")")[0]
        assert default == str(getattr(config, option.replace("-", "_"))), option


def test_a_new_option_is_one_field(configs, monkeypatch, capsys):
    weight = Allowed("a number of at least 0", lambda x: x >= 0, {"type": float})
    option = Option(weight, "--dice WEIGHT", loss=True, help="weight of the Dice loss")

    @dataclass(frozen=True)
    class Extended(TrainConfig):
        dice: float = field(default=0.0, metadata=vars(option))

    monkeypatch.setattr("fastproto.cli.train.TrainConfig", Extended)
    shared = ["train", "--data", "phantom", "--out", "run", "--set", "ce=0"]
    assert main([*shared, "--dice", "0.5"]) == 0
    assert configs[0][0].to_dict()["dice"] == 0.5
    assert main([*shared, "--dice", "-1"]) == 2
    assert "dice: found -1.0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--dice WEIGHT         weight of the Dice loss (default: 0.0)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data"),
        (["--data", "d", "--set", "cycle"], "NAME=VALUE"),
        (["--data", "d", "--set", "no_such_field=1"], "no_such_field"),
        (["--data", "d", "--steps", "0"], "steps"),
        (["--resume"], "config.json"),
    ],
)
def test_unusable_options(arguments, message, configs, capsys, tmp_path):
    assert main(["train", "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not configs


def test_a_tiny_run_and_its_continuation(phantom, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["--data", str(phantom), "--holdout-classes", "spleen", "--holdout-cases", "mr_002"]
    arguments += ["--steps", "1", "--image-size", "64", "--device", "cpu"]
    arguments += ["--batch", "1"]
    settings = ["--set", "validation_episodes=0", "checkpoint_every=1"]
    assert main(["train", *arguments, *settings, "--out", str(run)]) == 0
    said = capsys.readouterr().err
    assert "fastproto: learning from 2 scans without labels (supervoxels) and, in 2, from" in said
    assert "small enough for a CPU" in said  # the encoder
    model = load_model(run)
    assert model.extra["preprocessing"]["mr"]["image_size"] == 64
    assert main(["train", *arguments, "--out", str(run)]) == 2
    assert main(["train", "--resume", "--out", str(run)]) == 0
    assert load_model(run).fingerprint() == model.fingerprint()
    onward = ["--data", str(phantom), "--model", str(run), "--steps", "1", "--batch", "1"]
    assert main(["train", *onward, "--device", "cpu", "--out", str(tmp_path / "next")]) == 0
    assert "small enough for a CPU" not in capsys.readouterr().err
    following = load_model(tmp_path / "next")
    assert following.config == model.config
    assert following.extra["preprocessing"] == model.extra["preprocessing"]
    assert following.fingerprint() != model.fingerprint()


@pytest.mark.parametrize(("more", "message"), [
    (["--classes", "liver", "dot"], "no label 'dot'"),
    (["--classes", "liver", "gallbladder", "--set", "min_pixels=3000"], "3000 pixels"),
    (["--classes", "liver", "--classes", "spleen", "--label-fraction", "0"], "liver, spleen,"),
    (["--holdout-classes", "Liver", "--holdout-classes", "spleen", "--classes", "LIVER"], "[1]"),
    (["--modality", "ct"], "modality: found ct; allowed: mr, as the data says"),
])  # fmt: skip
def test_what_is_asked_for_and_cannot_be_used_is_named(more, message, phantom, tmp_path, capsys):
    shared = ["train", "--data", str(phantom), "--out", str(tmp_path / "run"), "--steps", "1"]
    settings = ["--image-size", "64", "--device", "cpu", "--set", "validation_episodes=0"]
    assert main([*shared, *settings, *more]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("run/*.safetensors"))
