# SPDX-License-Identifier: Apache-2.0
"""Runs are resumable to the bit, stop on numbers that are not finite, and leave a usable model."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastproto.training.trainer as trainer
from fastproto.data import Preprocessing
from fastproto.data.phantom import write_phantom
from fastproto.errors import (
    ArgumentError,
    CheckpointError,
    InputError,
    OutputError,
    TrainingError,
)
from fastproto.nn import FewShotUNet
from fastproto.nn.weights import checksum, read_safetensors
from fastproto.training import TrainConfig, train
from fastproto.training.episodes import episode_generator
from fastproto.training.trainer import episode_dice, learning_rate

STEPS = 6


def configure(phantom: Path, output: Path, **changes: object) -> TrainConfig:
    """Both sources, all losses, validation; small enough for a quarter of a second a step."""
    config = TrainConfig(
        data=str(phantom),
        output=str(output),
        holdout=("spleen",),
        validation_cases=("ct_002",),
        label_fraction=0.6,
        min_pixels=5,
        image_size=32,
        encoder="resnet18",
        output_stride=16,
        align=1.0,
        cycle=1.0,
        batch=1,
        steps=STEPS,
        warmup_fraction=0.2,
        precision="float32",
        checkpoint_every=3,
        validate_every=4,
        validation_episodes=2,
        progress=False,
    )
    return dataclasses.replace(config, **changes)


def weights(folder: Path, name: str = "state") -> str:
    return checksum(read_safetensors(folder / f"{name}.safetensors")[0])


def records(folder: Path) -> list[dict]:
    """The log without the times."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


class Killed(BaseException):
    """Stands in for a signal."""


def train_until_killed(config: TrainConfig, step: int, method: str = "step") -> None:
    """Train, and die when ``method`` of the run is called for ``step``."""
    original = getattr(trainer._Run, method)

    def dying(self: object, now: int) -> object:
        if now == step:
            raise Killed
        return original(self, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._Run, method, dying)
        with pytest.raises(Killed):
            train(config)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run folder that does not outlive its test: a state has 170 MB."""
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.fixture(scope="module")
def reference(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that nothing interrupted."""
    folder = train(configure(phantom, tmp_path_factory.mktemp("run") / "reference"))
    yield folder
    shutil.rmtree(folder)


def assert_same_run(folder: Path, reference: Path) -> None:
    assert weights(folder) == weights(reference)
    assert weights(folder, "model") == weights(reference, "model")
    assert records(folder) == records(reference)


def test_the_run_folder(reference: Path, phantom: Path):
    assert {file.name for file in reference.iterdir()} == {
        "config.json", "log.jsonl", "model.safetensors", "state.safetensors", "supervoxels"
    }  # fmt: skip
    assert TrainConfig.load(reference / "config.json") == configure(phantom, reference)
    log = records(reference)
    assert [r["step"] for r in log if "loss" in r] == list(range(1, STEPS + 1))
    assert [r["step"] for r in log if "validation_dice" in r] == [4, STEPS]
    for record in log:
        if "loss" in record:
            total = record["ce"] + record["align"] + record["cycle"]
            assert record["loss"] == pytest.approx(total, rel=1e-5)


def test_the_model_is_ready_to_use(reference: Path):
    model = FewShotUNet.load(reference / "model.safetensors")
    assert model.extra["step"] == STEPS
    assert model.extra["preprocessing"].keys() == {"ct"}
    assert Preprocessing.from_dict(model.extra["preprocessing"]["ct"]).image_size == 32
    assert "spleen" in model.extra["holdout"].values()
    assert "spleen" not in model.extra["classes"].values()
    assert model.extra["training_cases"] == ["ct_000", "ct_001"]


def test_three_and_three_steps_are_six(phantom: Path, reference: Path, run: Path):
    config = configure(phantom, run)
    train_until_killed(config, 5)
    assert FewShotUNet.load(run / "model.safetensors").extra["step"] == 3
    torch.rand(7)  # the random state outside must not matter
    train(config, resume=True)
    assert_same_run(run, reference)


