# SPDX-License-Identifier: Apache-2.0
"""The ResNet encoder, with torchvision's state-dict keys, dilated to keep its last stages large."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fastproto import defaults
from fastproto.errors import require
from fastproto.nn.encoders.encoder import Encoder
from fastproto.nn.winograd import Conv3x3


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, as in ResNet-18 and ResNet-34."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.conv1 = Conv3x3(inputs, width, stride=stride, dilation=dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Conv3x3(width, width, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _downsample(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x)).relu_()
        x = self.bn2(self.conv2(x))
        return x.add_(shortcut).relu_()


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut, as in ResNet-50 and ResNet-101."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Conv3x3(width, width, stride=stride, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _downsample(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x)).relu_()
        x = self.bn2(self.conv2(x)).relu_()
        x = self.bn3(self.conv3(x))
        return x.add_(shortcut).relu_()


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


_Kind = type[BasicBlock] | type[Bottleneck]

# The kind of block, and how many of them each of the four layers has.
ARCHITECTURES: dict[str, tuple[_Kind, tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class ResNetEncoder(Encoder):
    """A ResNet without its classifier that returns the features of every stage.

    F1 has 64 channels; F2 .. F5 have 64, 128, 256 and 512, in ResNet-50 and 101 four times as many.
    A stage that keeps its size is dilated instead of strided, by torchvision's convention
    (``replace_stride_with_dilation``): its first block keeps the dilation of the stage before.

    Args:
        name: ``"resnet18"``, ``"resnet34"``, ``"resnet50"`` or ``"resnet101"``.
        output_stride: 16 (layer4 dilated) or 8 (layer3 and layer4 dilated).

    Raises:
        ArgumentError: An unknown name or output stride.
    """

    def __init__(self, name: str = defaults.ENCODER, output_stride: int = defaults.OUTPUT_STRIDE):
        super().__init__()
        require(
            name in ARCHITECTURES, "encoder", found=repr(name), allowed=", ".join(ARCHITECTURES)
        )
        found, allowed = repr(output_stride), "8 or 16"
        require(output_stride in (8, 16), "output_stride", found=found, allowed=allowed)
        block, depths = ARCHITECTURES[name]
        self.name, self.output_stride = name, output_stride
        f2, f3, f4, f5 = (width * block.expansion for width in (64, 128, 256, 512))
        self.channels = (64, f2, f3, f4, f5)

        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _layer(block, 64, 64, depths[0])
        self.layer2 = _layer(block, f2, 128, depths[1], stride=2)
        if output_stride == 16:
            self.layer3 = _layer(block, f3, 256, depths[2], stride=2)
            self.layer4 = _layer(block, f4, 512, depths[3], dilations=(1, 2))
        else:
            self.layer3 = _layer(block, f3, 256, depths[2], dilations=(1, 2))
            self.layer4 = _layer(block, f4, 512, depths[3], dilations=(2, 4))
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``[B, 3, H, W]`` -> F1 .. F5."""
        f1 = self.bn1(self.conv1(x)).relu_()
        f2 = self.layer1(F.max_pool2d(f1, 3, stride=2, padding=1))
        f3 = self.layer2(f2)
        f4 = self.layer3(f3)
        return f1, f2, f3, f4, self.layer4(f4)


def _layer(
    block: _Kind,
    inputs: int,
    width: int,
    depth: int,
    *,
    stride: int = 1,
    dilations: tuple[int, int] = (1, 1),
) -> nn.Sequential:
    """``depth`` blocks; ``dilations`` are those of the first block and of all the others."""
    first, others = dilations
    blocks = [block(inputs, width, stride, first)]
    blocks += [block(width * block.expansion, width, 1, others) for _ in range(1, depth)]
    return nn.Sequential(*blocks)
