# SPDX-License-Identifier: Apache-2.0
"""The oldest versions that pyproject.toml allows are those that `make test-floors` installs."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_INSTALLED = "torch"  # stays as it is


def floors() -> dict[str, str]:
    """Name -> version of constraints-floor.txt."""
    lines = (ROOT / "constraints-floor.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and line[0] != "#")


def test_every_dependency_has_its_floor_there():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
    allowed = dict(re.findall(r'"([\w-]+)>=([\d.]+)', block))
    del allowed[NOT_INSTALLED]
    found = floors()
    assert found.keys() == allowed.keys()
    for name, version in allowed.items():
        assert found[name] == version or found[name].startswith(f"{version}."), name


@pytest.mark.skipif("build/floors" not in os.environ.get("PYTHONPATH", ""), reason="test-floors")
def test_the_floors_are_what_is_tested():
    for name, version in floors().items():
        assert importlib.metadata.version(name) == version
