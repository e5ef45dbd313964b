# SPDX-License-Identifier: Apache-2.0
"""The kill campaign of scripts/, with a few moments."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "kill_campaign.py"


def test_commands_that_are_ended_go_on_as_if_nothing_had_been():
    command = [sys.executable, str(SCRIPT), "--moments", "3", "--others", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^(\w+, .+?) +(\d+) tries, +(\d+) ended early, 0 failed$", done.stdout, re.M)
    found = {kind: (int(tries), int(early)) for kind, tries, early in rows}
    assert found["train, two processes"] == (1, 1)
    for name in ("train", "learn", "segment"):
        assert found[f"{name}, SIGKILL"][0] == 3
        for kind in ("SIGINT", "file size limit"):
            assert found[f"{name}, {kind}"][0] == 1
    assert sum(early for kind, (_, early) in found.items() if "SIGKILL" in kind) > 0
    if "train, full tmpfs" not in found:
        pytest.skip("no tmpfs may be mounted here; a limit on the size of files stood in for it")
