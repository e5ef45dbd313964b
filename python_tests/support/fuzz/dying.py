# SPDX-License-Identifier: Apache-2.0
"""A process of the campaign that dies and hangs; here, where a new process can import it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any


def die_and_hang(channel: Any, todo: list[tuple[str, int]], seed: int, folder: Path) -> None:
    channel.send("ready")
    for _, index in todo:
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 4:
            time.sleep(60)
        channel.send(("equal", ""))
