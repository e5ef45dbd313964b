# SPDX-License-Identifier: Apache-2.0
"""A phantom data set, an untrained model, a task and its results: made once for all tests."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastproto.cli import main
from fastproto.data import Preprocessing
from fastproto.data.phantom import write_phantom
from fastproto.nn import FewShotUNet

ORGANS = ["liver=1", "spine=5"]
QUICK = ["--adapt", "0", "--prior", "box", "--slices", "3"]
CHOSEN = ["--labels", *ORGANS, *QUICK]


def save_model(path: Path, modality: str = "mr", **more: float) -> Path:
    """A model that never learnt anything."""
    torch.manual_seed(0)
    preprocessing = Preprocessing(modality, image_size=64, **more)
    extra = {"preprocessing": {modality: preprocessing.to_dict()}}
    FewShotUNet(encoder="resnet18").save(path, extra)
    return path


@dataclass(frozen=True)
class Program:
    """The program with the model and, for ``learn``, the example."""

    model: Path
    example: list[str]

    def learn(self, out: object, *more: str, label: object = "", name: str = "learn") -> int:
        image, label = self.example[0], str(label or self.example[1])
        files = ["--model", str(self.model), "--image", image, "--label", label, "-o", str(out)]
        return main([name, *files, *more])

    def segment(self, source: object, output: object, *more: object) -> int:
        files = ["--model", str(self.model), "-i", str(source), "-o", str(output)]
        return main(["segment", *files, *map(str, more)])


@pytest.fixture(scope="session")
def phantom(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "phantom"
    return write_phantom(folder, patients=3, modality="mr", shape=(12, 64, 64))


@pytest.fixture(scope="session")
def model_file(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("run") / "model.safetensors")


@pytest.fixture(scope="session")
def program(model_file, phantom) -> Program:
    case = "mr_000.nii.gz"
    return Program(model_file, [str(phantom / "images" / case), str(phantom / "labels" / case)])


@pytest.fixture(scope="session")
def task_file(program, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("task") / "organs.task"
    assert program.learn(path, *CHOSEN) == 0
    return path


@pytest.fixture(scope="session")
def results(program, task_file, phantom, tmp_path_factory) -> tuple[Path, int]:
    """A folder of all scans' results with probabilities; how often the weights were read for it."""
    folder = tmp_path_factory.mktemp("results")
    counted = []
    whole = FewShotUNet.fingerprint
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(FewShotUNet, "fingerprint", lambda model: counted.append(1) or whole(model))
        options = ["--task", task_file, "--probabilities"]
        assert program.segment(phantom / "images", folder, *options) == 0
    return folder, len(counted)
