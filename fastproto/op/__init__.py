# SPDX-License-Identifier: Apache-2.0
"""The op below ``fastproto.functional``: reference, native and Triton kernels, and the choice."""

from __future__ import annotations

from fastproto.op import backends

__all__ = ["backends"]
