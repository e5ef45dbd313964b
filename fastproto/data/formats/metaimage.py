# SPDX-License-Identifier: Apache-2.0
"""MetaImage files (.mha, .mhd): what SimpleITK does not notice is checked on the bytes first.

A damaged or too short compressed stream is printed to stderr and otherwise ignored, so the volume
that comes back is partly made up; negative voxel sizes and NaN offsets are repaired in silence;
more than ten dimensions overrun a buffer of MetaIO's.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import IO

from fastproto.data.formats.common import Voxels, read_image
from fastproto.errors import GeometryError, VolumeError, require

_ITEM_BYTES = {"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "LONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}
_HEADER_LIMIT = 1 << 16
_CHUNK_BYTES = 1 << 20


def read(path: Path) -> Voxels:
    """Check geometry fields and, where it is compressed, the data; then let SimpleITK read.

    Raises:
        VolumeError: The header or the compressed data are damaged or too short.
        GeometryError: Voxel sizes or offsets that cannot be used.
    """
    with open(path, "rb") as file:
        header = _header(path, file)
        shape = _shape(path, header)
        spacing = _numbers(path, header, "ElementSpacing", "ElementSize")
        require(
            all(math.isfinite(size) and size > 0 for size in spacing),
            path,
            error=GeometryError,
            found=f"ElementSpacing {', '.join(f'{size:g}' for size in spacing)}",
            allowed="finite sizes above 0 mm",
        )
        if not all(map(math.isfinite, _numbers(path, header, "Offset", "Position", "Origin"))):
            raise GeometryError(path, found="NaN or Inf in Offset", allowed="finite offsets")
        if header.get("CompressedData", "").lower() == "true":
            if header["ElementDataFile"].upper() == "LOCAL":
                _check_compressed(path, file, header, shape)
            else:
                data = path.parent / header["ElementDataFile"]
                require(
                    data.is_file(),
                    path,
                    error=VolumeError,
                    found=f"no data file {data.name} beside it",
                    allowed="the file named by ElementDataFile",
                )
                with open(data, "rb") as stream:
                    _check_compressed(path, stream, header, shape)
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


def _shape(path: Path, header: dict[str, str]) -> list[int]:
    """The sizes of all axes, x first."""
    dimensions = header.get("NDims", "")
    sizes = [int(word) if word.isdecimal() else 0 for word in header.get("DimSize", "").split()]
    require(
        str(len(sizes)) == dimensions and 1 <= len(sizes) <= 10 and min(sizes) >= 1,
        path,
        error=VolumeError,
        found=f"NDims = {dimensions} and DimSize = {header.get('DimSize', '')}",
        allowed="as many sizes above 0 as dimensions",
    )
    return sizes


def _numbers(path: Path, header: dict[str, str], *names: str) -> list[float]:
    """The numbers of the first field of ``names`` that is there."""
    for name in names:
        if name in header:
            try:
                return [float(word) for word in header[name].split()]
            except ValueError as error:
                raise VolumeError(
                    path, found=f"{name} {header[name]}", allowed="numbers"
                ) from error
    return []


def _check_compressed(
    path: Path, stream: IO[bytes], header: dict[str, str], shape: list[int]
) -> None:
    kind = header.get("ElementType", "").removeprefix("MET_").removesuffix("_ARRAY")
    item = _ITEM_BYTES.get(kind.removeprefix("U"))
    if item is None:
        raise VolumeError(
            path, found=f"ElementType {header.get('ElementType')}", allowed="one number per voxel"
        )
    channels = _numbers(path, header, "ElementNumberOfChannels") or [1]
    promised = int(math.prod(shape) * channels[0] * item)
    decoder = zlib.decompressobj()
    actual = 0
    try:
        while not decoder.eof and (chunk := stream.read(_CHUNK_BYTES)):
            while chunk and not decoder.eof:
                actual += len(decoder.decompress(chunk, _CHUNK_BYTES))
                chunk = decoder.unconsumed_tail
        actual += len(decoder.flush())
    except zlib.error as error:
        raise VolumeError(
            path,
            found=f"damaged compressed data ({error})",
            allowed="a complete file",
            fix="Copy or export the file again.",
        ) from error
    require(
        actual >= promised and decoder.eof,
        path,
        error=VolumeError,
        found=f"{actual} bytes of data where the header promises {promised}",
        allowed="a complete file",
        fix="The file is truncated or its header damaged: copy or export it again.",
    )
