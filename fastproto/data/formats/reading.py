# SPDX-License-Identifier: Apache-2.0
"""Errors of our own for what fails in reading a file, here or in SimpleITK."""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from fastproto._memory import enough_memory
from fastproto.errors import VolumeError


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
        VolumeError: Of the file at ``path``.
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
        raise VolumeError(
            path,
            found=f"a damaged, truncated or unreadable file ({reason(error)})",
            allowed="a complete, valid volume",
            fix=fix,
        ) from error
