# SPDX-License-Identifier: Apache-2.0
"""How much memory the machine, or the container, is taken to have."""

from __future__ import annotations

import pytest

from fastproto import _memory


@pytest.mark.parametrize(
    ("limit", "expected"), [("max\n", 2**60), ("1048576\n", 2**20), (None, 2**60)]
)
def test_a_container_may_have_less_than_its_machine(limit, expected, tmp_path, monkeypatch) -> None:
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(_memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(_memory.os, "sysconf", lambda name: 2**30)
    assert _memory.machine_memory() == expected
