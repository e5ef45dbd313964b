# SPDX-License-Identifier: Apache-2.0
"""Errors of our own for what fails in reading a file, here or in SimpleITK."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from fastproto._memory import enough_memory
from fastproto.errors import GeometryError, VolumeError


@contextlib.contextmanager
def overheard() -> Iterator[list[str]]:
    """Collect what native code writes to file descriptor 2 meanwhile, line by line.

    ITK and GDCM complain there about what they then make up, and no switch of SimpleITK tells.
    """
    lines: list[str] = []
    sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:  # the process has no stderr
        yield lines
        return
    with tempfile.TemporaryFile() as said:
        try:
            os.dup2(said.fileno(), 2)
            yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            said.seek(0)
            lines += said.read().decode(errors="replace").split("\n")[:-1]


def reason(error: BaseException) -> str:
    """What was wrong, on one line; of a SimpleITK error the sentence that says it.

    Paths are left out: the caller names the file, and those of ITK's source are for -v.
    """
    text = re.split(r"ERROR: ", str(error))[-1]
    text = re.sub(r"^\w+\(0x[0-9a-f]+\): ", "", text)
    return " ".join(re.sub(r"\S*[/\\]\S*", "the file", text).split())


@contextlib.contextmanager
def reading(path: Path, fix: str = "Copy or export the file again.") -> Iterator[None]:
    """Turn what reading a file raises, here or in SimpleITK, into one message.

    Raises:
        VolumeError, GeometryError: Of the file at ``path``.
        ResourceError: It does not fit into memory.
    """
    try:
        with enough_memory(path):
            yield
    except (RuntimeError, OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.strerror:  # missing, or no permission
            found, missing = f"that {error.filename or path} cannot be read", error.strerror
            allowed = "a file, and those that it names, that can be opened"
            raise VolumeError(path, found=f"{found} ({missing})", allowed=allowed) from error
        of_grid = isinstance(error, RuntimeError) and re.search("spacing|cosines", str(error))
        raise (GeometryError if of_grid else VolumeError)(
            path,
            found=f"a damaged, truncated or unreadable file ({reason(error)})",
            allowed="a complete, valid volume",
            fix=fix,
        ) from error
