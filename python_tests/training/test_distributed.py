# SPDX-License-Identifier: Apache-2.0
"""Two processes train as one with a batch twice as large; they begin, end and fail together."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import support
import torch

from fastproto.errors import ArgumentError, FastprotoWarning, TrainingError
from fastproto.nn.weights import checksum, read_safetensors
from fastproto.training import TrainConfig
from fastproto.training.ranks import Ranks
from fastproto.training.resume import require_same_slices, saved_run

Configure = Callable[..., TrainConfig]
TINY = Path(support.__file__).parent / "train_tiny.py"
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
STEPS = 20


def start(*program: object, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """A program of Python in a folder."""
    paths = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        [sys.executable, *map(str, program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
    )


def start_tiny(
    config: TrainConfig, *more: str, ranks: int = 2, **environment: str
) -> subprocess.Popen[str]:
    """Training with the tiny encoder, in float64."""
    settings = [f"{k}={json.dumps(v)}" for k, v in config.to_dict().items() if k != "output"]
    words = [TINY, "train", "--out", config.output, "--set", *settings, *more]
    torchrun = TWO if ranks == 2 else []
    folder = Path(config.output).parent
    return start(*torchrun, *words, folder=folder, TINY_DOUBLE="1", **environment)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it said, where it ended well."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out, err


def fastproto_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("fastproto:")]


def records(folder: Path) -> list[dict]:
    log = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in each.items() if k != "seconds"} for each in log]


def weights(folder: Path) -> str:
    return checksum(read_safetensors(folder / "state.safetensors")[0])


@pytest.fixture(scope="module")
def settings(configure: Configure) -> Configure:
    """For a rank: batches of two, normalised over both ranks."""

    def make(output: Path, **changes: object) -> TrainConfig:
        options = {"batch": 2, "steps": STEPS, "sync_batch_norm": True, "device": "cpu"}
        options |= {"checkpoint_every": 5, "validate_every": 10}
        return configure(output, **options, **changes)

    return make


@pytest.fixture(scope="module")
def two(settings: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing interrupted."""
    run = tmp_path_factory.mktemp("two") / "run"
    out, _ = finish(start_tiny(settings(run)))
    assert out == f"{run}: model.safetensors, log.jsonl\n"  # of one rank
    return run


@pytest.fixture
def run(two: Path, tmp_path: Path) -> Path:
    """The folder of a new run on the same supervoxels."""
    folder = tmp_path / "run"
    shutil.copytree(two / "supervoxels", folder / "supervoxels")
    return folder


@pytest.mark.slow
def test_two_ranks_compute_what_one_process_does(two: Path, settings: Configure, run: Path) -> None:
    """All losses, the norm of the gradients, the weights and the statistics, to rounding."""
    finish(start_tiny(dataclasses.replace(settings(run), batch=4), ranks=1))
    assert len(records(run)) == STEPS + 2
    for found, want in zip(records(two), records(run), strict=True):
        assert found == pytest.approx(want, rel=1e-6), want["step"]
    assert {file.name for file in two.iterdir()} == {file.name for file in run.iterdir()}
    found, want = (read_safetensors(each / "state.safetensors")[0] for each in (two, run))
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.slow
def test_kill_minus_nine_of_a_rank_ends_all_and_the_run_goes_on(
    two: Path, settings: Configure, run: Path, tmp_path: Path
) -> None:
    """With two ranks bit for bit; with one after a word."""
    process = start_tiny(settings(run), TINY_PAUSE="8")
    while not (tmp_path / "pid-1").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    (said,) = fastproto_lines(err)
    assert "process 0 of 2: found that another one ended" in said
    assert "resume" in said
    assert "Signal 9" in err
    assert read_safetensors(run / "state.safetensors")[1]["metadata"]["step"] == 5
    shutil.copytree(run, tmp_path / "other")

    finish(start_tiny(settings(run), "--resume"))
    assert records(run) == records(two)
    assert weights(run) == weights(two)

    alone = dataclasses.replace(settings(tmp_path / "other"), batch=4)
    with pytest.warns(FastprotoWarning, match="2 processes and goes on in 1: a step still has 4"):
        saved_run(alone, tmp_path / "other", True, 1)
    with pytest.warns(FastprotoWarning, match="has 2 episodes, where it had 4"):
        saved_run(settings(tmp_path / "other"), tmp_path / "other", True, 1)
    _, err = finish(start_tiny(alone, "--resume", ranks=1))
    assert f"fastproto: warning: {tmp_path / 'other'}" in err
    for found, want in zip(records(tmp_path / "other"), records(two), strict=True):
        assert found == pytest.approx(want, rel=1e-6)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_rank_stops_all(settings: Configure, run: Path) -> None:
    """And one says why, with the episodes of all; a run that is there already is told once, too."""
    process = start_tiny(settings(run), TINY_POISON="1:26")  # of step 7, the second of rank 1
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    (said,) = fastproto_lines(err)
    assert "error: step 7: found loss nan" in said
    for index in (24, 25, 26, 27):
        assert f"episode {index}: " in said
    assert read_safetensors(run / "state.safetensors")[1]["metadata"]["step"] == 5
    process = start_tiny(settings(run))
    _, err = process.communicate(timeout=120)
    (said,) = fastproto_lines(err)
    assert f"{run}: found a training run" in said


