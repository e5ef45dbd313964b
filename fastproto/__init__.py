# SPDX-License-Identifier: Apache-2.0
"""Segment an organ nobody trained for, in CT and MR, from one annotated example."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastproto import _lazy
from fastproto._version import __version__

if TYPE_CHECKING:
    from fastproto.errors import FastprotoError, InputError
    from fastproto.functional import proto_attention
    from fastproto.nn import FewShotUNet, ProtoAttention, PrototypeNet, Prototypes
    from fastproto.op import backends

__all__ = [
    "FastprotoError",
    "FewShotUNet",
    "InputError",
    "ProtoAttention",
    "PrototypeNet",
    "Prototypes",
    "__version__",
    "backends",
    "proto_attention",
]

# Loaded on first use, so that `fastproto --help` does not wait for torch.
__getattr__ = _lazy.attributes(
    __name__,
    {
        "FastprotoError": "errors",
        "InputError": "errors",
        "backends": "op",
        "proto_attention": "functional",
        **dict.fromkeys(("FewShotUNet", "ProtoAttention", "PrototypeNet", "Prototypes"), "nn"),
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
