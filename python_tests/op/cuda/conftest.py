# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend, run lane by lane on the CPU."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def gpu() -> ModuleType:
    """support.emulator with its library loaded; skipped where it cannot be built."""
    from support import emulator

    if emulator.compiler() is None:
        pytest.skip("no C++ compiler")
    emulator.load()
    return emulator