def test_death_between_the_two_files_of_a_checkpoint(phantom: Path, reference: Path, run: Path):
    config = configure(phantom, run)
    train_until_killed(config, STEPS, "save_model")
    assert weights(run) == weights(reference)
    assert weights(run, "model") != weights(reference, "model")
    (run / ".partial-abc.safetensors").write_bytes(b"left behind")
    train(config, resume=True)
    assert_same_run(run, reference)
    assert not list(run.glob(".partial-*"))


def test_kill_minus_nine_at_a_random_time(phantom: Path, reference: Path, run: Path):
    """With a checkpoint at every step, most of the time goes into writing one."""
    config = configure(phantom, run, checkpoint_every=1)
    code = (
        "import sys, json, torch; from fastproto.training import TrainConfig, train\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "from fastproto.training.log import RunLog; write = RunLog.write\n"
        "RunLog.write = lambda *a, **k: (write(*a, **k), print('step', flush=True))\n"
        "train(TrainConfig.from_dict(json.loads(sys.argv[1])))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(config.to_dict())],
        stdout=subprocess.PIPE,
        cwd=run.parent,  # not the sources: the installed package, as in this process
    )
    assert process.stdout is not None
    for _ in range(random.randint(1, 4)):  # far enough from the end
        assert process.stdout.readline() == b"step\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=random.uniform(0, 0.3))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    step = read_safetensors(run / "state.safetensors")[1]["metadata"]["step"]
    assert 0 <= step < STEPS
    train(config, resume=True)
    assert_same_run(run, reference)


def test_death_before_the_first_checkpoint_begins_again(phantom: Path, run: Path):
    config = configure(phantom, run, steps=1)
    train_until_killed(config, 0, "checkpoint")
    assert not (run / "state.safetensors").exists()
    train(config, resume=True)
    assert [record["step"] for record in records(run)] == [1, 1]


def test_a_loss_that_is_not_finite_stops_the_run(
    phantom: Path, reference: Path, run: Path, monkeypatch: pytest.MonkeyPatch
):
    config = configure(phantom, run)
    with monkeypatch.context() as patch:
        original = trainer.read_training_data

        def poisoned(*args: object) -> object:
            data = original(*args)
            batch = data.training.batch

            def bad(indices: range) -> object:
                episode = batch(indices)
                if 4 in indices:
                    episode.query_images[..., 5, 5] = math.nan
                return episode

            data.training.batch = bad
            return data

        patch.setattr(trainer, "read_training_data", poisoned)
        with pytest.raises(TrainingError, match=r"^step 5: found loss nan.* episode 4: ") as caught:
            train(config)
    message = str(caught.value)
    assert " slice " in message
    assert "weights of step 3" in message
    assert str(run / "state.safetensors") in message
    FewShotUNet.load(run / "model.safetensors")
    train(config, resume=True)
    assert_same_run(run, reference)


def test_another_configuration_cannot_resume(phantom: Path, reference: Path):
    config = configure(phantom, reference, learning_rate=0.5, batch=2)
    with pytest.raises(CheckpointError, match=r"batch: 1 -> 2; learning_rate: 0.001 -> 0.5"):
        train(config, resume=True)


def test_other_data_cannot_resume(phantom: Path, reference: Path, tmp_path: Path):
    moved = tmp_path / "moved"
    shutil.copytree(phantom, moved)
    description = json.loads((moved / "dataset.json").read_text())
    description["cases"] = description["cases"][1:]
    for folder in ("images", "labels"):
        (moved / folder / "ct_000.nii.gz").unlink()
    (moved / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="other cases or slices"):
        train(configure(moved, reference), resume=True)


def test_a_finished_run_is_not_overwritten(phantom: Path, reference: Path, tmp_path: Path):
    before = weights(reference)
    with pytest.raises(OutputError, match="a training run"):
        train(configure(phantom, reference))
    train(configure(phantom, reference), resume=True)  # nothing left to do
    assert weights(reference) == before
    with pytest.raises(CheckpointError, match="no training run"):
        train(configure(phantom, tmp_path / "absent"), resume=True)


