# SPDX-License-Identifier: Apache-2.0
"""NIfTI-1: headers with edge values, forms that disagree, damaged streams; and nibabel."""

from __future__ import annotations

import contextlib
import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np

from support.fuzz.judge import Reading, Unreadable
from support.fuzz.mutate import DTYPES, Case, Rng, damage, grid, pick, rounds, voxels

_NAN, _INF = math.nan, math.inf
_REALS = (0.0, -0.0, 1.0, -1.0, _NAN, _INF, -_INF, 1e-4, 1e-30, 1e30, 0.5, 1000.0, 1e-44)
_SHORTS = (0, 1, -1, 2, 3, 4, 5, 7, 8, 255, 256, 32767, -32768)
_CODES = (0, 1, 2, 3, 4, 5, -1, 255, 256)
# name: (offset, struct code, edge values); of nifti1.h.
_FIELDS: dict[str, tuple[int, str, tuple[Any, ...]]] = {
    "sizeof_hdr": (0, "i", (0, 347, 348, 540, 1543569408)),
    "dim_info": (39, "B", (0, 57, 255)),
    **{f"dim[{i}]": (40 + 2 * i, "h", _SHORTS) for i in range(8)},
    "intent_p1": (56, "f", _REALS),
    "intent_code": (68, "h", (0, 1, 2, 1002, 1004, 1005, 1006, 1007, 1008, 2003, -1)),
    "datatype": (70, "h", (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 2304)),
    "bitpix": (72, "h", (0, 1, 8, 16, 32, 64, -16)),
    "slice_start": (74, "h", _SHORTS),
    **{f"pixdim[{i}]": (76 + 4 * i, "f", _REALS) for i in range(8)},
    "vox_offset": (108, "f", (*_REALS, 348.0, 351.0, 352.0, 352.5, 368.0, 400.0, -352.0)),
    "scl_slope": (112, "f", _REALS),
    "scl_inter": (116, "f", _REALS),
    "xyzt_units": (123, "B", (0, 1, 2, 3, 8, 10, 18, 4, 7, 255)),
    "cal_max": (124, "f", _REALS),
    "qform_code": (252, "h", _CODES),
    "sform_code": (254, "h", _CODES),
    **{name: (256 + 4 * i, "f", _REALS) for i, name in enumerate(("b", "c", "d", "x", "y", "z"))},
    **{f"srow[{i}]": (280 + 4 * i, "f", _REALS) for i in range(12)},
    "magic": (344, "4s", (b"n+1\0", b"ni1\0", b"n+2\0", b"n+1 ", b"\0\0\0\0", b"N+1\0")),
    "extension": (348, "4s", (b"\1\0\0\0", b"\0\0\0\1", b"\xff\xff\xff\xff")),
}
_GEOMETRY = tuple(
    name for name in _FIELDS if name in "bcdxyz" or name.startswith(("srow", "pixdim"))
)
_UNITS = {1: 1000.0, 3: 0.001}


def plain(rng: Rng) -> Case:
    """A .nii file."""
    data, done = _file(rng)
    for _ in range(rounds(rng) if not done else 0):
        data = _damaged(rng, data, done)
    name = "a.nii"
    if done and rng.random() < 0.02:
        data = gzip.compress(data, mtime=0)
        done.append("gzip under the name .nii")
    return Case({name: data}, name, done)


def gzipped(rng: Rng) -> Case:
    """A .nii.gz file, damaged before or after it is compressed."""
    data, done = _file(rng)
    times = rounds(rng) if not done else 0
    inside = int(rng.integers(times + 1))
    for _ in range(inside):
        data = _damaged(rng, data, done)
    packed = gzip.compress(data, mtime=0)
    for _ in range(times - inside):
        packed = _stream(rng, data, packed, done)
    return Case({"a.nii.gz": packed}, "a.nii.gz", done)


