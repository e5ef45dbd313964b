# SPDX-License-Identifier: Apache-2.0
"""MetaImage files (.mha, .mhd), read and written with numpy.

Voxels lie where TransformMatrix, Offset and ElementSpacing say; as in ITK, CenterOfRotation and
AnatomicalOrientation change nothing about that. CompressedDataSize is not needed: compressed data
end by themselves.
"""

from __future__ import annotations

import io
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from fastproto.data.formats.body import (
    ZLIB,
    data_file,
    deflated,
    inflated,
    opened,
    read_array,
    seek_from_end,
    skip,
)
from fastproto.data.formats.checks import (
    Grid,
    Voxels,
    check_axes,
    check_finite,
    check_size,
    check_spacing,
    grid,
    parsed,
    require_geometry,
    require_volume,
)
from fastproto.errors import VolumeError, warn

_DTYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4",
    "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
# MetaIO's other names of a field; both may be there if they say the same.
_ALIASES = {
    "Position": "Offset", "Origin": "Offset", "Rotation": "TransformMatrix",
    "Orientation": "TransformMatrix", "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}  # fmt: skip
_MM = {"": 1.0, "?": 1.0, "um": 1e-3, "mm": 1.0, "cm": 10.0}
_LINE_LIMIT = 1 << 16


def read(path: Path) -> Voxels:
    """Read a file with its data, local or in one other file, and check both.

    Raises:
        VolumeError, GeometryError: What the checks find.
        OSError, zlib.error, EOFError, MemoryError: Unreadable.
    """
    with opened(path) as file:
        fields = _header(path, file)
        words = fields.get("DimSize", "").split()
        usable = all(word.isdecimal() and len(word) < 10 and int(word) for word in words)
        usable = usable and str(len(words)) == fields.get("NDims")
        found = f"NDims = {fields.get('NDims')} and DimSize = {fields.get('DimSize')}"
        require_volume(usable, path, found=found, allowed="as many sizes above 0 as dimensions")
        sizes = [int(word) for word in words]
        check_size(path, sizes)
        place = _place(path, fields, len(sizes))
        name = fields["ElementDataFile"]
        local = name.upper() == "LOCAL"
        with nullcontext(file) if local else opened(data_file(path, name)) as data:
            return Voxels(_array(path, data, fields, sizes), *place)


def write(path: Path, voxels: Voxels) -> None:
    """Write a compressed .mha file.

    Raises:
        OSError: It cannot be written.
    """
    array = voxels.array
    channels = []
    if array.ndim == 4:  # values of one voxel beside each other
        channels = [f"ElementNumberOfChannels = {len(array)}"]
        array = np.moveaxis(array, 0, -1)
    data = b"".join(deflated(array, ZLIB))
    axes = np.array(voxels.direction).reshape(3, 3).T.ravel()
    element = next(name for name, code in _DTYPES.items() if array.dtype == code)
    lines = [
        "ObjectType = Image",
        "NDims = 3",
        "BinaryData = True",
        "BinaryDataByteOrderMSB = False",
        "CompressedData = True",
        f"CompressedDataSize = {len(data)}",
        f"TransformMatrix = {' '.join(map(repr, axes.tolist()))}",
        f"Offset = {' '.join(map(repr, voxels.origin))}",
        f"ElementSpacing = {' '.join(map(repr, voxels.spacing))}",
        f"DimSize = {' '.join(map(str, voxels.array.shape[:-4:-1]))}",
        *channels,
        f"ElementType = {element}",
        "ElementDataFile = LOCAL",
    ]
    with open(path, "wb") as file:
        file.write(("\n".join(lines) + "\n").encode("ascii"))
        file.write(data)


def _header(path: Path, file: io.BufferedReader) -> dict[str, str]:
    """The ``key = value`` lines up to ElementDataFile, after which the data begin.

    A field of several names is found under the one that ITK writes.
    """
    fields: dict[str, str] = {}
    while file.tell() < _LINE_LIMIT and (line := file.readline(_LINE_LIMIT)):
        key, equals, value = (
            part.strip() for part in line.decode("utf-8", "replace").partition("=")
        )
        if not equals:
            break
        name = _ALIASES.get(key, key)
        once = fields.setdefault(name, value) == value
        found = f"{key} = {value}, and {fields[name]} before"
        require_volume(once, path, found=found, allowed="one value for each field")
        if key == "ElementDataFile":
            kind = fields.get("ObjectType", "Image")
            require_volume(kind == "Image", path, found=f"a {kind}", allowed="ObjectType = Image")
            return fields
    raise VolumeError(path, found="no MetaImage header", allowed="a .mha or .mhd file")


@np.errstate(over="ignore", invalid="ignore")  # what comes of it is refused
def _place(path: Path, fields: dict[str, str], dimension: int) -> Grid:
    """Spacing, origin and direction in mm and LPS."""
    unit = fields.get("DistanceUnits", "").lower()
    found = f"DistanceUnits = {unit}"
    require_geometry(unit in _MM, path, found=found, allowed=", ".join(list(_MM)[2:]))
    sizes = _numbers(path, fields, dimension, "ElementSpacing", "ElementSize")
    require_geometry(
        sizes,
        path,
        found="no ElementSpacing",
        allowed="the voxel size in the header",
        fix="Add it from the scanner's data; distances cannot be guessed.",
    )
    offset = _numbers(path, fields, dimension, "Offset")
    axes = _numbers(path, fields, dimension**2, "TransformMatrix")
    missing = [name for name, found in (("Offset 0", offset), ("straight axes", axes)) if not found]
    if missing:
        warn(path, f"its header does not place the voxels: {' and '.join(missing)} are assumed.")
    spacing = np.array(sizes)[:3] * _MM[unit]
    check_spacing(path, spacing, "ElementSpacing")
    origin = np.array(offset or [0.0] * 3)[:3] * _MM[unit]
    check_finite(path, "Offset", origin)
    matrix = np.reshape(axes or np.eye(dimension), (dimension, dimension))[:3, :3].T
    check_axes(path, matrix)
    return grid(spacing, origin, matrix)


def _array(
    path: Path, file: io.BufferedReader, fields: dict[str, str], sizes: list[int]
) -> np.ndarray:
    channels = fields.get("ElementNumberOfChannels", "1")
    element = fields.get("ElementType", "").removesuffix("_ARRAY")
    compressed = _true(path, fields, "CompressedData")
    skipped = fields.get("HeaderSize", "0")
    usable_skip = (skipped.isdecimal() and len(skipped) < 19) or (
        skipped == "-1" and not compressed
    )
    per_slice = fields.get("HeaderSizePerSlice", "0")
    for usable, found, allowed in (
        (channels == "1", f"{channels} values per voxel", "one number per voxel"),
        (element in _DTYPES, f"ElementType = {element}", "one number per voxel"),
        (_true(path, fields, "BinaryData", "True"), "voxels written as text", "BinaryData = True"),
        (usable_skip, f"HeaderSize = {skipped}", "a whole number, or -1 without compression"),
        (per_slice == "0", f"HeaderSizePerSlice = {per_slice}", "0"),
    ):
        fix = "Save the volume again, in another way."
        require_volume(usable, path, found=found, allowed=allowed, fix=fix)
    big = _true(path, fields, "BinaryDataByteOrderMSB")
    dtype = np.dtype(_DTYPES[element]).newbyteorder(">" if big else "<")
    shape = tuple(sizes[2::-1])
    if skipped == "-1":
        seek_from_end(file, shape, dtype)
    skip(file, int(skipped))
    slope, intercept = (
        _numbers(path, fields, 1, f"ElementToIntensityFunction{name}") or [default]
        for name, default in (("Slope", 1.0), ("Offset", 0.0))
    )
    found = f"ElementToIntensityFunction {slope[0]:g} and {intercept[0]:g}"
    usable = slope[0] != 0 and all(map(math.isfinite, (*slope, *intercept)))
    require_volume(usable, path, found=found, allowed="finite numbers, a slope other than 0")
    stream = inflated(file) if compressed else file
    return read_array(path, stream, shape, dtype, slope[0], intercept[0])


def _true(path: Path, fields: dict[str, str], name: str, default: str = "False") -> bool:
    """By the first letter, as MetaIO reads it."""
    word = fields.get(name, default)
    usable = word[:1] in set("TtFf10")
    require_volume(usable, path, found=f"{name} = {word}", allowed="True or False")
    return word[0] in "Tt1"


def _numbers(path: Path, fields: dict[str, str], count: int, *names: str) -> list[float]:
    """The numbers of the first field of ``names`` that is there."""
    name = next((name for name in names if name in fields), None)
    if name is None:
        return []
    try:
        numbers = parsed(fields[name])
    except ValueError:
        numbers = []
    found = f"{name} = {fields[name]}"
    require_volume(len(numbers) == count, path, found=found, allowed=f"{count} numbers")
    return numbers
