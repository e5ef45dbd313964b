# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