def _file(rng: Rng) -> tuple[bytes, list[str]]:
    """A good file in either byte order, with one form or both, with or without scaling."""
    array, affine = (
        voxels(rng, (*DTYPES, "i8", "u8")),
        grid(rng),
    )
    order: Literal["<", ">"] = pick(rng, ("<", "<", "<", ">"))
    header = nib.Nifti1Header(endianness=order)
    header.set_data_shape(array.shape + pick(rng, ((), (), (), (1,), (1, 1))))
    header.set_data_dtype(array.dtype)
    header.set_xyzt_units(pick(rng, ("mm", "mm", "unknown")))
    forms = pick(rng, ("both", "both", "sform", "qform"))
    header.set_qform(affine, 0 if forms == "sform" else pick(rng, (1, 2)))
    header.set_sform(affine, 0 if forms == "qform" else pick(rng, (1, 2, 4)))
    if forms == "sform":
        header["pixdim"][0] = pick(rng, (1, -1, 0))
    scaling = pick(rng, ((1, 0), (0, 0), (_NAN, _NAN), (2.5, -1024), (-0.001, 7)))
    header["scl_slope"], header["scl_inter"] = scaling
    header["magic"] = b"n+1"
    extension = b"" if rng.random() < 0.8 else struct.pack(order + "2i", 32, 6) + rng.bytes(24)
    header["vox_offset"] = 352 + len(extension)
    body = array.astype(array.dtype.newbyteorder(order)).tobytes(order="F")
    flags = b"\1\0\0\0" if extension else b"\0\0\0\0"
    return header.binaryblock + flags + extension + body, []


def _damaged(rng: Rng, data: bytes, done: list[str]) -> bytes:
    kind = pick(rng, ("field",) * 5 + ("geometry",) * 4 + ("forms", "order", "bytes", "length"))
    array = bytearray(data.ljust(352, b"\0"))
    order = ">" if array[:1] == b"\0" else "<"
    if kind in ("field", "geometry"):
        name = pick(rng, tuple(_FIELDS) if kind == "field" else _GEOMETRY)
        offset, code, edges = _FIELDS[name]
        value = pick(rng, edges)
        if kind == "geometry":  # off by rounding, by a little, by much
            old = struct.unpack_from(order + code, array, offset)[0]
            size = pick(rng, (1e-7, 1e-5, 1e-4, 3e-4, 1e-3, 1e-2, 0.1, 2))
            value = old * (1 + size) if rng.random() < 0.5 else old + size * pick(rng, (1, -1))
        with np.errstate(all="ignore"):
            value = float(np.float32(value)) if code == "f" else value
        struct.pack_into(order + code, array, offset, value)
        done.append(f"{name} = {value}")
    elif kind == "forms":
        header = nib.Nifti1Header(bytes(array[:348]), endianness=order, check=False)
        affine = grid(rng)
        which = pick(rng, ("qform", "sform"))
        try:
            if rng.random() < 0.5:  # a little beside the old place
                affine = np.array(header.get_best_affine())
                affine[:3, 3] += rng.normal(size=3) * pick(rng, (1e-4, 1e-2, 1, 100))
            getattr(header, f"set_{which}")(affine, pick(rng, (1, 2, 4)))
        except Exception:  # earlier damage left no affine
            return bytes(array)
        array[:348] = header.binaryblock
        done.append(f"another {which}")
    elif kind == "order":
        header = nib.Nifti1Header(bytes(array[:348]), endianness=order, check=False)
        array[:348] = header.as_byteswapped().binaryblock
        done.append("the header's bytes swapped")
    elif kind == "length":
        size = pick(rng, (1, 16, 100, 1000))
        array = array[:-size] if rng.random() < 0.5 else array + bytes(size)
        done.append(f"length {len(data)} -> {len(array)}")
    else:
        changed, text = damage(rng, data)
        done.append(text)
        return changed
    return bytes(array)


