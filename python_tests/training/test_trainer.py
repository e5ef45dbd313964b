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
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastproto.training.trainer as trainer
from fastproto import _files
from fastproto.data import Preprocessing
from fastproto.data.phantom import write_phantom
from fastproto.errors import (
    ArgumentError,
    CheckpointError,
    OutputError,
    ResourceError,
    TrainingError,
)
from fastproto.nn import FewShotUNet
from fastproto.nn.weights import checksum, read_safetensors
from fastproto.training import TrainConfig, train
from fastproto.training.schedule import learning_rate

Configure = Callable[..., TrainConfig]


def weights(folder: Path, name: str = "state") -> str:
    return checksum(read_safetensors(folder / f"{name}.safetensors")[0])


def records(folder: Path, having: str = "step") -> list[dict]:
    """The records of the log that have such a number, without the times."""
    log = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in each.items() if k != "seconds"} for each in log if having in each]


class Killed(BaseException):
    """Stands in for a signal."""


def train_until_killed(
    config: TrainConfig, step: int, method: str = "step", resume: bool = False
) -> None:
    """Train, and die when ``method`` of the run is called for ``step``."""
    original = getattr(trainer._Run, method)

    def dying(self: object, now: int) -> object:
        if now == step:
            raise Killed
        return original(self, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._Run, method, dying)
        with pytest.raises(Killed):
            train(config, resume=resume)


@pytest.fixture(scope="module")
def reference(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    return train(configure(tmp_path_factory.mktemp("run") / "reference"))


def assert_same_run(folder: Path, reference: Path) -> None:
    assert weights(folder) == weights(reference)
    assert weights(folder, "model") == weights(reference, "model")
    assert records(folder) == records(reference)


def test_the_run_folder_has_a_log_and_a_model_ready_to_use(reference: Path, configure: Configure):
    assert {file.name for file in reference.iterdir()} == {
        "config.json", "log.jsonl", "model.safetensors", "state.safetensors", "supervoxels"
    }  # fmt: skip
    assert TrainConfig.load(reference / "config.json") == configure(reference)
    assert [r["step"] for r in records(reference, "loss")] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records(reference, "validation_dice")] == [4, 6]
    for record in records(reference, "loss"):
        total = record["ce"] + record["align"] + record["cycle"]
        assert record["loss"] == pytest.approx(total, rel=1e-5)
    extra = FewShotUNet.load(reference / "model.safetensors").extra
    assert extra["step"] == 6
    assert extra["preprocessing"].keys() == {"ct"}
    assert Preprocessing.from_dict(extra["preprocessing"]["ct"]).image_size == 32
    assert "spleen" in extra["holdout"].values()
    assert "spleen" not in extra["classes"].values()
    assert extra["training_cases"] == ["ct_000", "ct_001"]


