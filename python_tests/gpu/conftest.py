# SPDX-License-Identifier: Apache-2.0
"""Tests that need an NVIDIA GPU: ``pytest python_tests/gpu -m gpu``, or ``make gpu-check``."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import conformance
from support.conformance import gpu

FOLDER = Path(__file__).parent
TEST_SECONDS = 120  # of a test, compilations included


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


@pytest.fixture(params=gpu.BACKENDS)
def backend(request: pytest.FixtureRequest, device: str) -> str:
    """Every backend of this package that can run on the GPU."""
    name: str = request.param
    gpu.skip_without(name, device)
    return name


@pytest.fixture
def op(backend: str) -> conformance.Op:
    """``proto_attention`` on that backend."""
    return gpu.op(backend)


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
