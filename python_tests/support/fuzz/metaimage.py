# SPDX-License-Identifier: Apache-2.0
"""MetaImage, in one file or two. No other library reads it, so a second reader stands here.

It follows https://itk.org/Wiki/MetaIO/Documentation and refuses what that leaves open.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np

from support.fuzz.judge import LPS_TO_RAS, Reading, Unreadable
from support.fuzz.mutate import (
    DTYPES,
    STRUCTURED,
    Case,
    Rng,
    damage,
    grid,
    lines,
    numbers,
    pick,
    rounds,
    voxels,
)

_TYPES = dict(
    zip(
        DTYPES,
        ("UCHAR", "CHAR", "USHORT", "SHORT", "UINT", "INT", "FLOAT", "DOUBLE"),
        strict=True,
    )
)
_BYTES = {"MET_" + name: code for code, name in _TYPES.items()}
_BYTES.update(MET_LONG="i4", MET_ULONG="u4", MET_LONG_LONG="i8", MET_ULONG_LONG="u8")
_TRUTH = ("True", "False", "true", "false", "1", "0", "T", "yes", "")
_VALUES: dict[str, tuple[str, ...]] = {
    "ObjectType": ("Image", "image", "Mesh", "", "Tube"),
    "ObjectSubType": ("x",),
    "NDims": ("1", "2", "4", "0", "-3", "11", "99", "3.0", ""),
    "BinaryData": _TRUTH,
    "BinaryDataByteOrderMSB": _TRUTH,
    "ElementByteOrderMSB": _TRUTH,
    "CompressedData": _TRUTH,
    "CompressedDataSize": ("0", "1", "-1", "10", "100", "100000", "99999999999", "nan"),
    "TransformMatrix": ("1 0 0 0 1 0 0 0 1", "0 1 0 1 0 0 0 0 1", "1 0 0 0 1 0 0 0 0", "1 0 0"),
    "Rotation": ("1 0 0 0 1 0 0 0 1", "0 1 0 1 0 0 0 0 1"),
    "Orientation": ("0 1 0 1 0 0 0 0 1",),
    "Offset": ("0 0 0", "1 2 3", "nan 0 0", "1e30 0 0"),
    "Position": ("0 0 0", "1 2 3"),
    "Origin": ("4 5 6",),
    "CenterOfRotation": ("0 0 0", "10 10 10"),
    "AnatomicalOrientation": ("RAI", "LPS", "RAS", "???"),
    "ElementSpacing": ("1 1 1", "2 3 4", "-1 1 1", "0 1 1", "1e-4 1e-4 1e-4", "1 1"),
    "ElementSize": ("1 1 1", "2 3 4", "0 0 0", "-1 1 1"),
    "ElementNumberOfChannels": ("1", "2", "3", "0", "-1", "1.5"),
    "ElementType": (*_BYTES, "MET_FLOAT_MATRIX", "MET_SHORT_ARRAY", "SHORT", "MET_NONE"),
    "ElementToIntensityFunctionSlope": ("1", "0", "2", "-1", "0.5", "nan", "inf", "1e30"),
    "ElementToIntensityFunctionOffset": ("0", "-1024", "1024", "nan", "0.5"),
    "ElementMin": ("0", "nan"),
    "ElementMax": ("1",),
    "HeaderSize": ("0", "-1", "1", "348", "-2", "100000", "x"),
    "Modality": ("MET_MOD_CT", "MET_MOD_MR", "x"),
    "DistanceUnits": ("mm", "cm", "um", "m", "?"),
    "SequenceID": ("1 2 3",),
    "Comment": ("x = y",),
    "Color": ("1 0 0 1",),
    "ElementDataFile": ("LOCAL", "Local", "LIST", "other.raw", "a.raw", "./a.raw", "a%d.raw 0 2 1"),
}  # fmt: skip
_MM = {"?": 1.0, "mm": 1.0, "cm": 10.0, "um": 0.001, "m": 1000.0}
_ALIASES = {
    "Position": "Offset", "Origin": "Offset", "Rotation": "TransformMatrix",
    "Orientation": "TransformMatrix", "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}  # fmt: skip


def local(rng: Rng) -> Case:
    """A .mha file."""
    header, body = _file(rng, "LOCAL")
    done = _damages(rng, header)
    head = "".join(f"{line}\n" for line in header).encode("latin-1", "replace")
    data = head + body
    if done and rng.random() > STRUCTURED:
        data, text = damage(rng, data, 0 if rng.random() < 0.5 else len(head))
        done.append(text)
    return Case({"a.mha": data}, "a.mha", done)


def detached(rng: Rng) -> Case:
    """A .mhd file with its data beside it."""
    name = pick(rng, ("a.raw", "a.zraw", "b.img"))
    header, body = _file(rng, name)
    done = _damages(rng, header)
    if done and rng.random() > STRUCTURED:
        body, text = damage(rng, body)
        done.append(f"data: {text}")
    head = "".join(f"{line}\n" for line in header).encode("latin-1", "replace")
    return Case({"a.mhd": head, name: body}, "a.mhd", done)


def _file(rng: Rng, name: str) -> tuple[list[str], bytes]:
    """The lines of a good header, and its data."""
    array, affine = voxels(rng), LPS_TO_RAS @ grid(rng)
    big, packed = rng.random() < 0.25, rng.random() < 0.5
    raw = array.astype(array.dtype.newbyteorder(">" if big else "<")).tobytes(order="F")
    body = zlib.compress(raw) if packed else raw
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    axes = (affine[:3, :3] / spacing).T.ravel()
    header = ["ObjectType = Image", "NDims = 3", "BinaryData = True"]
    header += [f"BinaryDataByteOrderMSB = {big}", f"CompressedData = {packed}"]
    header += [f"CompressedDataSize = {len(body)}"] if packed else []
    header += [
        "TransformMatrix = " + " ".join(map(repr, map(float, axes))),
        "Offset = " + " ".join(map(repr, map(float, affine[:3, 3]))),
        "CenterOfRotation = 0 0 0",
        "ElementSpacing = " + " ".join(map(repr, map(float, spacing))),
        "DimSize = " + " ".join(map(str, array.shape)),
        f"ElementType = MET_{_TYPES[array.dtype.str[1:]]}",
        f"ElementDataFile = {name}",
    ]
    return header, body


def _damages(rng: Rng, header: list[str]) -> list[str]:
    done = []
    for _ in range(rounds(rng)):
        kind = pick(rng, ("value", "value", "numbers", "numbers", "lines"))
        name = pick(rng, tuple(_VALUES))
        line = f"{name} = {pick(rng, _VALUES[name])}"
        places = [i for i, old in enumerate(header) if old.startswith(f"{name} =")]
        if kind == "lines":
            done.append(lines(rng, header))
        elif kind == "numbers":
            keys = ("TransformMatrix", "Offset", "ElementSpacing", "DimSize", "CompressedDataSize")
            if not (places := [i for i, old in enumerate(header) if old.startswith(keys)]):
                continue
            place = pick(rng, places)
            key, _, value = header[place].partition(" = ")
            header[place] = f"{key} = {numbers(rng, value)}"
            done.append(header[place])
        else:
            if places:
                header[places[0]] = line
            else:
                header.insert(int(rng.integers(len(header))), line)
            done.append(line)
    return done


def read(path: Path) -> Reading:
    """By the documentation, in the plainest way."""
    data = path.read_bytes()
    fields, start = _fields(data)
    dims = int(fields["NDims"])
    shape = tuple(int(word) for word in fields["DimSize"].split())
    if len(shape) != dims or dims < 3 or min(shape) < 1 or math.prod(shape[3:]) != 1:
        raise Unreadable(f"{fields['NDims']} dimensions of {shape}")
    if _true(fields.get("BinaryData", "True")) is False:
        raise Unreadable("voxels as text")
    if int(fields.get("ElementNumberOfChannels", "1")) != 1:
        raise Unreadable("several channels")
    assumed: list[str] = []
    order = ">" if _true(fields.get("BinaryDataByteOrderMSB", "False")) else "<"
    dtype = np.dtype(order + _BYTES[fields["ElementType"].removesuffix("_ARRAY")])
    name = fields["ElementDataFile"]
    body = data[start:] if name.upper() == "LOCAL" else (path.parent / name).read_bytes()
    array = np.frombuffer(_voxels(fields, body, math.prod(shape) * dtype.itemsize, assumed), dtype)
    array = array.reshape(shape[:3], order="F").astype(dtype.newbyteorder("="))
    slope = float(fields.get("ElementToIntensityFunctionSlope", "1"))
    offset = float(fields.get("ElementToIntensityFunctionOffset", "0"))
    if not math.isfinite(slope) or not math.isfinite(offset) or slope == 0:
        raise Unreadable(f"values times {slope} plus {offset}")
    if (slope, offset) != (1, 0):
        array = array.astype(np.float64) * slope + offset
    return Reading(array, _place(fields, dims, assumed), abs(offset), assumed)


def _fields(data: bytes) -> tuple[dict[str, str], int]:
    """The fields under one name each, and where the data begin."""
    fields: dict[str, str] = {}
    start = 0
    while (end := data.find(b"\n", start)) >= 0 or start < len(data):
        end = end if end >= 0 else len(data)
        line, start = data[start:end].decode("latin-1"), end + 1
        key, equals, value = line.partition("=")
        key, value = key.strip(), value.strip()
        if not equals:
            raise Unreadable(f"a line without '=': {line[:40]!r}")
        name = _ALIASES.get(key, key)
        if fields.get(name, value) != value:
            raise Unreadable(f"{key} twice")
        fields[name] = value
        if name == "ElementDataFile":
            if fields.get("ObjectType") in ("Mesh", "Tube"):
                raise Unreadable("no image")
            return fields, start
    raise Unreadable("no ElementDataFile")


def _true(word: str) -> bool:
    if word[:1] in ("T", "t", "1"):
        return True
    if word[:1] in ("F", "f", "0"):
        return False
    raise Unreadable(f"neither True nor False: {word}")


def _voxels(fields: dict[str, str], body: bytes, size: int, assumed: list[str]) -> bytes:
    skip = int(fields.get("HeaderSize", "0"))
    if _true(fields.get("CompressedData", "False")):
        if skip:
            raise Unreadable("HeaderSize before compressed data")
        decoder = zlib.decompressobj()
        raw = decoder.decompress(body)
        if not decoder.eof or len(raw) != size:
            raise Unreadable(f"{len(raw)} bytes where {size} are announced")
        if decoder.unused_data.strip(b"\0"):
            assumed.append("bytes after the compressed data")
        return raw
    if skip < -1:
        raise Unreadable(f"HeaderSize {skip}")
    skip = len(body) - size if skip == -1 else skip
    if len(body) != skip + size or skip < 0:
        raise Unreadable(f"{len(body)} bytes where {skip} + {size} are announced")
    return body[skip:]


def _place(fields: dict[str, str], dims: int, assumed: list[str]) -> np.ndarray:
    axes = _numbers(fields, "TransformMatrix", np.eye(dims).ravel()).reshape(dims, dims)[:3, :3].T
    default = np.ones(dims)
    if "ElementSpacing" not in fields:
        if "ElementSize" in fields:
            default = _numbers(fields, "ElementSize", default)
        else:
            assumed.append("no spacing")
    spacing = _numbers(fields, "ElementSpacing", default)
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing[:3]
    affine[:3, 3] = _numbers(fields, "Offset", np.zeros(dims))[:3]
    if len(spacing) != dims or not np.isfinite(affine).all() or (spacing <= 0).any():
        raise Unreadable("a place that cannot be")
    unit = fields.get("DistanceUnits", "mm")
    if unit not in _MM:
        raise Unreadable(f"unit {unit}")
    affine[:3] *= _MM[unit]
    return LPS_TO_RAS @ affine


def _numbers(fields: dict[str, str], name: str, default: np.ndarray) -> np.ndarray:
    if name not in fields:
        return default
    found = np.array([float(word) for word in fields[name].split()])
    if found.shape != default.shape:
        raise Unreadable(f"{name} {fields[name]}")
    return found
