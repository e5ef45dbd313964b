# SPDX-License-Identifier: Apache-2.0
"""MetaImage files (.mha, .mhd): what SimpleITK does not notice is checked on the bytes first.

A damaged or too short compressed stream is printed to stderr and otherwise ignored, so the volume
that comes back is partly made up; negative voxel sizes and NaN offsets are repaired in silence;
more than ten dimensions overrun a buffer of MetaIO's.
"""

from __future__ import annotations

import math
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import IO

from fastproto.data.formats.checks import (
    Voxels,
    check_complete,
    check_finite,
    check_spacing,
    require_volume,
)
from fastproto.data.formats.simpleitk import read_image
from fastproto.errors import VolumeError

_ITEM_BYTES = {"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "LONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}
_HEADER_LIMIT = 1 << 16
_CHUNK_BYTES = 1 << 20


def read(path: Path) -> Voxels:
    """Check geometry fields and, where it is compressed, the data; then let SimpleITK read.

    Raises:
        VolumeError, GeometryError: What the checks find.
        OSError, zlib.error, EOFError, RuntimeError: Unreadable.
    """
    with open(path, "rb") as file:
        header = _header(path, file)
        sizes = header.get("DimSize", "").split()
        usable = all(word.isdecimal() and int(word) for word in sizes)
        usable = usable and 1 <= len(sizes) <= 10 and str(len(sizes)) == header.get("NDims")
        found = f"NDims = {header.get('NDims')} and DimSize = {header.get('DimSize')}"
        require_volume(usable, path, found=found, allowed="as many sizes above 0 as dimensions")
        spacing = _numbers(path, header, "ElementSpacing", "ElementSize")
        check_spacing(path, spacing, "ElementSpacing")
        check_finite(path, "Offset", _numbers(path, header, "Offset", "Position", "Origin"))
        if header.get("CompressedData", "").lower() == "true":
            name = header["ElementDataFile"]
            local = name.upper() == "LOCAL"
            with nullcontext(file) if local else open(path.parent / name, "rb") as stream:
                _check_compressed(path, stream, header, math.prod(map(int, sizes)))
    return read_image(path)


def _header(path: Path, file: IO[bytes]) -> dict[str, str]:
    """The ``key = value`` lines up to ElementDataFile, after which the data begin."""
    fields: dict[str, str] = {}
    while file.tell() < _HEADER_LIMIT and (line := file.readline(_HEADER_LIMIT)):
        key, equals, value = line.decode("latin-1").partition("=")
        if not equals:
            break
        fields[key.strip()] = value.strip()
        if key.strip() == "ElementDataFile":
            return fields
    raise VolumeError(path, found="no MetaImage header", allowed="a .mha or .mhd file")


def _numbers(path: Path, header: dict[str, str], *names: str) -> list[float]:
    """The numbers of the first field of ``names`` that is there."""
    name = next((name for name in names if name in header), None)
    if name is None:
        return []
    try:
        return [float(word) for word in header[name].split()]
    except ValueError as error:
        raise VolumeError(path, found=f"{name} {header[name]}", allowed="numbers") from error


def _check_compressed(path: Path, stream: IO[bytes], header: dict[str, str], voxels: int) -> None:
    name = header.get("ElementType", "")
    item = _ITEM_BYTES.get(name.removeprefix("MET_").removesuffix("_ARRAY").removeprefix("U"), 0)
    require_volume(item, path, found=f"ElementType {name}", allowed="one number per voxel")
    channels = _numbers(path, header, "ElementNumberOfChannels") or [1]
    decoder = zlib.decompressobj()
    size = 0
    while not decoder.eof and (chunk := decoder.unconsumed_tail or stream.read(_CHUNK_BYTES)):
        size += len(decoder.decompress(chunk, _CHUNK_BYTES))
    size += len(decoder.flush())
    check_complete(path, size, int(voxels * channels[0] * item))
    if not decoder.eof:
        raise EOFError("the compressed data have no end")
