# SPDX-License-Identifier: Apache-2.0
"""A model simple enough to predict by hand, and volumes it can segment without error."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import Tensor, nn

from fastproto.data import Preprocessing, Volume
from fastproto.nn import FewShotUNet, Prototypes
from fastproto.segmentation import Task, register

GREY = {0: 100.0, 7: 200.0, 300: 0.0}  # 300 does not fit uint8
NAMES = {7: "spleen", 300: "tumour"}


class GreyModel(nn.Module):
    """A `FewShotModel` in all that matters here. In every annotated slice each class has one
    prototype, its mean grey value; a query's grey value is compared with the nearest of a class.
    """

    backend = None

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.extra: dict = {}
        self.batches: list[int] = []

    def encode_support(self, images: Tensor, masks: Tensor, num_classes: int = 2) -> Prototypes:
        protos, ends = [], [0]
        for greys, mask in zip(images[:, :, 0], masks, strict=True):
            for index in range(num_classes):
                if (mask == index).any():
                    protos.append(greys[mask == index].mean())
                ends.append(len(protos))
        offsets = torch.tensor(ends, dtype=torch.int32)
        return Prototypes(torch.stack(protos)[:, None], offsets, num_classes)

    def for_inference(self) -> GreyModel:
        return self

    def segment(self, images: Tensor, prototypes: Prototypes) -> Tensor:
        self.batches.append(len(images))
        logits = [
            -100 * ((images[bag // 2, 0, 0] - prototypes.protos[first:last, :, None]) ** 2).amin(0)
            for bag, (first, last) in enumerate(pairwise(prototypes.offsets.tolist()))
        ]
        return torch.stack(logits).view(len(images), 1, 2, *images.shape[-2:])

    def fingerprint(self) -> str:
        return f"{self.weight.item():.6f}"


@pytest.fixture
def grey_model() -> GreyModel:
    return GreyModel()


@pytest.fixture(scope="session")
def network() -> FewShotUNet:
    """A real one, to be left as it is."""
    torch.manual_seed(0)
    return FewShotUNet("resnet18").eval()


@pytest.fixture
def preprocessing() -> Preprocessing:
    return Preprocessing("mr", image_size=64, crop=False)


def make_scan(shift: int = 0, slices: int = 10) -> tuple[Volume, Volume]:
    """A scan with an organ and a tumour, and its label map; sides and spacings all differ."""
    label = np.zeros((slices, 48, 32), dtype=np.uint16)
    label[2:9, 8 + shift : 28 + shift, 5:17] = 7
    label[4:6, 12 + shift : 24 + shift, 20:30] = 300
    image = np.vectorize(GREY.get)(label).astype(np.float32)
    grid = (1.5, 1.2, 4.0), (-20.0, 31.5, 400.0)
    return Volume(image, *grid), Volume(label, *grid)


@pytest.fixture
def scan() -> tuple[Volume, Volume]:
    return make_scan()


@pytest.fixture
def make() -> Callable[..., tuple[Volume, Volume]]:
    return make_scan


@pytest.fixture
def teach(grey_model: GreyModel, preprocessing: Preprocessing) -> Callable[..., Task]:
    """`register` with all that it takes beside a scan and its labels; keywords replace it."""
    usual = {"labels": NAMES, "preprocessing": preprocessing, "prior": "box"}
    return lambda image, label, **other: register(grey_model, image, label, **usual | other)


@pytest.fixture
def task(teach: Callable[..., Task], scan: tuple[Volume, Volume]) -> Task:
    return teach(*scan)


@pytest.fixture
def reorient() -> Callable[[Volume, str], Volume]:
    """The same scan with its axes stored in another order."""

    def turn(volume: Volume, axes: str) -> Volume:
        image = sitk.GetImageFromArray(volume.array)
        image.SetSpacing(volume.spacing)
        image.SetOrigin(volume.origin)
        image.SetDirection(volume.direction)
        image = sitk.DICOMOrient(image, axes)
        place = image.GetSpacing(), image.GetOrigin(), image.GetDirection()
        return Volume(sitk.GetArrayFromImage(image), *place)

    return turn
