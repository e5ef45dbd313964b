# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

try:
    from hypothesis import settings
except ImportError:  # the tests that need a GPU run without it
    settings = None

if settings is not None:
    # The same examples in every CI run, so that a failure is the change's; new ones on a desk.
    settings.register_profile("ci", derandomize=True)
    if os.environ.get("CI"):
        settings.load_profile("ci")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real scans; the test is skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FASTPROTO_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real scans at {folder}; set FASTPROTO_TEST_DATA to their folder")
    return folder


@pytest.fixture
def pretended_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's streams and captures on a CPU, where everything is done at once anyway."""

    @contextlib.contextmanager
    def nothing(*args: object, **kwargs: object):
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None, cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    for name in ("stream", "graph", "device"):
        monkeypatch.setattr(torch.cuda, name, nothing)
