# SPDX-License-Identifier: Apache-2.0
"""The network: prototypes at the bottleneck of a U-Net whose decoder treats every class alike."""

from __future__ import annotations

import os

from torch import Tensor

from fastproto import defaults
from fastproto.functional import proto_attention
from fastproto.nn.base import Features, FewShotModel
from fastproto.nn.decoder import UNetDecoder
from fastproto.nn.prototypes import Prototypes, check_prototypes


class FewShotUNet(FewShotModel):
    """Segments any class in a query image from a few annotated support images.

    A ResNet encodes support and query (F1..F5, F5 at 1/16 of the image). The support's masks pick
    the prototypes of each class from its F5; ``proto_attention`` aggregates them for every query
    feature, and one decoder, shared by all classes, turns ``[F ; G*F]`` of a class into its logit
    map through the query's skip connections. So a network trained with two classes serves any
    number, and renaming the classes only permutes the output.

    Args:
        encoder: ``"resnet34"``, or 18, 50, 101.
        output_stride: 16, or 8 for twice as many cells along each side at the bottleneck, at about
            three times the encoder's cost: for small images.
        weights: Of the encoder: None (random), ``"imagenet"`` or a path, see
            :func:`fastproto.nn.weights.load_encoder_weights`.
        temperature: t of the aggregation, above 0.
        mask_threshold: tau, the share of a cell that a class must exceed to give a prototype.
        append_global: Append the mask-weighted average to every bag that is not empty.
        backend: Backend of ``proto_attention``, or None for the best one that can run.

    Raises:
        ArgumentError: An argument out of its range.
        CheckpointError: Weights that cannot be loaded.

    Example:
        >>> model = FewShotUNet().eval()
        >>> support, masks = torch.randn(1, 5, 3, 256, 256), torch.randint(0, 2, (1, 5, 256, 256))
        >>> prototypes = model.encode_support(support, masks)
        >>> model.segment(torch.randn(1, 4, 3, 256, 256), prototypes).shape
        torch.Size([1, 4, 2, 256, 256])
    """

    def __init__(
        self,
        encoder: str = defaults.ENCODER,
        weights: str | os.PathLike[str] | None = None,
        *,
        output_stride: int = defaults.OUTPUT_STRIDE,
        temperature: float = defaults.TEMPERATURE,
        mask_threshold: float = defaults.MASK_THRESHOLD,
        append_global: bool = False,
        backend: str | None = None,
    ):
        super().__init__(
            encoder, output_stride, weights, temperature, mask_threshold, append_global
        )
        self.backend = backend
        self.decoder = UNetDecoder(self.encoder.channels, output_stride)

    def decode(self, features: Features, prototypes: Prototypes) -> Tensor:
        *skips, feat = features.maps
        check_prototypes(feat, prototypes)
        enhanced = proto_attention(
            feat,
            prototypes.protos,
            prototypes.offsets,
            temperature=self.temperature,
            concat=False,
            backend=self.backend,
        )  # G*F, [E, Q, K, D, h, w]
        logits = self.decoder(
            feat.flatten(0, 1), enhanced.flatten(0, 1), [skip.flatten(0, 1) for skip in skips]
        )
        height, width = features.size
        return logits[..., :height, :width].unflatten(0, feat.shape[:2])
