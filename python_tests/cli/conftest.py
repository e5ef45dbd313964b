# SPDX-License-Identifier: Apache-2.0
"""A small phantom data set and an untrained model file, made once for all tests of the program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastproto.data import Preprocessing
from fastproto.data.phantom import write_phantom
from fastproto.nn import FewShotUNet


@pytest.fixture(scope="session")
def phantom(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "phantom"
    return write_phantom(folder, patients=3, modality="mr", shape=(12, 64, 64))


@pytest.fixture(scope="session")
def model_file(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    preprocessing = Preprocessing("mr", image_size=64)
    extra = {"preprocessing": {"mr": preprocessing.to_dict()}}
    FewShotUNet(encoder="resnet18").save(path, extra)
    return path
