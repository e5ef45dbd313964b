# SPDX-License-Identifier: Apache-2.0
"""What the network asks of an encoder."""

from __future__ import annotations

from torch import Tensor, nn


class Encoder(nn.Module):
    """Turns images ``[B, 3, H, W]`` into five feature maps F1 .. F5.

    H and W are multiples of the output stride. F1 has half the image's side, F2 a quarter, F3 an
    eighth, F4 and F5 are smaller by the output stride. For inference ``nn.BatchNorm2d`` is folded:
    ``bn1`` into ``conv1`` and so on, in a sequence into the layer before.
    """

    name: str  # under which registry.py has it
    output_stride: int  # pixels of a cell of F5, along each side
    channels: tuple[int, int, int, int, int]  # of F1 .. F5

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        raise NotImplementedError
