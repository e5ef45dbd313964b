# SPDX-License-Identifier: Apache-2.0
"""The network as users call it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.slow_prototypes import slow_bags
from torch import Tensor

from fastproto.errors import ArgumentError, CheckpointError
from fastproto.nn import FewShotUNet, ProtoAttention, PrototypeNet, Prototypes
from fastproto.nn.weights import read_safetensors, write_safetensors


@pytest.fixture(scope="module")
def shared_model() -> FewShotUNet:
    torch.manual_seed(0)
    return FewShotUNet("resnet18").eval()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


@pytest.fixture
def model(shared_model: FewShotUNet) -> FewShotUNet:
    shared_model.zero_grad()
    return shared_model.eval()


def blobs(episodes: int, shots: int, classes: int, height: int, width: int) -> Tensor:
    """Label maps ``[E, S, H, W]`` of vertical stripes, one a class, of random widths."""
    position = torch.arange(width).expand(episodes, shots, height, width) / width
    edges = torch.rand(episodes, shots, classes - 1).sort(dim=2).values
    return (position.unsqueeze(2) > edges[..., None, None]).sum(dim=2)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_size_of_the_network() -> None:
    with torch.device("meta"):
        model = FewShotUNet()
    assert sum(p.numel() for p in model.parameters()) == 24_085_249


@torch.no_grad()
def test_the_op_as_a_module(model: FewShotUNet) -> None:
    images, masks = torch.randn(1, 1, 3, 64, 64), blobs(1, 1, 2, 64, 64)
    features = model.encode(images)
    prototypes = model.extract(features, masks)
    enhanced = ProtoAttention()(features.bottleneck, prototypes)
    assert list(enhanced.shape) == [1, 1, 2, 1024, 4, 4]
    assert torch.equal(enhanced[:, :, 0, :512], features.bottleneck)
    half = ProtoAttention(concat=False)(features.bottleneck, prototypes)
    assert torch.equal(enhanced[:, :, :, 512:], half)


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 33), (96, 80), (31, 64)])
def test_any_height_and_width(model: FewShotUNet, size: tuple[int, int]) -> None:
    images, masks = torch.randn(1, 2, 3, *size), blobs(1, 2, 2, *size)
    with torch.no_grad():
        logits = model(images, masks, images[:, :1])
    assert logits.shape == (1, 1, 2, *size)
    assert logits.isfinite().all()


def test_padding_is_replicated_and_belongs_to_no_class(model: FewShotUNet) -> None:
    images, masks = torch.randn(1, 1, 3, 20, 36), blobs(1, 1, 2, 20, 36)
    rows = torch.arange(32).clamp(max=19)
    columns = torch.arange(48).clamp(max=35)
    padded = images[..., rows, :][..., columns]
    with torch.no_grad():
        features = model.encode(padded)
        close(model.encode(images).bottleneck, features.bottleneck)
        found = model.encode_support(images, masks)
        close(model(images, masks, images), model.segment(padded, found)[..., :20, :36])
    bags = slow_bags(features.bottleneck, masks, 2, cell=16)
    assert found.counts() == [[len(bag) for bag in bags[0]]]


@pytest.mark.parametrize("training", [False, True])
def test_relabelling_permutes_the_output(model: FewShotUNet, training: bool) -> None:
    images, masks = torch.randn(2, 2, 3, 32, 48), blobs(2, 2, 3, 32, 48)
    queries = torch.randn(2, 2, 3, 32, 48)
    permutation = torch.tensor([2, 0, 1])
    model.train(training)
    with torch.no_grad():
        logits = model(images, masks, queries, num_classes=3)
        permuted = model(images, permutation[masks], queries, num_classes=3)
    assert logits.std(dim=2).mean() > 1e-3
    torch.testing.assert_close(permuted[:, :, permutation], logits, rtol=1e-3, atol=2e-3)


@torch.no_grad()
def test_support_encoded_once_for_many_queries(model: FewShotUNet) -> None:
    images, masks = torch.randn(2, 5, 3, 48, 32), blobs(2, 5, 7, 48, 32)
    queries = torch.randn(2, 4, 3, 48, 32)
    joint = model(images, masks, queries, num_classes=7)
    assert joint.shape == (2, 4, 7, 48, 32)
    prototypes = model.encode_support(images, masks, num_classes=7)
    close(model.segment(queries, prototypes), joint)
    close(model.segment(queries[:, 2:3], prototypes.trim()), joint[:, 2:3])
    # Another size needs no other support.
    assert model.segment(torch.randn(2, 1, 3, 64, 64), prototypes).shape[-2:] == (64, 64)
    # Episodes do not mix.
    for e in (slice(0, 1), slice(1, 2)):
        close(model(images[e], masks[e], queries[e], num_classes=7), joint[e])
    # A class more that nobody shows changes nothing for the others.
    close(model(images, masks, queries, num_classes=8)[:, :, :7], joint)
    # The order of the shots does not matter.
    order = torch.tensor([3, 1, 4, 0, 2])
    close(model(images[:, order], masks[:, order], queries, num_classes=7), joint)


def test_empty_masks(model: FewShotUNet) -> None:
    images = torch.randn(1, 1, 3, 32, 32)
    masks = torch.zeros(1, 1, 32, 32, dtype=torch.long)
    prototypes = model.encode_support(images, masks, num_classes=3)
    assert prototypes.counts() == [[4, 0, 0]]
    logits = model.segment(images, prototypes)
    assert logits.isfinite().all()
    close(logits[:, :, 1], logits[:, :, 2])
    logits[:, :, 1].sum().backward()
    assert model.encoder.conv1.weight.grad is not None
    assert model.encoder.conv1.weight.grad.isfinite().all()


@pytest.mark.parametrize("low_precision", [False, True])
def test_every_parameter_gets_a_gradient(low_precision: bool) -> None:
    model = FewShotUNet("resnet18").train()
    images, masks = torch.randn(1, 1, 3, 32, 32), blobs(1, 1, 2, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low_precision):
        logits = model(images, masks, torch.randn(1, 1, 3, 32, 32))
    assert logits.isfinite().all()
    logits.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_options_reach_the_prototypes() -> None:
    images, masks = torch.randn(1, 1, 3, 32, 32), torch.zeros(1, 1, 32, 32, dtype=torch.long)
    masks[..., :6] = 1  # 6 of the 16 columns of two cells
    counts = []
    for options in ({}, {"mask_threshold": 0.25}, {"append_global": True}):
        torch.manual_seed(3)
        model = FewShotUNet("resnet18", **options).eval()
        with torch.no_grad():
            counts.append(model.encode_support(images, masks).counts())
    assert counts == [[[4, 1]], [[4, 2]], [[5, 1]]]
    with torch.no_grad():
        prototypes = model.encode_support(images, masks)
        cold = model.segment(images, prototypes)
        model.temperature = 10.0
        assert not torch.allclose(model.segment(images, prototypes), cold)


@pytest.mark.parametrize(
    ("kind", "output_stride", "cells"),
    [(FewShotUNet, 16, (2, 3)), (FewShotUNet, 8, (4, 6)), (PrototypeNet, 8, (4, 6))],
)
def test_save_and_load(tmp_path, kind, output_stride, cells) -> None:
    options = {"temperature": 0.1, "mask_threshold": 0.25, "append_global": True}
    model = kind("resnet18", output_stride=output_stride, **options)
    images, masks = torch.randn(1, 2, 3, 30, 44), blobs(1, 2, 2, 30, 44)
    with torch.no_grad():
        model.train()(images, masks, images)  # so that the running statistics are not the initial
        expected = model.eval()(images, masks, images)
        assert model.encode(images).bottleneck.shape[-2:] == cells
    assert expected.shape == (1, 2, 2, 30, 44)
    extra = {"classes": {"1": "liver"}, "mean": 0.5}
    path = tmp_path / "model.safetensors"
    model.save(path, extra)
    state = torch.get_rng_state()
    loaded = kind.load(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.extra == extra
    assert model.config == {"encoder": "resnet18", "output_stride": output_stride, **options}
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.fingerprint() == model.fingerprint()
    with torch.no_grad():
        assert torch.equal(loaded(images, masks, images), expected)
    loaded.temperature = 0.2
    assert loaded.fingerprint() != model.fingerprint()
    with torch.no_grad():
        model.encoder.bn1.bias.add_(1e-6)
    changed = model.fingerprint()
    assert changed != kind.load(path).fingerprint()
    model.save(path)
    assert kind.load(path).fingerprint() == changed
    assert kind.load(path).extra == {}


def test_a_file_from_before_there_was_a_choice_of_stride(tmp_path: Path) -> None:
    path, model = tmp_path / "model.safetensors", FewShotUNet("resnet18")
    model.save(path)
    tensors, header = read_safetensors(path)
    del header["config"]["output_stride"]
    write_safetensors(path, tensors, header)
    assert FewShotUNet.load(path).config == model.config


def test_files_of_something_else(tmp_path: Path, model: FewShotUNet) -> None:
    path = tmp_path / "model.safetensors"
    model.save(path)
    with pytest.raises(CheckpointError, match="file of FewShotUNet"):
        PrototypeNet.load(path)
    with pytest.raises(CheckpointError, match="kind 'model'"):
        Prototypes.load(path)
    tensors, header = read_safetensors(path)
    changes = (
        {"encoder": "resnet34"},  # other shapes than the weights
        {"encoder": "resnet99"},
        {"encoder": ["resnet18"]},
        {"temperature": "warm"},
        {"temperature": -1},
        {"weights": "imagenet"},
    )
    for config in (*({**header["config"], **change} for change in changes), {}, None):
        write_safetensors(path, tensors, {**header, "config": config})
        with pytest.raises(CheckpointError):
            FewShotUNet.load(path)
    write_safetensors(path, {"a": torch.ones(1)}, header)
    with pytest.raises(CheckpointError, match="missing"):
        FewShotUNet.load(path)
    Prototypes(torch.ones(1, 2), torch.tensor([0, 1, 1], dtype=torch.int32), 2).save(path)
    with pytest.raises(CheckpointError, match="file of prototypes"):
        FewShotUNet.load(path)


IMAGES, MASKS = torch.randn(1, 2, 3, 16, 16), torch.zeros(1, 2, 16, 16, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "subject"),
    [
        ((IMAGES[0], MASKS, IMAGES, 2), "support_images"),
        ((IMAGES[:, :, :1], MASKS, IMAGES, 2), "support_images"),
        ((IMAGES[:, :0], MASKS[:, :0], IMAGES, 2), "support_images"),
        ((IMAGES.to(torch.uint8), MASKS, IMAGES, 2), "support_images"),
        ((IMAGES.double(), MASKS, IMAGES, 2), "support_images"),
        ((IMAGES.to("meta"), MASKS, IMAGES, 2), "support_images"),
        ((IMAGES, MASKS, IMAGES[:, :, :2], 2), "query_images"),
        ((IMAGES, MASKS, IMAGES.expand(2, -1, -1, -1, -1), 2), "query_images"),
        ((IMAGES, MASKS, IMAGES[..., :8], 2), "query_images"),
        ((IMAGES, MASKS[:, :1], IMAGES, 2), "support_masks"),
        ((IMAGES, MASKS[..., :8], IMAGES, 2), "support_masks"),
        ((IMAGES, MASKS.float(), IMAGES, 2), "support_masks"),
        ((IMAGES, MASKS + 2, IMAGES, 2), "support_masks"),
        ((IMAGES, MASKS - 1, IMAGES, 2), "support_masks"),
        ((IMAGES, MASKS, IMAGES, 1), "num_classes"),
        ((IMAGES, MASKS, IMAGES, 2.0), "num_classes"),
    ],
)
def test_bad_arguments(model: FewShotUNet, arguments: tuple[object, ...], subject: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        model(*arguments)
    assert caught.value.subject == subject


def test_bad_prototypes(model: FewShotUNet) -> None:
    offsets = torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32)
    for prototypes in (
        Prototypes(torch.ones(2, 256), offsets[:3], 2),
        Prototypes(torch.ones(4, 512), offsets, 2),
        Prototypes(torch.ones(2, 512, device="meta"), offsets[:3].to("meta"), 2),
    ):
        with pytest.raises(ArgumentError) as caught:
            model.segment(IMAGES, prototypes)
        assert caught.value.subject == "prototypes"


@pytest.mark.parametrize(
    ("options", "subject"),
    [
        ({"encoder": "unet"}, "encoder"),
        ({"output_stride": 32}, "output_stride"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"mask_threshold": 1.0}, "mask_threshold"),
    ],
)
def test_bad_options(options: dict[str, object], subject: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        FewShotUNet(**options)
    assert caught.value.subject == subject
