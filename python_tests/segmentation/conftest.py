# SPDX-License-Identifier: Apache-2.0
"""A model simple enough to predict by hand, and volumes it can segment without error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastproto.data import Preprocessing, Volume
from fastproto.nn import Prototypes

GREY = {0: 0.0, 7: 100.0, 300: 200.0}  # 300 does not fit uint8


class GreyModel(nn.Module):
    """A `FewShotModel` in all that matters here. Each class has one prototype, its mean grey value;
    the class of the nearest one wins.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.extra: dict = {}
        self.batches: list[int] = []

    def encode_support(self, images: Tensor, masks: Tensor, num_classes: int = 2) -> Prototypes:
        greys = images[:, :, 0]
        means = [greys[masks == index].mean() for index in range(num_classes)]
        offsets = torch.arange(num_classes + 1, dtype=torch.int32)
        return Prototypes(torch.stack(means)[:, None], offsets, num_classes)

    def encode(self, images: Tensor) -> Tensor:
        self.batches.append(images.shape[1])
        return images

    def decode(self, features: Tensor, prototypes: Prototypes) -> Tensor:
        greys = features[:, :, :1]
        return -100 * (greys - prototypes.protos[:, 0].view(1, 1, -1, 1, 1)) ** 2

    def fingerprint(self) -> str:
        return f"{self.weight.item():.6f}"


@pytest.fixture
def grey_model() -> GreyModel:
    return GreyModel()


@pytest.fixture
def preprocessing() -> Preprocessing:
    return Preprocessing("mr", image_size=64, crop=False)


def make_scan(seed: int = 0, slices: int = 10) -> tuple[Volume, Volume]:
    """A scan with an organ and a tumour, and its label map; its three sides differ."""
    rng = np.random.default_rng(seed)
    label = np.zeros((slices, 40, 32), dtype=np.uint16)
    shift = int(rng.integers(0, 4))
    label[2:9, 8 + shift : 28 + shift, 5:17] = 7
    label[4:6, 12:24, 20:30] = 300
    image = np.vectorize(GREY.get)(label).astype(np.float32)
    grid = {
        "spacing": (1.5, 1.5, 4.0),
        "origin": (-20.0, 31.5, 400.0),
        "direction": (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0),
        "path": None,
    }
    return Volume(array=image, **grid), Volume(array=label, **grid)


@pytest.fixture
def scan() -> tuple[Volume, Volume]:
    return make_scan()
