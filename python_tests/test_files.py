# SPDX-License-Identifier: Apache-2.0
"""What is left of a killed write goes with the next one; of two processes in a folder one works."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastproto import _files
from fastproto._files import alone_in, atomic_write, check_writable, write_text
from fastproto.errors import FastprotoWarning, OutputError

WRITE = """
with atomic_write(folder / "a.txt") as temporary:
    temporary.write_text("half")
    (temporary.parent / ".tmpAbc").write_text("a library's own")
    print("now", flush=True); time.sleep(60)
"""
WORK = "with alone_in(folder): print('now', flush=True); time.sleep(60)"


@contextlib.contextmanager
def living(body: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the midst of ``body``, killed in the end."""
    code = "import time, pathlib\nfrom fastproto._files import alone_in, atomic_write\n"
    code += f"folder = pathlib.Path({str(folder)!r})\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code + body], cwd=folder.parent, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"now\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob(".partial-*"))


def test_the_next_write_removes_what_a_killed_one_left_and_nothing_that_lives(tmp_path: Path):
    write_text(tmp_path / "a.txt", "whole")
    foreign = [tmp_path / ".partial-foreign", tmp_path / ".partial-host-of-a-shared-disk-abc"]
    foreign[0].write_text("perhaps of an earlier version that is writing it")
    foreign[1].mkdir()
    with living(WRITE, tmp_path):
        write_text(tmp_path / "b.txt", "b")
        (theirs,) = set(leftovers(tmp_path)) - {*foreign}
        assert (theirs / "a.txt").read_text() == "half"
    assert theirs.is_dir()
    write_text(tmp_path / "b.txt", "again")
    assert {*leftovers(tmp_path)} == {*foreign}
    os.utime(foreign[0], (0, 0))
    write_text(tmp_path / "b.txt", "once more")
    assert leftovers(tmp_path) == foreign[1:]
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_a_write_that_fails_leaves_nothing(tmp_path: Path):
    write_text(tmp_path / "a.txt", "whole")
    with contextlib.suppress(KeyboardInterrupt), atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_a_file_may_be_called_lock(tmp_path: Path):
    write_text(tmp_path / "lock", "text")
    assert (tmp_path / "lock").read_text() == "text"
    assert not leftovers(tmp_path)


def test_a_written_file_has_the_mode_of_any_other(tmp_path: Path):
    with atomic_write(tmp_path / "a.nii.gz") as temporary:
        assert temporary.name == "a.nii.gz"
        temporary.touch(0o600)
    (tmp_path / "b").touch()
    assert (tmp_path / "a.nii.gz").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_second_process_in_a_folder_is_refused_until_the_first_is_gone(tmp_path: Path):
    folder = tmp_path / "run"
    with living(WORK, folder):
        write_text(folder / "a.txt", "the lock is no leftover")
        with pytest.raises(OutputError, match="another process is working in it"), alone_in(folder):
            pass
    with alone_in(folder):
        (held,) = leftovers(folder)
        with pytest.raises(OutputError), alone_in(folder):
            pass
        if not os.fork():  # a worker of this process that outlives it does not keep the lock
            os._exit(len(_files._locks))
        assert os.wait()[1] == 0
        assert held.is_dir()
    assert not leftovers(folder)


def test_a_folder_made_for_nothing_goes(tmp_path: Path):
    with pytest.raises(KeyError), alone_in(tmp_path / "run"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_locked_it_says_so_and_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with living(WRITE, tmp_path):
        pass
    (left,) = leftovers(tmp_path)

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(_files.fcntl, "flock", unsupported)
    with (
        pytest.warns(FastprotoWarning, match=r"cannot be locked \(No locks available\)"),
        alone_in(tmp_path),
    ):
        write_text(tmp_path / "a.txt", "text")
    monkeypatch.setattr(_files, "fcntl", None)
    write_text(tmp_path / "a.txt", "other")
    assert set(tmp_path.iterdir()) == {tmp_path / "a.txt", left}  # whose it is cannot be known
    assert (tmp_path / "a.txt").read_text() == "other"


def test_whether_a_path_can_be_written_is_known_before(tmp_path: Path):
    check_writable(tmp_path / "new" / "deep" / "a.txt")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path, found in (
        (tmp_path, "a folder"),
        (tmp_path / "file" / "a.txt", "Not a directory"),
        (tmp_path / "link" / "a.txt", "No such file"),
        (Path("/proc/none/a.txt"), "No such file"),
        (tmp_path / ("a" * 300) / "a.txt", "File name too long"),
    ):
        with pytest.raises(OutputError, match=found):
            check_writable(path)
    for write in (atomic_write, alone_in):
        with pytest.raises(OutputError, match="File name too long"), write(tmp_path / ("a" * 300)):
            pass
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


def test_a_file_that_may_not_grow_is_told_and_leaves_the_old_one(tmp_path: Path):
    """By a limit on the size of files, which any user can set."""
    write_text(tmp_path / "a.txt", "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OutputError, match="File too large"):
            write_text(tmp_path / "a.txt", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_a_disk_that_is_full_is_told_and_leaves_the_old_file(tmp_path: Path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs may be mounted here ({error})")
    try:
        write_text(tmp_path / "a.txt", "whole")
        with pytest.raises(OutputError, match="No space left on device"):
            write_text(tmp_path / "a.txt", "x" * 100_000)
        assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
        assert (tmp_path / "a.txt").read_text() == "whole"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
