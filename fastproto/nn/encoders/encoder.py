# SPDX-License-Identifier: Apache-2.0
"""What the network asks of an encoder."""

from __future__ import annotations

from torch import Tensor, nn


class Encoder(nn.Module):
    """Turns images ``[B, 3, H, W]`` into five feature maps F1 .. F5.

    H and W are multiples of the output stride. F1 has half the image's side, F2 a quarter, F3 an
    eighth, F4 and F5 are smaller by the output stride, which is 8 or 16.

    For inference an ``nn.BatchNorm2d`` is folded into the convolution just before it where both are
    of one ``nn.Sequential``, or are called ``conv1`` and ``bn1`` and so on; others stay. A model
    is loaded without initial values (``weight.is_meta`` while it is made), so whatever it computes
    with must be in its ``state_dict``.
    """

    name: str  # under which registry.py has it
    output_stride: int  # pixels of a cell of F5, along each side
    channels: tuple[int, int, int, int, int]  # of F1 .. F5

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        raise NotImplementedError
