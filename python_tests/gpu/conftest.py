# SPDX-License-Identifier: Apache-2.0
"""Tests that need an NVIDIA GPU: ``pytest python_tests/gpu -m gpu``, or ``make gpu-check``."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastproto import proto_attention
from fastproto.op import backends, library

FOLDER = Path(__file__).parent
BACKENDS = ("native", "triton")
TEST_SECONDS = 120  # of a test, compilations included

Op = Callable[..., Tensor]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder."""
    for item in items:
        if item.path.is_relative_to(FOLDER):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _ends_in_time() -> Iterator[None]:
    """A kernel that hangs ends its process: Python never hears of a signal there."""
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(TEST_SECONDS)
    yield
    if hasattr(signal, "SIGALRM"):
        signal.alarm(0)


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")


@pytest.fixture
def device() -> str:
    """Where the tests run."""
    return "cuda"


def skip_without(backend: str, device: str) -> None:
    """Skip where a backend cannot run. That its library is there and does not load is a failure."""
    broken = library.cuda_is_broken()
    assert backend != "native" or broken is None, broken
    reason = backends.why_not(backend, device)
    if reason is not None:
        pytest.skip(f"backend {backend} cannot run on {device}: {reason}")


@pytest.fixture
def needs_native(device: str) -> None:
    """For tests of the native backend alone."""
    skip_without("native", device)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, device: str) -> str:
    """Every backend of this package that can run on the GPU."""
    name: str = request.param
    skip_without(name, device)
    return name


@pytest.fixture
def op(backend: str) -> Op:
    """``proto_attention`` on that backend."""

    def call(feat: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dim = backends.padded_dim(feat.shape[2])
        reason = backends.why_not(backend, feat.device, feat.dtype, dim)
        if reason is not None and "shared memory" in reason:  # of this chip
            pytest.skip(reason)
        return proto_attention(feat, *args, backend=backend, **kwargs)

    return call


@pytest.fixture(autouse=True)
def _restore_settings() -> Iterator[None]:
    """What tests here may set for the whole process."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch's default
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
