# SPDX-License-Identifier: Apache-2.0
"""Calling SimpleITK: silently, and with errors of our own."""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from fastproto.errors import GeometryError, VolumeError


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence file descriptor 2 while native code runs.

    ITK, MetaIO, GDCM and niftilib each write diagnostics there that no SimpleITK switch turns off.
    What they complain about is checked and reported by the caller, with the file's name.
    """
    try:
        saved = os.dup(2)
    except OSError:  # the process has no stderr
        yield
        return
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


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
    """
    try:
        yield
    except MemoryError as error:
        raise VolumeError(
            path,
            found=f"a volume larger than the memory that is free ({error or 'it was used up'})",
            allowed="one that fits",
            fix="End other programs, or crop or resample it; is it that large at all?",
        ) from error
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
