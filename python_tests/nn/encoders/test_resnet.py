# SPDX-License-Identifier: Apache-2.0
"""The encoder: torchvision's keys, sizes, dilation."""

from __future__ import annotations

import pytest
import torch

from fastproto.errors import ArgumentError
from fastproto.nn import ResNetEncoder

PARAMETERS = {  # torchvision's, without the classifier fc
    "resnet18": 11_689_512 - 513_000,
    "resnet34": 21_284_672,
    "resnet50": 25_557_032 - 2_049_000,
    "resnet101": 42_500_160,
}
DEPTHS = dict(
    zip(PARAMETERS, [(2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 6, 3), (3, 4, 23, 3)], strict=True)
)


def norm_shapes(prefix: str, channels: int) -> dict[str, list[int]]:
    names = ("weight", "bias", "running_mean", "running_var")
    shapes = {f"{prefix}.{name}": [channels] for name in names}
    return {**shapes, f"{prefix}.num_batches_tracked": []}


def torchvision_shapes(name: str) -> dict[str, list[int]]:
    """Every key of torchvision's state dict with its shape, from the rules of the architecture."""
    deep = name in ("resnet50", "resnet101")
    shapes = {"conv1.weight": [64, 3, 7, 7], **norm_shapes("bn1", 64)}
    inputs = 64
    for layer, depth in enumerate(DEPTHS[name], start=1):
        width = 64 * 2 ** (layer - 1)
        outputs = 4 * width if deep else width
        for index in range(depth):
            block = f"layer{layer}.{index}"
            kernels = [[width, inputs, 3, 3], [width, width, 3, 3]]
            if deep:
                kernels = [[width, inputs, 1, 1], [width, width, 3, 3], [outputs, width, 1, 1]]
            for number, kernel in enumerate(kernels, start=1):
                shapes[f"{block}.conv{number}.weight"] = kernel
                shapes.update(norm_shapes(f"{block}.bn{number}", kernel[0]))
            if index == 0 and (layer > 1 or deep):
                shapes[f"{block}.downsample.0.weight"] = [outputs, inputs, 1, 1]
                shapes.update(norm_shapes(f"{block}.downsample.1", outputs))
            inputs = outputs
    return shapes


@pytest.mark.parametrize("name", DEPTHS)
def test_state_dict_is_torchvisions(name: str) -> None:
    with torch.device("meta"):
        encoder = ResNetEncoder(name)
    found = {key: list(value.shape) for key, value in encoder.state_dict().items()}
    assert found == torchvision_shapes(name)
    assert sum(p.numel() for p in encoder.parameters()) == PARAMETERS[name]


def test_literal_keys_of_resnet34() -> None:
    """A few keys as they stand in torchvision's file, so that the rules above are anchored."""
    keys = set(torchvision_shapes("resnet34"))
    assert {"conv1.weight", "layer1.2.conv2.weight", "layer2.0.downsample.0.weight"} <= keys
    assert {"bn1.running_var", "layer3.5.bn2.bias", "layer4.0.downsample.1.running_mean"} <= keys
    assert not {"layer1.0.downsample.0.weight", "layer4.3.conv1.weight", "fc.weight"} & keys
    assert len(keys) == 36 + 36 * 5  # 33 convolutions and 3 shortcuts, each with its norm


@pytest.mark.parametrize(
    ("stride", "expected"),
    [
        # (stride, dilations) of the blocks' 3x3 convolutions, as torchvision builds them with
        # replace_stride_with_dilation=[False, False, True] and [False, True, True].
        (16, {"layer3": [(2, 1), (1, 1), (1, 1)], "layer4": [(1, 1), (1, 2), (1, 2)]}),
        (8, {"layer3": [(1, 1), (1, 2), (1, 2)], "layer4": [(1, 2), (1, 4), (1, 4)]}),
    ],
)
@pytest.mark.parametrize(("name", "strided"), [("resnet34", "conv1"), ("resnet101", "conv2")])
def test_dilation_by_torchvisions_convention(name, strided, stride, expected) -> None:
    with torch.device("meta"):
        encoder = ResNetEncoder(name, stride)
    for layer, blocks in expected.items():
        found = []
        for block in list(getattr(encoder, layer))[:3]:
            conv = getattr(block, strided)
            assert conv.padding == conv.dilation
            found.append((conv.stride[0], conv.dilation[0]))
        assert found == blocks
        shortcut = getattr(encoder, layer)[0].downsample[0]
        assert shortcut.stride[0] == blocks[0][0]


@pytest.mark.parametrize(("name", "expansion"), [("resnet18", 1), ("resnet50", 4)])
@pytest.mark.parametrize("stride", [16, 8])
@torch.no_grad()
def test_sizes_of_the_stages(name: str, expansion: int, stride: int) -> None:
    encoder = ResNetEncoder(name, stride).eval()
    maps = encoder(torch.randn(2, 3, 64, 96))
    channels = (64, *(expansion * width for width in (64, 128, 256, 512)))
    assert encoder.channels == channels
    cells = (2, 4, 8, stride, stride)
    assert [tuple(level.shape) for level in maps] == [
        (2, width, 64 // cell, 96 // cell) for width, cell in zip(channels, cells, strict=True)
    ]
    assert all((level >= 0).all() for level in maps)


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="resnet34"):
        ResNetEncoder("vgg16")
    with pytest.raises(ArgumentError, match="8 or 16"):
        ResNetEncoder("resnet34", 32)
