# SPDX-License-Identifier: Apache-2.0
"""The op on a GPU: what can run there, and what cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastproto import proto_attention
from fastproto.errors import ArgumentError
from fastproto.op import backends, library
from support.conformance import Op
from support.problems import Problem

BACKENDS = ("native", "triton")


def skip_without(backend: str, device: str) -> None:
    """Skip where a backend cannot run. That its library is there and does not load is a failure."""
    broken = library.cuda_is_broken()
    assert backend != "native" or broken is None, broken
    reason = backends.why_not(backend, device)
    if reason is not None:
        pytest.skip(f"backend {backend} cannot run on {device}: {reason}")


def op(backend: str) -> Op:
    """``proto_attention`` on that backend."""

    def call(feat: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dim = backends.padded_dim(feat.shape[2])
        reason = backends.why_not(backend, feat.device, feat.dtype, dim)
        if reason is not None and "shared memory" in reason:  # of this chip
            pytest.skip(reason)
        return proto_attention(feat, *args, backend=backend, **kwargs)

    return call


def with_tf32(call: Op) -> Op:
    """In the setting that allows one TF32 product; the backward runs in that of its forward."""

    def coarse(*args: Any, **kwargs: Any) -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return call(*args, **kwargs)
        finally:
            torch.set_float32_matmul_precision(before)

    return coarse


def refusal(problem: Problem, dtype: torch.dtype) -> str | None:
    """What the plan says where the family that is forced does not take a problem."""
    last = problem.layout == "channels_last"
    try:
        backends.explain(**problem.sizes, dtype=dtype, channels_last=last, save=True)
    except ArgumentError as error:
        return str(error)
    return None
