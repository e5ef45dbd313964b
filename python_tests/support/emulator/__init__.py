# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend without a GPU; ``library.py`` says how."""

from support.emulator.library import build, compiler, load, pretending, proto_attention

__all__ = ["build", "compiler", "load", "pretending", "proto_attention"]
