# SPDX-License-Identifier: Apache-2.0
"""``fastproto train``: options reach the configuration, and a tiny run works and resumes."""

from __future__ import annotations

import pytest

from fastproto.cli import main
from fastproto.segmentation import load_model
from fastproto.training import TrainConfig


@pytest.fixture
def configs(monkeypatch) -> list[tuple[TrainConfig, bool]]:
    seen: list[tuple[TrainConfig, bool]] = []

    def train(config: TrainConfig, *, resume: bool = False) -> str:
        seen.append((config, resume))
        return config.output

    monkeypatch.setattr("fastproto.training.trainer.train", train)
    return seen


def test_options_reach_the_configuration(configs, capsys):
    arguments = ["--holdout-classes", "spleen", "9", "--holdout-cases", "ct_007", "--steps", "400"]
    arguments += ["--image-size", "128", "--device", "cpu", "--set", "cycle=0.5", "crop=false"]
    assert main(["train", "--data", "phantom", "--out", "run", *arguments]) == 0
    expected = TrainConfig(
        data="phantom",
        output="run",
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


def test_absent_options_keep_their_defaults(configs):
    assert main(["train", "--data", "phantom", "--out", "run"]) == 0
    assert configs == [(TrainConfig(data="phantom", output="run"), False)]


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


def test_a_tiny_run_and_its_continuation(phantom, tmp_path):
    run = tmp_path / "run"
    arguments = ["--data", str(phantom), "--holdout-classes", "spleen", "--holdout-cases", "mr_002"]
    arguments += ["--steps", "1", "--image-size", "64", "--encoder", "resnet18", "--device", "cpu"]
    settings = ["--set", "progress=false", "validation_episodes=0", "checkpoint_every=1"]
    assert main(["train", *arguments, *settings, "--out", str(run)]) == 0
    model = load_model(run)
    assert model.extra["preprocessing"]["image_size"] == 64
    assert main(["train", *arguments, "--out", str(run)]) == 2
    assert main(["train", "--resume", "--out", str(run)]) == 0
    assert load_model(run).fingerprint() == model.fingerprint()