def test_batches_ways_shots_bfloat16_and_the_bar(
    phantom: Path, run: Path, capsys: pytest.CaptureFixture[str]
):
    config = configure(
        phantom, run, steps=1, batch=2, ways=2, shots=2, queries=2, precision="bfloat16",
        output_stride=8, label_fraction=0.5, progress=True,
    )  # fmt: skip
    train(config)
    assert math.isfinite(records(run)[0]["loss"])
    bar = capsys.readouterr().err
    assert "loss=" in bar
    assert "validation_dice=" in bar


def test_it_says_in_a_line_what_it_does(
    phantom: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trainer._Run, "go", lambda *_: None)
    config = configure(phantom, run, progress=True, minutes=2.5, classes=("liver", "spine"))
    train(config)
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if "learning" in line)
    assert line.split("fastproto: ")[1] == (
        "learning from 2 scans without labels (supervoxels) and, in 2, from the labels of liver, "
        "spine; resnet18, output stride 16, images of 32 pixels, 1 episodes a step, 2.5 minutes "
        "on cpu"
    )
    assert "small enough for a CPU" not in said
    train(dataclasses.replace(config, encoder="auto", device="cpu", label_fraction=0.0))
    said = capsys.readouterr().err
    assert "fastproto: learning from 2 scans without labels (supervoxels); resnet18" in said
    assert "small enough for a CPU were chosen; encoder and image_size" in said


def without_labels(phantom: Path, folder: Path) -> Path:
    """The phantom's images alone, without a word about labels."""
    shutil.copytree(phantom / "images", folder / "images")
    description = json.loads((phantom / "dataset.json").read_text())
    del description["labels"]
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def test_no_label_is_needed(phantom: Path, run: Path, tmp_path: Path):
    data = without_labels(phantom, tmp_path / "data")
    train(configure(data, run, steps=1, holdout=(), validation_cases=()))
    (record,) = records(run)
    assert record["loss"] > 0
    assert FewShotUNet.load(run / "model.safetensors").extra["classes"] == {}


def test_no_label_is_looked_at_without_their_share(phantom: Path, run: Path, tmp_path: Path):
    shutil.copytree(phantom, tmp_path / "data")
    for label in (tmp_path / "data" / "labels").iterdir():
        label.write_bytes(b"nobody reads this")
    config = configure(tmp_path / "data", run, label_fraction=0.0, validation_cases=())
    data = trainer.read_training_data(config)
    assert data.validation is None
    assert all("supervoxel" in data.training.episode(i).description for i in range(10))
    assert data.extra["classes"] == {}


def test_labels_have_their_share_of_the_episodes(phantom: Path, run: Path):
    for share in (0.3, 1.0):
        config = configure(phantom, run, label_fraction=share)
        source = trainer.read_training_data(config).training
        drawn = [source.draw(episode_generator(0, i)).description for i in range(200)]
        found = sum("class " in text for text in drawn) / 200
        assert found == pytest.approx(share, abs=0.1)


