# SPDX-License-Identifier: Apache-2.0
"""The baseline every claim is measured against: prototype scores, upsampled, without a decoder."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import functional as F

from fastproto import defaults
from fastproto.nn.base import Features, FewShotModel
from fastproto.nn.prototypes import Prototypes, prototype_scores


class PrototypeNet(FewShotModel):
    """Prototype scores at the bottleneck, bilinear upsampling to full size.

    Args:
        encoder: ``"resnet101"``, or 18, 34, 50.
        output_stride: 8 (a 32 x 32 bottleneck for 256 x 256) or 16.
        weights: Of the encoder: None (random), ``"imagenet"`` or a path.
        temperature: t of aggregation and scores, above 0.
        mask_threshold: tau, the share of a cell that a class must exceed to give a prototype.
        append_global: Append the mask-weighted average to every bag that is not empty.

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
        self,
        encoder: str = "resnet101",
        output_stride: int = 8,
        weights: str | os.PathLike[str] | None = None,
        temperature: float = defaults.TEMPERATURE,
        mask_threshold: float = defaults.MASK_THRESHOLD,
        append_global: bool = False,
    ):
        super().__init__(
            encoder, output_stride, weights, temperature, mask_threshold, append_global
        )

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
