# SPDX-License-Identifier: Apache-2.0
"""The networks and their parts."""

from __future__ import annotations

from fastproto.nn.baseline import PrototypeNet
from fastproto.nn.encoders import ResNetEncoder
from fastproto.nn.few_shot_unet import FewShotUNet
from fastproto.nn.proto_attention import ProtoAttention
from fastproto.nn.prototypes import (
    Prototypes,
    class_masks,
    extract_prototypes,
    prototype_scores,
)

__all__ = [
    "FewShotUNet",
    "ProtoAttention",
    "PrototypeNet",
    "Prototypes",
    "ResNetEncoder",
    "class_masks",
    "extract_prototypes",
    "prototype_scores",
]