def test_an_interrupted_run_ends_with_the_same_bits(
    configure: Configure, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By a loss that is not finite, and by death between the two files of a checkpoint."""
    run = tmp_path / "run"
    config = configure(run)
    read = trainer.read_training_data

    def poisoned(*args: object) -> object:
        data = read(*args)
        batch = data.training.batch

        def bad(indices: range) -> object:
            episode = batch(indices)
            if 4 in indices:
                episode.query_images[..., 5, 5] = math.nan
            return episode

        data.training.batch = bad
        return data

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "read_training_data", poisoned)
        with pytest.raises(TrainingError, match=r"^step 5: found loss nan.* episode 4: ") as caught:
            train(config)
    for part in (" slice ", "weights of step 3", str(run / "state.safetensors")):
        assert part in str(caught.value)
    assert FewShotUNet.load(run / "model.safetensors").extra["step"] == 3

    torch.rand(7)  # the random state outside must not matter
    train_until_killed(config, 6, "save_model", resume=True)
    assert weights(run) == weights(reference)
    assert weights(run, "model") != weights(reference, "model")
    (run / f"{_files._OURS}abc").mkdir()
    train(config, resume=True)
    assert_same_run(run, reference)
    assert not list(run.glob(".partial-*"))


def test_kill_minus_nine_at_a_random_time(configure: Configure, reference: Path, tmp_path: Path):
    """With a checkpoint at every step, most of the time goes into writing one."""
    run = tmp_path / "run"
    config = configure(run, checkpoint_every=1)
    code = (
        "import sys, json, torch; from fastproto.training import TrainConfig, train\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "from fastproto.nn.encoders.registry import ENCODERS, Entry\n"
        "from support.tiny_encoder import TinyEncoder; ENCODERS['tiny'] = Entry(TinyEncoder)\n"
        "from fastproto.training.log import RunLog; write = RunLog.write\n"
        "RunLog.write = lambda *a, **k: (write(*a, **k), print('step', flush=True))\n"
        "train(TrainConfig.from_dict(json.loads(sys.argv[1])))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(config.to_dict())],
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert process.stdout is not None
    for _ in range(random.randint(1, 4)):  # far enough from the end
        assert process.stdout.readline() == b"step\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=random.uniform(0, 0.1))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert 0 <= read_safetensors(run / "state.safetensors")[1]["metadata"]["step"] < 6
    train(configure(run), resume=True)
    assert_same_run(run, reference)


def test_a_run_without_labels_that_died_before_its_first_checkpoint_begins_again(
    configure: Configure, phantom: Path, tmp_path: Path
):
    run = tmp_path / "run"
    config = configure(run, data=str(phantom / "images"), steps=1, holdout=(), validation_cases=())
    train_until_killed(config, 0, "checkpoint")
    assert not (run / "state.safetensors").exists()
    train(config, resume=True)
    (record,) = records(run)
    assert record["step"] == 1
    assert record["loss"] > 0
    assert FewShotUNet.load(run / "model.safetensors").extra["classes"] == {}


def test_a_longer_run_begins_its_schedule_anew_where_it_goes_on(
    configure: Configure, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    runs = [tmp_path / name for name in ("whole", "killed")]
    for run in runs:
        shutil.copytree(reference, run)
    train(configure(runs[0], steps=10, progress=True), resume=True)
    assert "10 steps in all, warm-up and schedule anew from step 6" in capsys.readouterr().err
    log = records(runs[0], "loss")
    assert log[:6] == records(reference, "loss")
    assert [record["step"] for record in log[6:]] == [7, 8, 9, 10]
    config = configure(runs[0])
    for done, record in enumerate(log[6:], start=1):
        assert record["learning_rate"] == pytest.approx(learning_rate(config, done / 4))
    assert records(runs[0], "schedule_from") == [{"step": 7, "schedule_from": 6, "steps": 10}]
    # Killed before its first checkpoint it begins there again; killed later it goes on.
    train_until_killed(configure(runs[1], steps=10), 8, resume=True)
    train_until_killed(TrainConfig.load(runs[1] / "config.json"), 10, resume=True)
    train(TrainConfig.load(runs[1] / "config.json"), resume=True)
    assert_same_run(runs[1], runs[0])
    for fewer in ({"steps": 9}, {"steps": 10, "minutes": 1.0}):
        with pytest.raises(CheckpointError, match=r"steps: 10 -> 9|minutes: None -> 1\.0"):
            train(configure(runs[0], **fewer), resume=True)


def test_more_minutes_begin_the_schedule_anew_too(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ticks = itertools.count(step=10.0)  # a step is ten seconds
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    config = configure(tmp_path, minutes=0.5, steps=1000, label_fraction=1.0)
    train(config)
    assert len(records(tmp_path, "loss")) == 3
    longer = dataclasses.replace(config, minutes=1.0)
    train(longer, resume=True)
    log = records(tmp_path, "loss")
    assert len(log) == 6
    for done, record in enumerate(log[3:]):
        share = max(done / 3, (done + 1) / 997)
        assert record["learning_rate"] == pytest.approx(learning_rate(config, share))
    with pytest.raises(CheckpointError, match=r"minutes: 1.0 -> 0.5"):
        train(config, resume=True)


def test_one_process_trains_in_a_folder(configure: Configure, reference: Path, tmp_path: Path):
    run = tmp_path / "run"
    config = configure(run, checkpoint_every=1)
    original = trainer._Run.step

    def step(self: object, now: int) -> float:
        for resume in (False, True):
            with pytest.raises(OutputError, match=f"{run}: found that another process"):
                train(config, resume=resume)
        return original(self, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._Run, "step", step)
        train(config)
    assert_same_run(run, reference)
    assert not list(run.glob(".partial-*"))


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "2.00 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes"),
         "12 bytes"),
        (MemoryError("Unable to allocate 22.4 GiB for an array"), "22.4 GiB"),
    ],
)  # fmt: skip
def test_a_lack_of_memory_ends_the_run_with_what_to_change(
    configure: Configure, reference: Path, tmp_path: Path, error: Exception, wanted: str
):
    run = tmp_path / "run"

    def fail(self: object, now: int) -> float:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._Run, "step", fail)
        with pytest.raises(ResourceError, match=f"{wanted} were wanted.* smaller batch"):
            train(configure(run))
        patch.setattr(trainer._Run, "step", lambda *_: 1 / 0)  # a bug stays one
        with pytest.raises(ZeroDivisionError):
            train(configure(run), resume=True)
    train(configure(run, recompute="on"), resume=True)
    assert weights(run) == weights(reference)


def test_a_run_is_neither_overwritten_nor_resumed_as_another(
    configure: Configure, reference: Path, tmp_path: Path
):
    before = weights(reference)
    with pytest.raises(OutputError, match="a training run"):
        train(configure(reference))
    train(configure(reference), resume=True)  # nothing left to do
    with pytest.raises(CheckpointError, match=r"batch: 1 -> 2; learning_rate: 0.001 -> 0.5"):
        train(configure(reference, learning_rate=0.5, batch=2), resume=True)
    other = write_phantom(tmp_path / "other", patients=4, shape=(16, 64, 64))
    with pytest.raises(CheckpointError, match="other cases or slices"):
        train(configure(reference, data=str(other)), resume=True)
    assert weights(reference) == before
    with pytest.raises(CheckpointError, match="no training run"):
        train(configure(tmp_path / "absent"), resume=True)


def test_batches_ways_shots_bfloat16_the_bar_and_steps_before_the_minutes_are_up(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = configure(
        tmp_path, steps=1, minutes=60.0, batch=2, ways=2, shots=2, queries=2,
        precision="bfloat16", output_stride=8, label_fraction=0.5, progress=True,
    )  # fmt: skip
    train(config)
    (record,) = records(tmp_path, "loss")
    assert math.isfinite(record["loss"])
    assert record["learning_rate"] == pytest.approx(1e-3 * 0.01)  # that of the last step
    bar = capsys.readouterr().err
    for part in ("loss=", "validation_dice=", "/60"):
        assert part in bar


def test_it_says_in_a_line_what_it_does(
    configure: Configure,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(trainer._Run, "go", lambda *_: None)
    config = configure(tmp_path, progress=True, minutes=2.5, classes=("liver", "spine"))
    train(config)
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if "learning" in line)
    assert line.split("fastproto: ")[1] == (
        "learning from 2 scans without labels (supervoxels) and, in 2, from the labels of liver, "
        "spine; tiny, output stride 16, images of 32 pixels, 1 episodes a step, 2.5 minutes on cpu"
    )
    assert "small enough for a CPU" not in said
    train(dataclasses.replace(config, encoder="auto", device="cpu", label_fraction=0.0))
    said = capsys.readouterr().err
    assert "fastproto: learning from 2 scans without labels (supervoxels); resnet18" in said
    assert "small enough for a CPU were chosen; encoder and image_size" in said


def test_minutes_end_the_run_and_its_schedule_across_a_death(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every look at the clock is ten seconds after the last; a step looks twice."""
    ticks = itertools.count(step=10.0)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    config = configure(tmp_path, minutes=1.0, steps=1000, label_fraction=1.0)
    train_until_killed(config, 5)
    train(config, resume=True)
    log = records(tmp_path, "loss")
    assert [record["step"] for record in log] == [1, 2, 3, 4, 5, 6]
    for record in log:
        done = max((record["step"] - 1) / 6, record["step"] / 1000)
        assert record["learning_rate"] == pytest.approx(learning_rate(config, done))
    assert records(tmp_path)[-1].keys() == {"step", "validation_dice"}
    assert FewShotUNet.load(tmp_path / "model.safetensors").extra["step"] == 6
    train(config, resume=True)  # the time is up
    assert records(tmp_path, "loss") == log


def test_a_model_to_go_on_from(
    configure: Configure, phantom: Path, reference: Path, tmp_path: Path
):
    """It decides on the network; data of another modality may be new to it."""
    run = tmp_path / "run"
    mr = write_phantom(tmp_path / "mr", patients=1, modality="mr", shape=(16, 64, 64))
    config = configure(
        run, data=(str(phantom), str(mr)), start=str(reference), steps=1,
        encoder="auto", image_size=64, output_stride=8, temperature=1.0, plane="coronal",
    )  # fmt: skip
    train_until_killed(config, 1)
    assert weights(run, "model") == weights(reference, "model")
    train(config, resume=True)
    old, new = (FewShotUNet.load(folder / "model.safetensors") for folder in (reference, run))
    assert new.config == old.config
    assert new.extra["step"] == 1
    assert new.extra["preprocessing"]["ct"] == old.extra["preprocessing"]["ct"]
    assert new.extra["preprocessing"]["mr"]["image_size"] == 32
    written = TrainConfig.load(run / "config.json")
    assert (written.encoder, written.image_size, written.output_stride) == ("tiny", 32, 16)
    assert written.plane == "axial"
    assert records(run)[0]["loss"] != records(reference)[0]["loss"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (None, "no such file"),
        ({"by": "someone"}, "no usable preprocessing"),
        ({"preprocessing": "mr"}, "no usable preprocessing"),
        ({"preprocessing": {"mr": {"image_size": 32}}}, "no usable preprocessing"),
    ],
)
def test_a_model_to_go_on_from_exists_and_says_how_it_wants_its_scans(
    configure: Configure, tmp_path: Path, extra: dict[str, object] | None, message: str
):
    path = tmp_path / "foreign.safetensors"
    if extra is not None:
        FewShotUNet("tiny").save(path, extra)
    with pytest.raises(CheckpointError, match=message):
        train(configure(tmp_path / "run", start=str(path)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["tpu9", "cuda:77"])
def test_an_unknown_device_is_named(configure: Configure, tmp_path: Path, device: str):
    with pytest.raises(ArgumentError, match=device):
        train(configure(tmp_path, device=device))
