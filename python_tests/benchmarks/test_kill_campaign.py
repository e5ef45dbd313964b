# SPDX-License-Identifier: Apache-2.0
"""The kill campaign of scripts/, with a few moments."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "kill_campaign.py"


@pytest.mark.slow
def test_killed_commands_go_on_as_if_nothing_had_been():
    """The other ways to end a command cost too much here: test_files.py, cli/test_process.py."""
    command = [sys.executable, str(SCRIPT), "--moments", "3", "--others", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^(\w+), SIGKILL +3 tries, +(\d) ended early, 0 failed$", done.stdout, re.M)
    assert {name for name, _ in rows} == {"train", "learn", "segment"}
    assert sum(int(early) for _, early in rows) > 0
