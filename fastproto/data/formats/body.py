# SPDX-License-Identifier: Apache-2.0
"""The voxels of a file: bytes, plain or deflated, between a header and the end.

There must be exactly as many as the header promises. Voxels that are too few, too many, damaged or
in another place are refused, never filled up.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from fastproto.data.formats.checks import blocks, check_bytes, require_volume
from fastproto.errors import warn

GZIP, ZLIB = 31, 15  # zlib's numbers for the two kinds of streams
_EITHER = 47
_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 20
_BLOCK_VOXELS = 1 << 20
_LEVEL = 4
# The most that deflate can compress (https://zlib.net/zlib_tech.html), rounded up.
_LARGEST_RATIO = 1040
_POINTERS = {
    b"version https://git-lfs": ("a Git LFS pointer", "git lfs pull"),
    b"/annex/objects/": ("a git-annex pointer", "git annex get (or datalad get)"),
}


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """The file's bytes.

    Raises:
        VolumeError: The file only points to its content, which Git has not fetched.
        OSError: It cannot be opened.
    """
    special = path.exists() and not path.is_file()
    allowed = "a file with the volume"
    require_volume(not special, path, found="a device, pipe or folder", allowed=allowed)
    with open(path, "rb") as file:
        for start, (what, command) in _POINTERS.items():
            require_volume(
                not file.peek(len(start)).startswith(start),
                path,
                found=f"{what}, not the file itself",
                allowed="the file's content",
                fix=f"Fetch it with {command}.",
            )
        yield file


def data_file(header: Path, name: str) -> Path:
    """The one file beside a header that holds its voxels.

    Raises:
        VolumeError: The header names several.
    """
    require_volume(
        "%" not in name and not name.upper().startswith("LIST"),
        header,
        found=f"voxels in several files ({name})",
        allowed="voxels in one file",
        fix="Save the volume as one file.",
    )
    require_volume("\0" not in name, header, found=f"file name {name!r}", allowed="a file's name")
    return header.parent / name


def is_gzip(file: io.BufferedReader) -> bool:
    """Whether what comes next begins as gzip's."""
    return file.peek(2)[:2] == _GZIP_MAGIC


def inflated(file: io.BufferedReader) -> io.BufferedReader:
    """What follows in ``file``, a gzip or zlib stream, decompressed.

    Reading raises EOFError where the stream has no end and zlib.error where it is damaged; to be
    sure of its checksum, read to the end.
    """
    return io.BufferedReader(_Inflated(file), _CHUNK_BYTES)


def skip(stream: io.BufferedReader, size: int) -> None:
    """Pass over bytes, or over all where there are fewer."""
    while size > 0 and (chunk := stream.read(min(size, _CHUNK_BYTES))):
        size -= len(chunk)


def seek_from_end(file: io.BufferedReader, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Go to where the file's last bytes are voxels, but not back."""
    size = os.fstat(file.fileno()).st_size
    file.seek(max(size - math.prod(shape) * dtype.itemsize, file.tell()))


def read_array(
    path: Path,
    stream: io.BufferedReader,
    shape: tuple[int, ...],
    dtype: np.dtype,
    slope: float = 1.0,
    intercept: float = 0.0,
) -> np.ndarray:
    """All that is left of ``stream`` as an array of ``shape``, in the machine's byte order.

    Slope and intercept are applied in float64; integers become float32, real numbers keep their
    type. Beside the array there are never more than some MB.

    Raises:
        VolumeError: Not exactly the bytes of ``shape``.
        MemoryError: With the MB that the array needs.
        OSError, EOFError, zlib.error: Unreadable.
    """
    promised = math.prod(shape) * dtype.itemsize
    size = os.fstat(stream.fileno()).st_size
    compressed = stream.raw if isinstance(stream.raw, _Inflated) else None
    if compressed is None:
        check_bytes(path, size - stream.tell(), promised)
    require_volume(
        promised <= size * _LARGEST_RATIO,
        path,
        found=f"{size} bytes of compressed data where the header promises {promised} of voxels",
        allowed="a complete file",
        fix="The file is truncated or its header damaged: copy or export it again.",
    )
    scaled = (slope, intercept) != (1, 0)
    target = np.dtype("f4") if scaled and dtype.kind != "f" else dtype.newbyteorder("=")
    try:
        array = np.empty(shape, target)
    except MemoryError as error:
        needed = math.prod(shape) * target.itemsize
        raise MemoryError(f"unable to allocate {needed / 1e6:.0f} MB") from error
    flat = array.reshape(-1)
    for start in range(0, flat.size, _BLOCK_VOXELS):
        part = flat[start : start + _BLOCK_VOXELS]
        data = stream.read(part.size * dtype.itemsize)
        if len(data) < part.size * dtype.itemsize:
            check_bytes(path, start * dtype.itemsize + len(data), promised)
        values = np.frombuffer(data, dtype)
        with np.errstate(over="ignore"):
            part[...] = values.astype(np.float64) * slope + intercept if scaled else values
    extra = sum(map(len, iter(partial(stream.read, _CHUNK_BYTES), b"")))
    check_bytes(path, promised + extra, promised)
    if compressed is not None and compressed.trailing:
        warn(path, "the file goes on after the end of its compressed data; the rest is ignored.")
    return array


def deflated(array: np.ndarray, kind: int, before: bytes = b"") -> Iterator[bytes]:
    """``before`` and the bytes of ``array``, little-endian, as a GZIP or ZLIB stream."""
    encoder = zlib.compressobj(_LEVEL, zlib.DEFLATED, kind)
    yield encoder.compress(before)
    for block in blocks(array):
        little = block.dtype.newbyteorder("<")
        yield encoder.compress(np.ascontiguousarray(block, little).data)
    yield encoder.flush()


class _Inflated(io.RawIOBase):
    """Streams one after another, as gzip allows; ``trailing`` says whether something else follows.

    Python's gzip module takes what follows for a damaged stream.
    """

    def __init__(self, file: io.BufferedReader):
        self._file = file
        self._data = b""
        self._decoder = zlib.decompressobj(_EITHER)
        self.trailing = False

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._decoder.eof or self._next_stream():
            data = self._data or self._file.read(_CHUNK_BYTES)
            found = self._decoder.decompress(data, len(buffer))
            self._data = self._decoder.unconsumed_tail
            if found:
                buffer[: len(found)] = found
                return len(found)
            if not data and not self._decoder.eof:
                raise EOFError("the compressed data have no end")
        return 0

    def _next_stream(self) -> bool:
        """Go on with what follows a stream, if that is another one; zeros are padding."""
        rest = self._decoder.unused_data.lstrip(b"\0")
        while not rest and (more := self._file.read(_CHUNK_BYTES)):
            rest = more.lstrip(b"\0")
        rest += self._file.read(1)  # of a magic number that was cut in two
        if not rest.startswith(_GZIP_MAGIC):
            self.trailing = self.trailing or bool(rest)
            return False
        self._data, self._decoder = rest, zlib.decompressobj(_EITHER)
        return True
