# SPDX-License-Identifier: Apache-2.0
"""Patients made by hand and an untrained model, both as small as they can be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproto.data import Preprocessing, Volume, write_volume
from fastproto.nn import FewShotUNet

ORGANS = {1: "liver", 2: "right kidney", 3: "left kidney"}
CASES = ("a", "b", "c", "d", "e")


def make_patient(number: int, *, without: int | None = None) -> tuple[Volume, Volume]:
    """A CT of 10 slices: a body with three boxes, which lie a little elsewhere in each patient."""
    label = np.zeros((10, 24, 28), dtype=np.uint8)
    label[1:7, 6 + number % 3 : 14, 5:11] = 1
    label[4:8, 8:14, 13 : 17 + number % 2] = 2
    label[5:9, 8:15, 19 : 23 + number % 2] = 3
    image = np.full(label.shape, -1000, dtype=np.int16)
    image[:, 3:20, 3:25] = 0
    image[label > 0] = 60 * label[label > 0].astype(np.int16)
    label[label == (without or -1)] = 0
    grid = {"spacing": (8.0, 8.0, 10.0)}
    return Volume(image, **grid), Volume(label, **grid)


def save_model(path: Path, modality: str = "ct", **extra: object) -> Path:
    """A model that never learnt anything."""
    torch.manual_seed(0)
    statistics = {"mean": 0.0, "std": 100.0} if modality == "ct" else {}
    preprocessing = Preprocessing(modality, 32, **statistics).to_dict()
    extra = {"preprocessing": {modality: preprocessing}, **extra}
    FewShotUNet("resnet18", output_stride=16).save(path, extra)
    return path


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """A data set of five; the last one has no left kidney."""
    folder = tmp_path / "patients"
    for number, case in enumerate(CASES):
        image, label = make_patient(number, without=3 if case == "e" else None)
        write_volume(folder / "images" / f"{case}.nii.gz", image.array, like=image)
        write_volume(folder / "labels" / f"{case}.nii.gz", label.array, like=label)
    fields = {"name": "boxes", "modality": "CT", "labels": ORGANS, "cases": CASES}
    (folder / "dataset.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "model.safetensors")
