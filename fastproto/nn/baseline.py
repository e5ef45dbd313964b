# SPDX-License-Identifier: Apache-2.0
"""The baseline every claim is measured against: prototype scores, upsampled, without a decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastproto.nn.base import Features, FewShotModel
from fastproto.nn.prototypes import Prototypes, prototype_scores


class PrototypeNet(FewShotModel):
    """Prototype scores at the bottleneck, bilinear upsampling to full size.

    The arguments are those of :class:`fastproto.nn.FewShotUNet`; at an output stride of 8 the
    bottleneck of a 256 x 256 image is 32 x 32.

    Raises:
        ArgumentError: An argument out of its range.
        CheckpointError: Weights that cannot be loaded.

    Example:
        >>> model = PrototypeNet().eval()
        >>> images, masks = torch.randn(1, 1, 3, 256, 256), torch.randint(0, 2, (1, 1, 256, 256))
        >>> model(images, masks, images).shape
        torch.Size([1, 1, 2, 256, 256])
    """

    def __init__(
        self, encoder: str = "resnet101", output_stride: int = 8, *args: Any, **options: Any
    ):
        super().__init__(encoder, output_stride, *args, **options)

    @classmethod
    def from_unet(cls, model: FewShotModel) -> PrototypeNet:
        """The training-free baseline: the encoder of ``model``, shared, without its decoder."""
        with torch.device("meta"):
            baseline = cls(**model.config)
        baseline.encoder = model.encoder
        baseline.backend = model.backend
        baseline.training = model.training
        return baseline

    def decode(self, features: Features, prototypes: Prototypes) -> Tensor:
        feat = features.bottleneck
        scores = prototype_scores(feat, prototypes, temperature=self.temperature)
        return upsample_scores(scores, self.encoder.output_stride, features.size)


def upsample_scores(scores: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """``[E, Q, K, h, w]`` at the bottleneck -> ``[E, Q, K, H, W]``, bilinear, padding cut off."""
    full = F.interpolate(
        scores.flatten(0, 1), scale_factor=float(stride), mode="bilinear", align_corners=False
    )
    height, width = size
    return full[..., :height, :width].unflatten(0, scores.shape[:2])
