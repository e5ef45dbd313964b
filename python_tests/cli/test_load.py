# SPDX-License-Identifier: Apache-2.0
"""The load campaign, small: twelve scans, one broken, one ten times as large."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "load_campaign.py"


@pytest.mark.slow
def test_a_folder_with_a_broken_and_a_large_scan(tmp_path: Path):
    command = [sys.executable, SCRIPT, "--scans", "12", "--large", "128", "128", "30"]
    done = subprocess.run([*command, "--folder", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "summary: fastproto: 1 of 12 scans failed" in done.stdout
    assert not list(tmp_path.iterdir())
