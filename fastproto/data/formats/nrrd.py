# SPDX-License-Identifier: Apache-2.0
"""NRRD files (.nrrd, .nhdr), read and written with numpy.

The format is https://teem.sourceforge.net/nrrd/format.html. Lengths in other units than millimetres
are converted; a header without voxel sizes is refused, and one without anatomical axes or origin is
read as LPS from 0, as other programs do, with a warning.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from fastproto.data.anatomy import Code, organ, organ_colours
from fastproto.data.formats.body import (
    GZIP,
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
    unique_names,
)
from fastproto.errors import GeometryError, VolumeError, warn

_NAMES = {
    "i1": "signed char, int8, int8_t",
    "u1": "uchar, unsigned char, uint8, uint8_t",
    "i2": "short, short int, signed short, signed short int, int16, int16_t",
    "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
    "i4": "int, signed int, int32, int32_t",
    "u4": "uint, unsigned int, uint32, uint32_t",
    "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, "
    "int64_t",
    "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
    "f4": "float",
    "f8": "double",
}
_DTYPES = {name: code for code, names in _NAMES.items() for name in names.split(", ")}
_ORDERS = {"little": "<", "big": ">", "": "|"}
_UNNAMED = ("", "scanner-xyz", "3d-right-handed", "3d-left-handed")
_TO_LPS = {
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
}  # fmt: skip
_MM = {
    "": 1.0, "mm": 1.0, "millimeter": 1.0, "millimetre": 1.0, "cm": 10.0, "m": 1000.0,
    "um": 1e-3, "µm": 1e-3, "μm": 1e-3, "micron": 1e-3, "nm": 1e-6,
}  # fmt: skip
# What a header may say, names without spaces; a word that nobody knows could change the voxels.
_KNOWN = {
    "axismaxs", "axismins", "blocksize", "byteskip", "centerings", "centers", "content", "datafile",
    "dimension", "encoding", "endian", "kinds", "labels", "lineskip", "max", "measurementframe",
    "min", "number", "oldmax", "oldmin", "sampleunits", "sizes", "space", "spacedimension",
    "spacedirections", "spaceorigin", "spaceunits", "spacings", "thicknesses", "type", "units",
}  # fmt: skip
_SEGMENT = re.compile(r":Segment\d+_ID")
_NO_OVERLAP = "In 3D Slicer remove the overlap, or export the segments as a label map."
_LINE_LIMIT = 1 << 20
_HEADER_LIMIT = 1 << 24


def read(path: Path) -> Voxels:
    """Read a file with its data, attached or in one other file, and check both.

    Raises:
        VolumeError, GeometryError: What the checks find.
        OSError, zlib.error, EOFError, MemoryError: Unreadable.
    """
    with opened(path) as file:
        fields = _header(path, file)
        sizes = _integers(path, fields, "sizes")
        dimension = _integers(path, fields, "dimension")
        found = f"dimension {dimension} and sizes {sizes}"
        usable = dimension == [len(sizes)] and min(sizes, default=0) > 0
        require_volume(usable, path, found=found, allowed="as many sizes above 0 as dimensions")
        place, spatial = _place(path, fields, len(sizes))
        _check_sizes(path, fields, sizes, spatial)
        shape = tuple(sizes[axis] for axis in reversed(spatial))
        name = fields.get("datafile")
        with nullcontext(file) if name is None else opened(data_file(path, name)) as data:
            return Voxels(_array(path, data, fields, shape), *place)


def segment_names(path: Path) -> dict[int, str]:
    """Label value -> name of the segments that 3D Slicer wrote; none in another file.

    Raises:
        VolumeError: Segments without a value above 0, or two of one.
        OSError: Unreadable.
    """
    with opened(path) as file:
        fields = _header(path, file)
    known = [name[1:-3] for name in fields if _SEGMENT.fullmatch(name)]
    values = [fields.get(f":{segment}_LabelValue", "1") for segment in known]  # older files
    require_volume(
        all(value.isdecimal() and int(value) > 0 for value in values)
        and len({*map(int, values)}) == len(values),
        path,
        found=lambda: f"segments of the label values {', '.join(values)}",
        allowed="another whole number above 0 for each segment",
        fix=_NO_OVERLAP,
    )
    names = [_unescaped(fields.get(f":{segment}_Name", "")) for segment in known]
    return unique_names(zip(map(int, values), names, strict=True))


def write(path: Path, voxels: Voxels, fields: Mapping[str, str] | None = None) -> None:
    """Write a compressed .nrrd file; ``fields`` are metadata of any names.

    Raises:
        OSError: It cannot be written.
    """
    array = voxels.array
    axes = np.array(voxels.direction).reshape(3, 3) * voxels.spacing
    vectors = ["(" + ",".join(map(repr, axis)) + ")" for axis in axes.T.tolist()]
    kinds = ["domain"] * 3
    if array.ndim == 4:  # values of one voxel beside each other
        array = np.moveaxis(array, 0, -1)
        vectors, kinds = ["none", *vectors], ["vector", *kinds]
    lines = [
        "NRRD0004",
        f"type: {_NAMES[array.dtype.str[1:]].split(', ')[0]}",
        f"dimension: {array.ndim}",
        "space: left-posterior-superior",
        f"sizes: {' '.join(map(str, array.shape[::-1]))}",
        f"space directions: {' '.join(vectors)}",
        f"kinds: {' '.join(kinds)}",
        "endian: little",
        "encoding: gzip",
        f"space origin: ({','.join(map(repr, voxels.origin))})",
    ]
    lines += [f"{name}:={_escaped(value)}" for name, value in (fields or {}).items()]
    with open(path, "wb") as file:
        file.write(("\n".join(lines) + "\n\n").encode())
        file.writelines(deflated(array, GZIP))


def write_segments(path: Path, voxels: Voxels, names: Mapping[int, str]) -> None:
    """Write a label map with the names, colours and codes of its values, as 3D Slicer does.

    Raises:
        OSError: It cannot be written.
    """
    depth, height, width = voxels.array.shape
    fields = {
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_ConversionParameters": "Smoothing factor|0.5|Smoothing factor. Range: 0.0 "
        "(no smoothing) to 1.0 (strong smoothing).",
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    colours = organ_colours(names)
    for index, (value, name) in enumerate(sorted(names.items())):
        about = {
            "ID": f"Segment_{value}",
            "Name": " ".join(name.split()),
            "NameAutoGenerated": "0",
            "Color": " ".join(f"{level / 255:.6f}" for level in colours[value]),
            "ColorAutoGenerated": "0",
            "LabelValue": str(value),
            "Layer": "0",
            # Segments of one layer share its voxels, so that this is the layer's.
            "Extent": f"0 {width - 1} 0 {height - 1} 0 {depth - 1}",
            "Tags": _terminology(name),
        }
        fields |= {f"Segment{index}_{key}": text for key, text in about.items()}
    write(path, voxels, fields)


def _terminology(name: str) -> str:
    """What 3D Slicer keeps of an organ: category, type and side from its list of terms."""
    known = organ(name)

    def entry(code: Code | None) -> str:
        return f"SCT^{code.value}^{code.meaning}" if code else "^^"

    terms = "~".join(map(entry, (known.category, known.type, known.side)))
    return (
        "TerminologyEntry:Segmentation category and type - 3D Slicer General Anatomy list"
        f"~{terms}~Anatomic codes - DICOM master list~^^~^^|"
    )


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n")


def _unescaped(value: str) -> str:
    return re.sub(r"\\(.)", lambda found: "\n" if found[1] == "n" else found[1], value)


def _header(path: Path, file: io.BufferedReader) -> dict[str, str]:
    """The fields ``name: value``, names without spaces, and the metadata ``:name := value``."""
    fields: dict[str, str] = {}
    magic = file.readline(_LINE_LIMIT)
    require_volume(
        re.match(rb"NRRD000[1-5]\s*$", magic),
        path,
        found="no NRRD header",
        allowed="a file that begins with NRRD0001 to NRRD0005",
    )
    while file.tell() < _HEADER_LIMIT and (line := file.readline(_LINE_LIMIT)):
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if not text:
            break
        name, _, value = text.partition(":")
        if text[0] == "#":
            continue
        key = ":" + name if value[:1] == "=" else name.lower().replace(" ", "")
        known = key.startswith(":") or key in _KNOWN
        require_volume(known, path, found=f"{text[:80]!r} in its header", allowed="NRRD's fields")
        doubled = key in fields and key[0] != ":"
        require_volume(not doubled, path, found=f"{name} twice", allowed="each field once")
        fields[key] = value[key[0] == ":" :].strip()  # without the = of metadata
    return fields


def _check_sizes(path: Path, fields: dict[str, str], sizes: list[int], spatial: list[int]) -> None:
    """Three axes in space, and one value for each voxel."""
    others = [size for axis, size in enumerate(sizes) if axis not in spatial]
    segments = sum(bool(_SEGMENT.fullmatch(name)) for name in fields)
    require_volume(
        not segments or all(size == 1 for size in others),
        path,
        found=f"{segments} segments in overlapping layers",
        allowed="segments that share no voxel, stored as one label map",
        fix=_NO_OVERLAP,
    )
    check_size(path, [sizes[axis] for axis in spatial] + others)


@np.errstate(over="ignore", invalid="ignore")  # what comes of it is refused
def _place(path: Path, fields: dict[str, str], dimension: int) -> tuple[Grid, list[int]]:
    """Spacing, origin and direction in mm and LPS, and which axes of the file lie in space."""
    missing = []
    name = fields.get("space", "").lower()
    space = name.removesuffix("-time")
    space = space[:3] if len(space) == 4 else space  # with "t" for time
    dimensions = 3 if space == name and fields.get("spacedimension") != "4" else 4
    found = f"space {space}"
    allowed = "left-posterior-superior, right-anterior-superior or left-anterior-superior"
    require_geometry(space in (*_TO_LPS, *_UNNAMED), path, found=found, allowed=allowed)
    if space not in _TO_LPS or "spacedirections" not in fields:
        space = space if space in _TO_LPS else "left-posterior-superior"
        missing.append(f"{space} axes")
    to_lps = np.array(_TO_LPS[space])
    scale = to_lps * _units(path, fields, "spaceunits", range(3))
    directed = "spacedirections" in fields
    words = fields.get("spacings", "").lower().split()
    if directed:
        words = re.split(r"(?<=\))\s+|(?<=none)\s+", fields["spacedirections"].lower())
    require_geometry(
        words and (directed or not {"axismins", "axismaxs"} & fields.keys()),
        path,
        found="axis mins or maxs" if words else "no voxel sizes in the header",
        allowed="space directions (or spacings)",
        fix="Save the volume again with a program that knows where its voxels lie.",
    )
    require_geometry(
        len(words) == dimension,
        path,
        found=f"space directions or spacings of {len(words)} axes",
        allowed=f"those of {dimension} axes, as the header says",
    )
    outside = "none" if directed or dimension == 3 else "nan"
    spatial = [axis for axis, word in enumerate(words) if word != outside][:3]
    found = f"a {len(spatial)}-D image"
    require_volume(len(spatial) == 3, path, found=found, allowed="a 3-D volume")
    if directed:
        vectors = [_vector(path, words[axis], dimensions) for axis in spatial]
        axes = np.array(vectors).T * scale[:, None]
    else:
        sizes = _numbers(path, "spacings", " ".join(words[axis] for axis in spatial))
        axes = np.diag(sizes * _units(path, fields, "units", spatial)) * to_lps
    origin = np.zeros(3)
    if "spaceorigin" in fields:
        origin = np.array(_vector(path, fields["spaceorigin"], dimensions)) * scale
    else:
        missing.append("an origin of 0")
    check_finite(path, "space origin", origin)
    spacing = np.linalg.norm(axes, axis=0)
    check_spacing(path, spacing)
    if missing:
        warn(path, f"its header does not place the voxels: {' and '.join(missing)} are assumed.")
    check_axes(path, axes / spacing)
    return grid(spacing, origin, axes / spacing), spatial


def _array(
    path: Path, file: io.BufferedReader, fields: dict[str, str], shape: tuple[int, ...]
) -> np.ndarray:
    order, encoding = fields.get("endian", "").lower(), fields.get("encoding", "").lower()
    dtype = np.dtype(_DTYPES.get(fields.get("type", "").lower(), "V1"))
    usable_order = order in _ORDERS and (order or dtype.itemsize == 1)
    quantized = [name for name in ("oldmin", "oldmax") if name in fields]
    for usable, found, allowed in (
        (dtype.kind != "V", f"voxels of type {fields.get('type')}", "integers or real numbers"),
        (usable_order, f"endian {order or 'missing'}", "little or big"),
        (encoding in ("raw", "gzip", "gz"), f"encoding {encoding}", "raw or gzip"),
        (not quantized, f"quantized voxels ({', '.join(quantized)})", "voxels stored as they are"),
    ):
        fix = "Save the volume again, in another way."
        require_volume(usable, path, found=found, allowed=allowed, fix=fix)
    dtype = np.dtype(_ORDERS[order] + dtype.str[1:])
    skips = _integers(path, fields, "lineskip", "0"), _integers(path, fields, "byteskip", "0")
    usable = [len(numbers) for numbers in skips] == [1, 1]
    usable = usable and min(skips)[0] >= (-1 if encoding == "raw" else 0) and skips[0][0] >= 0
    found = f"line skip {skips[0]} and byte skip {skips[1]}"
    require_volume(usable, path, found=found, allowed="whole numbers, or a byte skip of -1 if raw")
    (lines,), (skipped,) = skips
    while lines and file.readline():
        lines -= 1
    if skipped == -1:
        seek_from_end(file, shape, dtype)
    stream = file if encoding == "raw" else inflated(file)
    skip(stream, skipped)
    return read_array(path, stream, shape, dtype)


def _units(path: Path, fields: dict[str, str], name: str, axes: Iterable[int]) -> np.ndarray:
    """The millimetres in the unit of each axis; what has no unit is in mm."""
    text = fields.get(name, "")
    quoted = re.fullmatch(r'("[^"]*"\s*)*', text)
    words = re.findall(r'"([^"]*)"', text) if quoted else text.split()
    units = [words[axis].strip() if axis < len(words) else "" for axis in axes]
    unknown = [unit for unit in units if unit not in _MM]
    require_geometry(
        not unknown,
        path,
        found=f"lengths in {', '.join(map(repr, unknown))}",
        allowed=", ".join(unit for unit in _MM if unit),
        fix="Correct the header; distances cannot be guessed.",
    )
    if text and "" in units:
        warn(path, "its header names no unit of length: mm are assumed.")
    return np.array([_MM[unit] for unit in units])


def _vector(path: Path, text: str, dimensions: int) -> list[float]:
    """The first three numbers of "(x,y,z)"; a fourth is time."""
    words = text[1:-1].split(",") if text[:1] == "(" and text[-1:] == ")" else []
    found = [_numbers(path, "a vector", word) for word in words]
    usable = [len(numbers) for numbers in found] == [1] * dimensions
    allowed = f"a vector of {dimensions} numbers, (x,y,z)"
    require_geometry(usable, path, found=f"{text!r} in its header", allowed=allowed)
    return [number for (number,) in found[:3]]


def _numbers(path: Path, name: str, text: str) -> list[float]:
    try:
        return parsed(text)
    except ValueError as error:
        raise GeometryError(path, found=f"{name} {text}", allowed="numbers") from error


def _integers(path: Path, fields: dict[str, str], name: str, default: str = "") -> list[int]:
    text = fields.get(name, default)
    try:
        return [int(word) for word in text.split()]
    except ValueError as error:
        raise VolumeError(path, found=f"{name} {text}", allowed="whole numbers") from error
