# SPDX-License-Identifier: Apache-2.0
"""Writing files so that a crash, a full disk or a second reader never sees half of one."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fastproto.errors import OutputError, require, warn

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_PARTIAL = ".partial-"  # how the names of temporary folders begin
_OURS = _PARTIAL + re.sub(r"\W", "_", socket.gethostname()) + "-"  # and those of this machine
_LOCK = _PARTIAL + "lock"  # in such a folder, beside a file that may have any other name
_DAY = 86400  # seconds
_FIX = "Choose another output path or free some space; nothing was overwritten."
_locks: dict[int, Path] = {}  # handles that keep the locks of this process, on which folders


def _close_locks() -> None:
    """In a forked process: what its parent holds must end with the parent."""
    while _locks:
        os.close(_locks.popitem()[0])


if fcntl is not None:
    os.register_at_fork(after_in_child=_close_locks)


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
    """Yield a temporary path of the same name; on success it replaces ``path`` in one step.

    It lies in a folder ``.partial-*`` beside ``path``, and so does whatever else a writer puts
    beside it. If the body raises, the folder is removed and an existing ``path`` is left as it was;
    if the process is killed, the next write beside it on the same machine removes the folder, where
    the file system has locks. Missing parent folders are made.

    Raises:
        OutputError: The folder cannot be made or written, the disk is full, or ``path`` is one.
    """
    path = Path(path)
    with writing(path, _FIX):
        _require_no_folder(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        with _partial_folder(path.parent) as folder:
            temporary = folder / path.name
            yield temporary
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
            mask = os.umask(0o022)  # which some writers ignore: they make 0600 files
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
            os.replace(temporary, path)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out before a long computation whether ``path`` can be written; nothing is left behind.

    Raises:
        OutputError: The folder cannot be made or written, or ``path`` is one.
    """
    path = Path(path)
    with writing(path, _FIX):
        _require_no_folder(path)
        existing = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        with tempfile.TemporaryDirectory(prefix=_OURS, dir=existing, ignore_cleanup_errors=True):
            pass


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes from working in ``folder`` meanwhile.

    A missing folder is made, and removed in the end if nothing has come into it.
    The lock is the kernel's and ends with the process, however that ends. Where the file system
    has none, there is a warning instead.

    Raises:
        OutputError: Another process works there, or the folder cannot be made or written.
    """
    held, lock = folder / f"{_PARTIAL}run", None
    with writing(folder, _FIX):
        made = not folder.exists()
        held.mkdir(parents=True, exist_ok=True)
        try:
            lock = _hold(held)
            free = lock is not None
        except NotImplementedError as error:
            warn(folder, f"it cannot be locked ({error}); let no other process write there.")
            free = True
    require(
        free,
        folder,
        found="that another process is working in it",
        allowed="one process at a time",
        fix="Wait for it to end, or choose another folder.",
        error=OutputError,
    )
    try:
        yield
    finally:
        _release(held, lock)
        if made:
            with contextlib.suppress(OSError):  # where it is not empty
                folder.rmdir()


def abandon() -> None:
    """Remove what this process is writing, where it ends without unwinding."""
    for lock, folder in list(_locks.items()):
        _release(folder, lock)


def _require_no_folder(path: Path) -> None:
    allowed = "a file path to write to"
    require(not path.is_dir(), path, found="a folder", allowed=allowed, error=OutputError)


@contextlib.contextmanager
def _partial_folder(parent: Path) -> Iterator[Path]:
    """A new folder that is removed in the end, and that shows that its process lives."""
    while True:
        folder, lock = Path(tempfile.mkdtemp(prefix=_OURS, dir=parent)), None
        try:
            try:
                lock = _hold(folder)
            except NotImplementedError:
                pass
            else:
                if lock is None:  # another process took the new folder for a leftover
                    continue
            yield folder
            return
        finally:
            _release(folder, lock)


def _remove_leftovers(parent: Path) -> None:
    """Remove what killed processes of this machine were writing in a folder.

    On a shared disk a lock may be unknown to other machines. A plain file is of an earlier version,
    which had no locks.
    """
    for path in parent.glob(f"{_PARTIAL}*"):
        # Whose it is, and whether anyone writes it, is not always to be found out.
        with contextlib.suppress(OSError, NotImplementedError):
            if path.is_file():
                if time.time() - path.stat().st_mtime > _DAY:
                    path.unlink()
            elif path.name.startswith(_OURS) and (lock := _hold(path)) is not None:
                _release(path, lock)


def _hold(folder: Path) -> int | None:
    """Lock a temporary folder as long as this process lives; None where another one has it.

    Raises:
        NotImplementedError: This system, or the file system, has no locks.
    """
    if fcntl is None:
        raise NotImplementedError("no locks on this system")
    try:
        # A file in it: some network file systems lock no folder.
        lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    except FileNotFoundError:  # removed just now
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(folder / _LOCK)):
            _locks[lock] = folder
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass  # another process has it, or had it and has removed it
    except OSError as error:
        os.close(lock)
        raise NotImplementedError(error.strerror) from error
    os.close(lock)
    return None


def _release(folder: Path, lock: int | None) -> None:
    """Remove a temporary folder; a forked process leaves those of its parent."""
    if lock is None or lock in _locks:
        shutil.rmtree(folder, ignore_errors=True)
    if lock in _locks:
        del _locks[lock]
        os.close(lock)


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
