# SPDX-License-Identifier: Apache-2.0
"""A tiny data set on disk, a tiny run on it, and stores of synthetic slices in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_encoder import TinyEncoder

from fastproto.data.phantom import write_phantom
from fastproto.nn.encoders.registry import ENCODERS, Entry
from fastproto.training import TrainConfig
from fastproto.training.slices import CaseSlices, SliceStore

SIZE = 48


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three CT patients with all organs."""
    return write_phantom(tmp_path_factory.mktemp("phantom") / "ct", patients=3, shape=(16, 64, 64))


@pytest.fixture(scope="module")
def tiny_encoder() -> Iterator[str]:
    """The name of an encoder whose training takes a tenth of a ResNet's time and disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "tiny", Entry(TinyEncoder))
        yield "tiny"


@pytest.fixture(scope="module")
def configure(phantom: Path, tiny_encoder: str) -> Callable[..., TrainConfig]:
    """Makes configurations of six steps with both sources, all losses and validation."""

    def make(output: Path, **changes: object) -> TrainConfig:
        config = TrainConfig(
            data=str(phantom), output=str(output), holdout=("spleen",),
            validation_cases=("ct_002",), label_fraction=0.6, min_pixels=5, image_size=32,
            encoder=tiny_encoder, output_stride=16, align=1.0, cycle=1.0, batch=1, steps=6,
            warmup_fraction=0.2, precision="float32", checkpoint_every=3, validate_every=4,
            validation_episodes=2, progress=False,
        )  # fmt: skip
        return dataclasses.replace(config, **changes)

    return make


@pytest.fixture
def store() -> SliceStore:
    """Three patients of 12 slices; class c is the square number c, in slices c..c+7 only.

    Classes 1 and 2 are in all patients, class 3 in patient "c" alone, class 4 in one slice of one
    patient. Every pixel of an image is 100 * patient + slice, so an image says where it is from.
    """
    cases = []
    for number, name in enumerate("abc"):
        labels = torch.zeros(12, SIZE, SIZE, dtype=torch.uint8)
        for label in (1, 2, 3) if name == "c" else (1, 2):
            labels[label : label + 8, 10 * label : 10 * label + 8, 5:15] = label
        if name == "a":
            labels[0, 40:48, 40:48] = 4
        images = (100.0 * number + torch.arange(12)).view(12, 1, 1).expand(12, SIZE, SIZE)
        numbers = [2 * i if name == "b" else i for i in range(12)]
        cases.append(CaseSlices(name, numbers, images.half(), labels))
    return SliceStore(cases)


@pytest.fixture
def pieces() -> CaseSlices:
    """A patient whose body is halves of quarters: two scales of supervoxels.

    Of the 24 slices of 40 x 32 pixels, of 4 x 2 x 2 mm, 2 to 20 show four finest supervoxels 1..4;
    the second scale joins 1 with 2 and 3 with 4. Supervoxel 4 begins in slice 12, where 3 ends.
    Every pixel of an image is its slice.
    """
    regions = torch.zeros(24, 40, 32, dtype=torch.int16)
    regions[2:20, 4:20, 4:16] = 1
    regions[2:20, 4:20, 16:28] = 2
    regions[2:12, 20:36, 4:28] = 3
    regions[12:20, 20:36, 4:28] = 4
    parents = np.array([[0, 1, 2, 3, 4], [0, 1, 1, 2, 2]], np.int16)
    images = torch.arange(24.0).view(24, 1, 1).expand(24, 40, 32).half()
    return CaseSlices("p", list(range(24)), images, None, (4.0, 2.0, 2.0), regions, parents)
