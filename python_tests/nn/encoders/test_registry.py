# SPDX-License-Identifier: Apache-2.0
"""An encoder takes its file and a line of the registry: a tiny one goes all the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_encoder import TinyEncoder

from fastproto import FewShotUNet, InputError
from fastproto.losses import EpisodeLoss
from fastproto.nn.encoders import ENCODERS, Entry, make_encoder
from fastproto.segmentation.task import load_model
from fastproto.training.config import TrainConfig
from fastproto.training.episodes import Episode


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "tiny", Entry(TinyEncoder))


@pytest.mark.parametrize("output_stride", [8, 16])
def test_another_encoder_trains_segments_and_is_saved(output_stride: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FewShotUNet("tiny", output_stride=output_stride)
    masks = torch.zeros(1, 1, 64, 64, dtype=torch.long)
    masks[..., 16:48, 8:40] = 1
    images = torch.randn(1, 1, 3, 64, 64)
    total, _, _ = EpisodeLoss()(model.train(), Episode(images, masks, images, masks, 2, "random"))
    total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval().save(tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.encoder.name == "tiny"
    with torch.inference_mode():
        prototypes = model.encode_support(images, masks)
        logits = model.segment(images, prototypes)
        assert torch.equal(loaded.segment(images, prototypes), logits)
        folded = model.for_inference().segment(images, prototypes)
    assert torch.allclose(folded, logits, rtol=1e-3, atol=1e-4)


def test_a_configuration_may_name_it() -> None:
    assert TrainConfig(data=("scans",), output="run", encoder="tiny").encoder == "tiny"


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(InputError, match="resnet101, tiny"):
        make_encoder("vgg16", 16)
    with pytest.raises(InputError, match="'imagenet' for tiny; allowed: a file, or one of res"):
        FewShotUNet("tiny", weights="imagenet")
