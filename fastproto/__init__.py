# SPDX-License-Identifier: Apache-2.0
"""Segment an organ nobody trained for, in CT and MR, from one annotated example."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

_HOMES = {
    "FastprotoError": "fastproto.errors",
    "InputError": "fastproto.errors",
    "backends": "fastproto.op",
    "proto_attention": "fastproto.functional",
    "FewShotUNet": "fastproto.nn",
    "ProtoAttention": "fastproto.nn",
    "PrototypeNet": "fastproto.nn",
    "Prototypes": "fastproto.nn",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `fastproto --help` does not wait for torch.
    if name in _HOMES:
        import importlib

        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
