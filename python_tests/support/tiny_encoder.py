# SPDX-License-Identifier: Apache-2.0
"""An encoder of five convolutions: what it takes to add one (CONTRIBUTING.md)."""

from __future__ import annotations

from torch import Tensor, nn

from fastproto.nn.encoders import Encoder


class TinyEncoder(Encoder):
    """``[B, 3, H, W]`` -> F1 .. F5 with few channels, each after one convolution."""

    def __init__(self, name: str = "tiny", output_stride: int = 16):
        super().__init__()
        self.name, self.output_stride, self.channels = name, output_stride, (8, 8, 16, 16, 32)
        strides = (2, 2, 2, output_stride // 8, 1)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            )
            for before, after, stride in zip((3, *self.channels), self.channels, strides)  # noqa: B905
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        f1, f2, f3, f4, f5 = maps
        return f1, f2, f3, f4, f5
