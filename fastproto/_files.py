# SPDX-License-Identifier: Apache-2.0
"""Writing files so that a crash, a full disk or a second reader never sees half of one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastproto.errors import OutputError, require


@contextlib.contextmanager
def writing(path: Path, fix: str) -> Iterator[None]:
    """Turn what writing ``path`` raises into one message.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            path,
            found=f"that it cannot be written ({error.strerror or error})",
            allowed="a writable folder with free space",
            fix=fix,
        ) from error


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path`` in one step.

    The temporary name keeps the file's suffixes (``.nii.gz``), because writers choose their format
    by them. If the body raises, the temporary file is removed and an existing ``path`` is left as
    it was. Missing parent folders are made.

    Raises:
        OutputError: The folder cannot be made or written, the disk is full, or ``path`` is one.
    """
    path = Path(path)
    allowed = "a file path to write to"
    require(not path.is_dir(), path, found="a folder", allowed=allowed, error=OutputError)
    with writing(path, "Choose another output path or free some space; nothing was overwritten."):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=".partial-", suffix="".join(path.suffixes[-2:]), dir=path.parent
        )
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
            mask = os.umask(0o022)  # which mkstemp ignores: it always makes 0600 files
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_text(path: Path, text: str) -> None:
    """Add ``text`` to the end of ``path``, as UTF-8: others may add to it as well.

    Raises:
        OutputError: It cannot be written.
    """
    with (
        writing(path, "Free some space and run the same command again."),
        open(path, "a", encoding="utf-8") as file,
    ):
        file.write(text)


def cache_folder() -> Path:
    """Where downloads are kept: ``FASTPROTO_CACHE``, or ~/.cache/fastproto."""
    return Path(os.environ.get("FASTPROTO_CACHE") or Path.home() / ".cache" / "fastproto")
