# SPDX-License-Identifier: Apache-2.0
"""The encoders there are, a line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fastproto.errors import require
from fastproto.nn.encoders.encoder import Encoder
from fastproto.nn.encoders.resnet import ResNetEncoder


class Entry(NamedTuple):
    """One encoder."""

    make: Callable[[str, int], Encoder]  # from name and output stride, with random weights
    imagenet: str | None = None  # torchvision's file; its name ends with the start of its SHA-256


ENCODERS = {
    "resnet18": Entry(ResNetEncoder, "resnet18-f37072fd.pth"),
    "resnet34": Entry(ResNetEncoder, "resnet34-b627a593.pth"),
    "resnet50": Entry(ResNetEncoder, "resnet50-0676ba61.pth"),
    "resnet101": Entry(ResNetEncoder, "resnet101-63fe2227.pth"),
}


def make_encoder(name: str, output_stride: int) -> Encoder:
    """The encoder of that name.

    Raises:
        ArgumentError: There is none, or it does not have this output stride.
    """
    require(name in ENCODERS, "encoder", found=repr(name), allowed=", ".join(ENCODERS))
    return ENCODERS[name].make(name, output_stride)