def _stream(rng: Rng, data: bytes, packed: bytes, done: list[str]) -> bytes:
    """Damage to the gzip stream, and forms of it that are fine but seldom."""
    half = len(data) // 2
    kind = pick(
        rng, ("members", "tail", "zeros", "named", "empty", "plain", "sum", "bytes", "bytes")
    )
    done.append(f"gzip: {kind}")
    if kind == "members":
        return gzip.compress(data[:half], mtime=0) + gzip.compress(data[half:], mtime=0)
    if kind in ("tail", "zeros"):
        return packed + (rng.bytes(20) if kind == "tail" else bytes(20))
    if kind == "named":
        return packed[:3] + b"\x08" + packed[4:10] + b"a.nii\0" + packed[10:]
    if kind == "empty":
        return packed + gzip.compress(b"", mtime=0)
    if kind == "plain":
        return data
    if kind == "sum":
        place = len(packed) - int(rng.integers(1, 9))
        return packed[:place] + bytes([packed[place] ^ 1]) + packed[place + 1 :]
    packed, text = damage(rng, packed)
    done[-1] = f"gzip: {text}"
    return packed


def _unpacked(data: bytes) -> bytes:
    """All members of a gzip stream; what follows them is no part of the file."""
    parts = []
    while data[:2] == b"\x1f\x8b":
        decoder = zlib.decompressobj(31)
        parts.append(decoder.decompress(data))
        if not decoder.eof:
            raise Unreadable("the gzip stream has no end")
        data = decoder.unused_data
    return b"".join(parts) if parts else data


def read(path: Path) -> Reading:
    """Nibabel's header without its checks, which change fields; voxels by the standard."""
    data = _unpacked(path.read_bytes())
    if len(data) < 348:
        raise Unreadable("no header")
    order = ">" if data[:1] == b"\0" else "<"
    header = nib.Nifti1Header(data[:348], endianness=order, check=False)
    if header["sizeof_hdr"] != 348 or bytes(header["magic"])[:3] != b"n+1":
        raise Unreadable("no NIfTI-1 header")
    shape, dtype = tuple(map(int, header["dim"][1 : 1 + header["dim"][0]])), header.get_data_dtype()
    start = int(header["vox_offset"])
    if len(shape) < 3 or min(shape) < 1 or math.prod(shape[3:]) != 1:
        raise Unreadable(f"{shape} is not 3-D")
    size = math.prod(shape) * dtype.itemsize
    if len(data) < start + size or start < 348:
        raise Unreadable("fewer bytes than the header says")
    if len(data) > start + size and data[start + size :].strip(b"\0"):
        raise Unreadable("more bytes than the header says")
    array = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape[:3], order="F")
    slope, inter = header.get_slope_inter()
    array = array.astype(dtype.newbyteorder("="))
    if slope is not None and (slope, inter) != (1, 0):
        with np.errstate(all="ignore"):
            array = array.astype(np.float64) * slope + inter
    affine, assumed = _place(header)
    if len(data) > start + size:
        assumed.append("zeros after the voxels")
    return Reading(array, affine, abs(inter or 0.0), assumed)


def _place(header: Any) -> tuple[np.ndarray, list[str]]:
    """The affine in mm, and what had to be assumed for it."""
    assumed: list[str] = []
    parts = (float(header[f"quatern_{part}"]) for part in "bcd")
    if sum(part * part for part in parts) > 1:  # by rounding, up to what an sform may be off
        header.quaternion_threshold = -2e-3
    header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1  # as nifti1_io does
    affine = np.array(header.get_best_affine(), dtype=np.float64)
    if header["qform_code"] <= 0 and header["sform_code"] <= 0:
        assumed.append("no orientation")
    if header["qform_code"] > 0 and header["sform_code"] > 0:
        corner = np.array([*header["dim"][1:4], 1])
        with contextlib.suppress(
            nib.spatialimages.HeaderDataError, ValueError
        ):  # no qform to disagree with
            apart = np.abs((header.get_qform() - affine) @ corner).max()
            if apart > np.linalg.norm(affine[:3, :3], axis=0).max():
                assumed.append("sform and qform disagree")
    factor = _UNITS.get(int(header["xyzt_units"]) & 7, 1.0)
    affine[:3] *= factor
    return affine, assumed
