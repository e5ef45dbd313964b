# SPDX-License-Identifier: Apache-2.0
"""NRRD, attached and detached: lines dropped, repeated and edited; and pynrrd."""

from __future__ import annotations

import gzip
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nrrd
import numpy as np

from support.fuzz.judge import Reading, Unreadable, Unverified
from support.fuzz.mutate import (
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

_TYPES = {
    "u1": ("uchar", "uint8", "unsigned char"), "i1": ("int8", "signed char"),
    "u2": ("ushort", "uint16"), "i2": ("short", "int16"), "u4": ("uint", "uint32"),
    "i4": ("int", "int32"), "f4": ("float",), "f8": ("double",),
}  # fmt: skip
# RAS as the space sees it: the signs of its x and y.
_SPACES = {
    "right-anterior-superior": (1, 1), "RAS": (1, 1), "left-anterior-superior": (-1, 1),
    "LAS": (-1, 1), "left-posterior-superior": (-1, -1), "LPS": (-1, -1),
}  # fmt: skip
_MM = {"mm": 1.0, "cm": 10.0, "m": 1000.0, "um": 0.001, "µm": 0.001, "in": 25.4, "micron": 0.001}
_MM.update({"millimeter": 1.0, "millimeters": 1.0, "meter": 1000.0})
# Other values of a field that matters, or lines to add.
_VALUES: dict[str, tuple[str, ...]] = {
    "type": (*(name for names in _TYPES.values() for name in names), "block", "int64", "half"),
    "dimension": ("1", "2", "4", "0", "-3", "16", "99"),
    "space": (*_SPACES, "scanner-xyz", "3D-right-handed", "3D-left-handed", "LPST", "lps", "RSA"),
    "space dimension": ("3", "2", "4"),
    "space units": (
        '"mm" "mm" "mm"', '"cm" "cm" "cm"', '"m" "m" "m"', '"mm" "mm" "cm"', '"um" "um" "um"',
        '"" "" ""', '"mm"', '"pixel" "pixel" "pixel"', "mm mm mm", '"mm" "mm" "mm" "mm"',
    ),
    "units": ('"mm" "mm" "mm"', '"cm" "cm" "cm"', '"m" "m" "m"', '"mm" "mm" "s"'),
    "endian": ("little", "big", "middle"),
    "encoding": ("raw", "gzip", "gz", "bzip2", "ascii", "text", "hex", "zip"),
    "kinds": (
        "domain domain domain", "space space space", "list domain domain",
        "vector domain domain", "domain domain list", "domain domain time",
    ),
    "line skip": ("0", "1", "2", "-1"),
    "byte skip": ("0", "1", "16", "-1", "-2", "1000000"),
    "spacings": ("1 1 1", "2 3 4", "nan nan nan", "-1 1 1", "0 1 1", "1e-4 1e-4 1e-4"),
    "thicknesses": ("1 1 1", "nan nan 5"),
    "axis mins": ("0 0 0", "10 20 30", "nan nan nan"),
    "axis maxs": ("10 10 10", "nan nan nan"),
    "centers": ("cell cell cell", "node node node", "??? ??? ???"),
    "measurement frame": ("(1,0,0) (0,1,0) (0,0,1)", "(0,1,0) (1,0,0) (0,0,1)"),
    "old min": ("0", "-1000"),
    "old max": ("1", "1000"),
    "min": ("0",),
    "block size": ("2", "8"),
    "number": ("60", "1"),
    "labels": ('"x" "y" "z"',),
    "content": ("anything: at all",),
    "sample units": ("HU", "mm"),
    "data file": ("other.raw", "LIST", "./a.raw", "a%d.raw 0 2 1", "/dev/zero", ""),
}  # fmt: skip


def attached(rng: Rng) -> Case:
    """A .nrrd file."""
    header, body = _file(rng, rng.random() < 0.7)
    done = _damage(rng, header) if (times := rounds(rng)) else []
    for _ in range(times - 1):
        done += _damage(rng, header)
    head = "\n".join([*header, "", ""]).encode()
    data = head + body
    if done and rng.random() > STRUCTURED:
        start = 0 if rng.random() < 0.5 else len(head)
        data, text = damage(rng, data, start)
        done.append(text)
    return Case({"a.nrrd": data}, "a.nrrd", done)


def detached(rng: Rng) -> Case:
    """A .nhdr file with its data beside it."""
    header, body = _file(rng, rng.random() < 0.7)
    name = "a.raw.gz" if body[:2] == b"\x1f\x8b" else "a.raw"
    header.append(f"data file: {name}")
    done = []
    for _ in range(rounds(rng)):
        if rng.random() < STRUCTURED:
            done += _damage(rng, header)
        else:
            body, text = damage(rng, body)
            done.append(f"data: {text}")
    head = "\n".join([*header, *pick(rng, ([], ["", ""]))]).encode() + b"\n"
    return Case({"a.nhdr": head, name: body}, "a.nhdr", done)


def _file(rng: Rng, placed: bool) -> tuple[list[str], bytes]:
    """The lines of a good header, and its data; ``placed`` with directions, else with spacings."""
    array = voxels(rng, tuple(_TYPES))
    code = array.dtype.str[1:]
    encoding = pick(rng, ("raw", "gzip"))
    endian = pick(rng, ("little", "little", "big"))
    header = [
        f"NRRD000{pick(rng, (4, 5))}",
        f"type: {pick(rng, _TYPES[code])}",
        "dimension: 3",
        "sizes: " + " ".join(map(str, array.shape)),
        f"encoding: {encoding}",
        f"endian: {endian}",
    ]
    affine = grid(rng)
    if placed:
        space = pick(rng, tuple(_SPACES))
        turned = np.diag([*_SPACES[space], 1, 1]) @ affine
        vectors = [f"({','.join(map(repr, map(float, row)))})" for row in turned[:3].T]
        header += [f"space: {space}", "space directions: " + " ".join(vectors[:3])]
        header += [f"space origin: ({','.join(map(repr, map(float, turned[:3, 3])))})"]
        header += pick(rng, ([], ['space units: "mm" "mm" "mm"']))
    else:
        sizes = np.linalg.norm(affine[:3, :3], axis=0)
        header += ["spacings: " + " ".join(repr(float(size)) for size in sizes)]
    raw = array.astype(array.dtype.newbyteorder("<" if endian == "little" else ">"))
    body = raw.tobytes(order="F")
    if encoding == "gzip":
        body = gzip.compress(body, mtime=0)
    return header, body


def _damage(rng: Rng, header: list[str]) -> list[str]:
    """One change to a header, in place."""
    kind = pick(rng, ("value", "value", "numbers", "numbers", "numbers", "lines", "magic"))
    if kind == "lines":
        return [lines(rng, header)]
    if kind == "magic":
        header[0] = pick(rng, ("NRRD0001", "NRRD0002", "NRRD0003", "NRRD0006", "NRRD", "nrrd0004"))
        return [header[0]]
    if kind == "numbers":
        places = [i for i, line in enumerate(header) if line.startswith(("s", "data"))]
        if places:
            place = pick(rng, places)
            name, _, value = header[place].partition(": ")
            if name in ("space directions", "space origin"):
                value = numbers(rng, re.sub(r"([(),])", r" \1 ", value))
                value = re.sub(r" ?([(),]) ?", r"\1", value).replace(")(", ") (")
            elif name in ("sizes", "spacings"):
                value = numbers(rng, value)
            header[place] = f"{name}: {value}"
            return [header[place]]
    name = pick(rng, tuple(_VALUES))
    line = f"{name}: {pick(rng, _VALUES[name])}"
    places = [i for i, old in enumerate(header) if old.startswith(f"{name}:")]
    if places:
        header[places[0]] = line
    else:
        header.insert(int(rng.integers(1, len(header) + 1)), line)
    return [line]


# Fields that change neither values nor place, whatever they say.
_ABOUT_NOTHING = re.compile(r"(thicknesses|measurement frame|axis maxs|axismaxs):(?!=)")


def read(path: Path) -> Reading:
    """Pynrrd's array and fields, put together as the format's definition says."""
    data = path.read_bytes()
    end = re.search(rb"\r?\n\r?\n", data)
    start = end.end() if end else len(data)
    lines = [_plain(line) for line in data[:start].decode("latin-1").split("\n")]
    header = nrrd.read_header([line for line in lines if not _ABOUT_NOTHING.match(line)])
    with open(path, "rb") as file:
        file.seek(start)
        array = nrrd.read_data(header, file, str(path), index_order="F")
    if min(array.shape) < 1 or array.ndim < 3:
        raise Unreadable(f"{array.shape} is not 3-D")
    if header["encoding"].lower() == "raw":
        _check_length(path, header, array, len(data) - start)
    affine, assumed = _place(header, array.ndim)
    if array.ndim > 3:
        keep = [axis for axis in range(array.ndim) if _spatial(header, axis)]
        if len(keep) != 3 or array.size != np.prod([array.shape[axis] for axis in keep]):
            raise Unreadable(f"{array.shape} is not 3-D")
        array = array.reshape([array.shape[axis] for axis in keep], order="F")
    return Reading(array.astype(array.dtype.newbyteorder("=")), affine, 0.0, assumed)


def _plain(line: str) -> str:
    """A line of the header in small letters where the format allows any."""
    name, colon, value = line.rstrip("\r").partition(":")
    if not colon or value.startswith("="):
        return line.rstrip("\r")
    name = name.lower()
    return f"{name}:{value.lower() if name in ('type', 'encoding', 'endian') else value}"


def _check_length(path: Path, header: Mapping[str, Any], array: np.ndarray, size: int) -> None:
    """Exactly as many bytes as the header says, unless it says to count from the end."""
    if int(header.get("byte skip", 0)) == -1:
        return
    name = header.get("data file", header.get("datafile"))
    if name is not None:
        size = (path.parent / name).stat().st_size
    extra = size - array.nbytes - int(header.get("byte skip", 0))
    if extra and not int(header.get("line skip", 0)):
        raise Unreadable(f"{extra} more bytes than the header says")


def _spatial(header: Mapping[str, Any], axis: int) -> bool:
    directions = header.get("space directions")
    if directions is None:
        return axis < 3
    row = directions[axis]
    return row is not None and bool(np.isfinite(np.array(row, float)).all())


def _place(header: Mapping[str, Any], dimensions: int) -> tuple[np.ndarray, list[str]]:
    assumed = []
    affine = np.eye(4)
    if "space directions" in header:
        rows = [row for row in header["space directions"] if row is not None]
        axes = np.array([row for row in rows if np.isfinite(row).all()], dtype=np.float64)
        if axes.shape != (3, 3):
            raise Unreadable(f"{axes.shape} space directions")
        affine[:3, :3] = axes.T
        units = header.get("space units")
    elif "spacings" in header:
        affine[:3, :3] = np.diag(np.array(header["spacings"], dtype=np.float64)[:3])
        units = header.get("units")
    else:
        assumed.append("no spacing")
        units = None
    for key in ("axis mins", "axismins"):
        if key in header and "space origin" not in header:
            raise Unverified(key)
    if "space origin" in header:
        affine[:3, 3] = header["space origin"]
    elif "space directions" in header:
        assumed.append("no origin")
    space = header.get("space")
    signs = {key.lower(): value for key, value in _SPACES.items()}.get(str(space).lower())
    if signs is None and space is not None:
        assumed.append(f"space {space} is no patient's")
    affine = np.diag([*(signs or (-1, -1)), 1, 1]) @ affine
    if units is not None:
        words = list(units)[:dimensions]
        unknown = [word for word in words if word and word not in _MM]
        if unknown:
            raise Unreadable(f"units {unknown}")
        factors = [_MM.get(word, 1.0) for word in words]
        if "space directions" in header:  # of the axes of space
            affine[:3] *= np.array((factors * 3)[:3])[:, None]
        elif len(set(factors)) == 1:
            affine[:3] *= factors[0]
        else:
            raise Unreadable(f"units {words}")
        if not all(words):
            assumed.append("a unit is missing")
    if not np.isfinite(affine).all():
        raise Unreadable("a place that is not finite")
    return affine, assumed
