# SPDX-License-Identifier: Apache-2.0
"""The log of a run: one JSON object a line, and TensorBoard events if wanted."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from fastproto._files import write_text, writing
from fastproto.errors import CheckpointError, import_extra


class RunLog(contextlib.AbstractContextManager["RunLog"]):
    """Appends records to ``log.jsonl``; each has a ``step``, and none appears twice.

    A resumed run repeats the steps after its checkpoint, so records after ``step`` (and a last
    line that a killed process left unfinished) are dropped first.

    Args:
        folder: Run folder.
        step: Last step that is done; 0 begins an empty log.
        tensorboard: Write the numbers as TensorBoard events under ``folder/tensorboard`` too.

    Raises:
        ArgumentError: TensorBoard is wanted and not installed.
        CheckpointError: The log that is there is damaged.
        OutputError: The log cannot be written.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool = False):
        self.path = folder / "log.jsonl"
        self._events = _open_events(folder / "tensorboard", step) if tensorboard else None
        kept = [line for line in _lines(self.path) if 0 < _step_of(self.path, line) <= step]
        write_text(self.path, "".join(line + "\n" for line in kept))
        with self._reporting():
            self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def write(self, step: int, **values: Any) -> None:
        """Append one record; its numbers become TensorBoard scalars."""
        with self._reporting():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._events.add_scalar(name, value, step)

    def sync(self) -> None:
        """Return when every record is on the disk, so that no checkpoint is ahead of its log."""
        with self._reporting():
            os.fsync(self._file.fileno())

    def _reporting(self) -> contextlib.AbstractContextManager[None]:
        return writing(self.path, "Free some space and resume the run.")

    def __exit__(self, *error: object) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a run so far, which may still go on.

    Raises:
        CheckpointError: The log is damaged.
    """
    path = folder / "log.jsonl"
    return [json.loads(line) for line in _lines(path) if _step_of(path, line) > 0]


def _lines(path: Path) -> list[str]:
    """The finished lines of a log; none where there is no log."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def _step_of(path: Path, line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            path,
            found=f"the line {line[:60]!r}",
            allowed="one JSON object with a step in each line",
            fix="Take that line out; the run itself is in state.safetensors.",
        ) from error


def _open_events(folder: Path, step: int) -> Any:
    writer = import_extra("tensorboard", "torch.utils.tensorboard").SummaryWriter
    return writer(folder, purge_step=step + 1)