@pytest.mark.slow
def test_the_program_ends_all_ranks_when_the_minutes_of_the_first_are_up(
    phantom: Path, tmp_path: Path
) -> None:
    """And without `sync_batch_norm`, which is how it is by default."""
    words = ["--data", phantom, "--out", "run", "--image-size", "32", "--encoder", "resnet18"]
    words += ["--batch", "1", "--minutes", "0.03", "--set", "label_fraction=1", "--device", "cpu"]
    out, err = finish(start(*TWO, "-m", "fastproto", "train", *words, folder=tmp_path))
    assert out == "run: model.safetensors, log.jsonl\n"
    (said,) = fastproto_lines(err)
    assert "2 episodes a step, 0.03 minutes on 2 times cpu" in said
    seconds = sum(
        json.loads(line).get("seconds", 0)
        for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    )
    assert seconds >= 0.03 * 60 - 0.01
    metadata = read_safetensors(tmp_path / "run" / "state.safetensors")[1]["metadata"]
    assert metadata["ranks"] == 2
    assert metadata["step"] == max(record["step"] for record in records(tmp_path / "run"))


def test_every_rank_has_the_run_of_the_first(configure: Configure, tmp_path: Path) -> None:
    """Its options and slices; on another machine they may be others."""
    texts: dict[str, str] = {}

    class Mine(Ranks):
        def tell(self, key: str, text: str) -> None:
            texts[key] = text

        def hear(self, key: str) -> str:
            return texts[key]

    first, second = Mine(0, 2), Mine(1, 2)
    config, slices = configure(tmp_path, steps=5), {"0/a": [1, 2]}
    require_same_slices(config, tmp_path, slices, None, first)
    require_same_slices(dataclasses.replace(config, workers=3), tmp_path, slices, None, second)
    for changed, other, message in (
        ({"batch": 3}, slices, "batch: 1 -> 3"),
        ({"steps": 6}, slices, "steps: 6 -> 5"),
        ({}, {"0/a": [1]}, "other scans"),
    ):
        with pytest.raises(ArgumentError, match=f"process 1 of 2: .*{message}"):
            require_same_slices(
                dataclasses.replace(config, **changed), tmp_path, other, None, second
            )


def test_a_rank_that_torchrun_ends_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may notice before the rank does that another one ended."""
    former = signal.getsignal(signal.SIGTERM)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    ranks = Ranks(0, 2, store=torch.distributed.HashStore())
    with ranks.connected(torch.device("cpu")):
        pass
    assert signal.getsignal(signal.SIGTERM) == former
    try:
        with (
            pytest.raises(
                TrainingError, match=r"another one ended or .*SIGTERM from torchrun.*resume"
            ),
            ranks.connected(torch.device("cpu")),
        ):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # says no more
    finally:
        signal.signal(signal.SIGTERM, former)


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked: list[str] = []
    monkeypatch.setattr(torch, "empty", lambda *_, device: asked.append(device) or torch.zeros(0))
    for name in ("auto", "cuda"):
        Ranks(5, 6, local=1, local_count=2).device(name)
    Ranks(1, 2, local=1, local_count=2).device("cpu")
    Ranks().device("cuda:1")
    assert asked == ["cuda:1", "cuda:1", "cpu", "cuda:1"]
    with pytest.raises(ArgumentError, match=r"2 GPUs for 3 processes .* --nproc-per-node"):
        Ranks(2, 3, local=2, local_count=3).device("auto")
    with pytest.raises(ArgumentError, match="'cuda:0' for 3 processes"):
        Ranks(2, 3, local=0, local_count=3).device("cuda:0")
