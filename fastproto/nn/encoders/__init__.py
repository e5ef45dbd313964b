# SPDX-License-Identifier: Apache-2.0
"""Networks that turn images into feature maps."""

from __future__ import annotations

from fastproto.nn.encoders.resnet import ResNetEncoder

__all__ = ["ResNetEncoder"]
