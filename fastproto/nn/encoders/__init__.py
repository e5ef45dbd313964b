# SPDX-License-Identifier: Apache-2.0
"""Networks that turn images into feature maps; registry.py lists them."""

from __future__ import annotations

from fastproto.nn.encoders.encoder import Encoder
from fastproto.nn.encoders.registry import ENCODERS, Entry, make_encoder
from fastproto.nn.encoders.resnet import ResNetEncoder

__all__ = ["ENCODERS", "Encoder", "Entry", "ResNetEncoder", "make_encoder"]