def test_several_data_sets_of_both_modalities(phantom: Path, run: Path, tmp_path: Path):
    """One with labels, one without, and a plain folder of a single scan."""
    mr = write_phantom(tmp_path / "mr", patients=3, modality="mr", shape=(16, 64, 64))
    bare = without_labels(mr, tmp_path / "bare")
    plain = tmp_path / "plain"
    plain.mkdir()
    shutil.copy(phantom / "images" / "ct_001.nii.gz", plain / "one.nii.gz")
    folders = tuple(map(str, (phantom, bare, plain)))
    config = configure(phantom, run, data=folders, holdout_cases=("ct_001", "mr_000"))
    data = trainer.read_training_data(config)
    assert data.slices.keys() == {"0/ct_000", "1/mr_001", "1/mr_002", "2/one"}
    assert data.extra["preprocessing"].keys() == {"ct", "mr"}
    assert data.extra["preprocessing"]["ct"]["mean"] is not None
    assert data.extra["training_cases"] == ["ct_000", "mr_001", "mr_002", "one"]
    assert data.summary.startswith("learning from 4 scans without labels (supervoxels) and, in 1")
    drawn = [data.training.draw(episode_generator(0, i)).description for i in range(300)]
    for case, share in (("ct_", 1 / 3), ("mr_", 1 / 3), ("one", 1 / 3)):
        found = sum(f"support {case}" in text for text in drawn) / 300
        assert found == pytest.approx(share, abs=0.09), case
    assert all("support ct_" in text for text in drawn if "class " in text)
    assert "ct_002" in data.validation.episode(0).description


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"holdout": ("spleen", "heart")}, "heart"),
        ({"classes": ("heart",)}, "heart"),
        ({"classes": ("spleen", "liver")}, "base classes"),
        ({"holdout_cases": ("ct_9",)}, "no case ct_9"),
        ({"validation_cases": ("ct_9",)}, "no case ct_9"),
        ({"holdout_cases": ("ct_000", "ct_001")}, "no case left"),
    ],
)
def test_unknown_classes_and_cases_are_named(
    phantom: Path, tmp_path: Path, changes: dict, message: str
):
    config = configure(phantom, tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        trainer.read_training_data(config)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is ten seconds after the last; a step looks twice."""
    ticks = itertools.count(step=10.0)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))


@pytest.mark.usefixtures("clock")
def test_minutes_end_the_run_and_its_schedule(phantom: Path, run: Path):
    config = configure(phantom, run, minutes=1.0, steps=1000, label_fraction=1.0)
    train(config)
    log = [record for record in records(run) if "loss" in record]
    assert [record["step"] for record in log] == [1, 2, 3, 4, 5, 6]
    for record in log:
        done = max((record["step"] - 1) / 6, record["step"] / 1000)
        assert record["learning_rate"] == pytest.approx(learning_rate(config, done))
    assert records(run)[-1].keys() == {"step", "validation_dice"}
    assert FewShotUNet.load(run / "model.safetensors").extra["step"] == 6
    train(config, resume=True)  # the time is up
    assert [record for record in records(run) if "loss" in record] == log


@pytest.mark.usefixtures("clock")
def test_minutes_go_on_from_a_checkpoint(phantom: Path, run: Path):
    config = configure(phantom, run, minutes=1.0, steps=1000, label_fraction=1.0)
    train_until_killed(config, 5)
    train(config, resume=True)
    steps = [record["step"] for record in records(run) if "loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("clock")
def test_steps_may_end_before_the_minutes(phantom: Path, run: Path):
    train(configure(phantom, run, minutes=60.0, steps=2, label_fraction=1.0))
    rates = [record["learning_rate"] for record in records(run) if "loss" in record]
    assert len(rates) == 2
    assert rates[-1] == pytest.approx(1e-3 * 0.01)


def test_a_model_to_go_on_from(phantom: Path, reference: Path, run: Path, tmp_path: Path):
    """It decides on the network; data of another modality may be new to it."""
    mr = write_phantom(tmp_path / "mr", patients=1, modality="mr", shape=(16, 64, 64))
    config = configure(
        phantom, run, data=(str(phantom), str(mr)), start=str(reference), steps=4,
        encoder="auto", image_size=64, output_stride=8, temperature=1.0, plane="coronal",
    )  # fmt: skip
    train_until_killed(config, 1)
    assert weights(run, "model") == weights(reference, "model")
    train(config, resume=True)
    old, new = (FewShotUNet.load(folder / "model.safetensors") for folder in (reference, run))
    assert new.config == old.config
    assert new.extra["step"] == 4
    assert new.extra["preprocessing"]["ct"] == old.extra["preprocessing"]["ct"]
    assert new.extra["preprocessing"]["mr"]["image_size"] == 32
    written = TrainConfig.load(run / "config.json")
    assert (written.encoder, written.image_size, written.output_stride) == ("resnet18", 32, 16)
    assert written.plane == "axial"
    assert records(run)[0]["loss"] != records(reference)[0]["loss"]


def test_a_model_to_go_on_from_must_exist(phantom: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such file"):
        train(configure(phantom, tmp_path / "run", start=str(tmp_path / "absent")))


@pytest.mark.parametrize(
    "extra",
    [{"by": "someone"}, {"preprocessing": "mr"}, {"preprocessing": {"mr": {"image_size": 32}}}],
)
def test_a_model_to_go_on_from_says_how_it_wants_its_scans(
    phantom: Path, tmp_path: Path, extra: dict[str, object]
):
    FewShotUNet("resnet18").save(tmp_path / "foreign.safetensors", extra)
    with pytest.raises(CheckpointError, match="no usable preprocessing"):
        train(configure(phantom, tmp_path / "run", start=str(tmp_path / "foreign.safetensors")))
    assert not (tmp_path / "run").exists()


def test_setting_two_drops_slices_with_held_out_classes(phantom: Path, tmp_path: Path):
    kept = {}
    for drop in (False, True):
        config = configure(phantom, tmp_path, drop_excluded_slices=drop)
        kept[drop] = trainer.read_training_data(config).slices
    assert kept[True].keys() == kept[False].keys()
    for case, slices in kept[True].items():
        assert set(slices) < set(kept[False][case])


def test_validation_is_the_same_for_every_seed(phantom: Path, tmp_path: Path):
    first, second = (
        trainer.read_training_data(configure(phantom, tmp_path, seed=seed)).validation
        for seed in (0, 1)
    )
    assert first is not None
    assert second is not None
    episode = first.episode(0)
    assert torch.equal(episode.query_images, second.episode(0).query_images)
    assert "ct_002" in episode.description
    assert "ct_000" not in episode.description


def test_the_learning_rate_rises_and_falls():
    config = TrainConfig(data="d", output="o", warmup_fraction=0.1, learning_rate=2.0)
    rates = [learning_rate(config, step / 100) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == 2.0
    assert rates[54] == pytest.approx(2.0 * (0.01 + 0.99 * 0.5))
    assert rates[-1] == pytest.approx(0.02)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert learning_rate(config, 1.2) == pytest.approx(0.02)


def test_episode_dice():
    target = torch.tensor([0, 0, 1, 1, 2, 2]).view(1, 1, 1, 6)
    predicted = torch.tensor([0, 1, 1, 1, 0, 0]).view(1, 1, 1, 6)
    logits = torch.nn.functional.one_hot(predicted, 4).movedim(-1, 2).float()
    assert episode_dice(logits, target) == pytest.approx((4 / 5 + 0) / 2)
    assert math.isnan(episode_dice(logits, torch.zeros_like(target)))


def test_an_unknown_device_is_named(phantom: Path, tmp_path: Path):
    for device in ("tpu9", "cuda:77"):
        with pytest.raises(ArgumentError, match=device):
            train(configure(phantom, tmp_path, device=device))


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "holdout"), [("ixi_brain_mr", (4, 6, 7, 8)), ("openkbp_hn_ct", (1, 2))]
)
def test_episodes_of_real_scans(
    test_data: Path, tmp_path: Path, name: str, holdout: tuple[int, ...]
):
    data = test_data / name
    cases = json.loads((data / "dataset.json").read_text())["cases"]
    config = configure(
        data, tmp_path, holdout=holdout, image_size=128, holdout_cases=tuple(cases[5:]),
        validation_cases=tuple(cases[3:5]), validation_episodes=1,
    )  # fmt: skip
    read = trainer.read_training_data(config)
    assert read.slices.keys() == {f"0/{case}" for case in cases[:3]}
    assert read.validation is not None
    for episode in (read.training.batch(range(8)), read.validation.batch(range(8))):
        assert episode.support_images.isfinite().all()
        assert episode.support_images.abs().max() < 20
        assert (episode.support_masks == 1).flatten(1).sum(1).min() > 0
    assert (episode.query_masks == 1).flatten(1).sum(1).min() > 0
