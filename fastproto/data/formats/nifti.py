# SPDX-License-Identifier: Apache-2.0
"""What SimpleITK does not notice about a NIfTI file, checked on its bytes.

SimpleITK fills the missing half of a truncated file with zeros, turns NaN and Inf voxels into 0,
reads a NaN or zero voxel size as 1 and falls back to the qform where the sform is sheared, all
without an error. Field offsets: nifti1.h of the NIfTI-1.1 standard.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from fastproto.errors import GeometryError, VolumeError

_DTYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
_COLOURS = (128, 2304)
_CHUNK_BYTES = 1 << 22


_HEADER_BYTES = 348
_DIM = (40, "8h")
_DATATYPE = (70, "h")
_PIXDIM = (76, "8f")
_VOX_OFFSET = (108, "f")
_SCALING = (112, "2f")
_FORM_CODES = (252, "2h")
_QFORM = (256, "6f")
_SFORM = (280, "12f")


def check_nifti(path: str | os.PathLike[str], *, scalar: bool = True) -> None:
    """Check the header of a .nii or .nii.gz file and read its data to the end.

    The data stream through a buffer of a few megabytes: nothing is held.

    Args:
        path: The file.
        scalar: Refuse more than one volume or value per voxel.

    Raises:
        VolumeError: No NIfTI file, truncated or damaged, no 3-D scalar volume, NaN or Inf voxels.
        GeometryError: Voxel sizes or a transform that cannot be used.
    """
    path = Path(path)
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        try:
            if compressed:
                with gzip.GzipFile(fileobj=file) as stream:
                    _check_stream(path, stream, scalar)
            else:
                _check_stream(path, file, scalar)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise VolumeError(
                path,
                found=f"a truncated or damaged gzip stream ({error})",
                allowed="a complete .nii.gz file",
                fix="Copy or export the file again.",
            ) from error


def _check_stream(path: Path, stream: IO[bytes] | gzip.GzipFile, scalar: bool) -> None:
    head = stream.read(_HEADER_BYTES)
    order = _byte_order(path, head)

    def field(place: tuple[int, str]) -> tuple:
        return struct.unpack_from(order + place[1], head, place[0])

    (datatype,) = field(_DATATYPE)
    shape = _check_shape(path, field(_DIM), datatype, scalar)
    pixdim = field(_PIXDIM)[1:4]
    _check_pixdim(path, pixdim)
    _check_scaling(path, field(_SCALING))
    _check_transforms(
        path, field(_FORM_CODES), qform=field(_QFORM), sform=field(_SFORM), pixdim=pixdim
    )

    dtype = np.dtype(order + _DTYPES[datatype])
    (offset,) = field(_VOX_OFFSET)
    if not (math.isfinite(offset) and offset >= _HEADER_BYTES):
        raise VolumeError(
            path, found=f"vox_offset {offset:g}", allowed=f"at least {_HEADER_BYTES} (the header)"
        )
    promised = int(offset) + math.prod(shape) * dtype.itemsize
    actual = _check_voxels(path, stream, head, int(offset), promised, shape, dtype)
    if actual < promised:
        raise VolumeError(
            path,
            found=f"{actual} bytes of data where the header promises {promised} "
            f"({' x '.join(map(str, shape))} voxels of {dtype.itemsize} bytes)",
            allowed="a complete file",
            fix="The file is truncated or its header damaged: copy or export it again.",
        )


def _byte_order(path: Path, head: bytes) -> str:
    """The struct code of the header's byte order, where it is a NIfTI-1 header at all."""
    if len(head) == _HEADER_BYTES:
        for order in "<>":
            (size,) = struct.unpack_from(order + "i", head)
            if size == _HEADER_BYTES and head[-4:] == b"n+1\0":
                return order
            if size == 540:
                raise VolumeError(
                    path,
                    found="a NIfTI-2 file, which SimpleITK does not read",
                    allowed="NIfTI-1",
                    fix="Convert it to NIfTI-1.",
                )
    raise VolumeError(
        path,
        found="no NIfTI header",
        allowed="a single-file NIfTI-1 volume",
        fix="The file is damaged, truncated or of another format.",
    )


def _check_shape(path: Path, dim: tuple[int, ...], datatype: int, scalar: bool) -> tuple[int, ...]:
    """The sizes of all axes, x first."""
    if not 1 <= dim[0] <= 7:
        raise VolumeError(path, found=f"{dim[0]} dimensions in the header", allowed="3")
    shape = tuple(dim[1 : dim[0] + 1])
    sizes = " x ".join(map(str, shape))
    if min(shape) < 1:
        raise VolumeError(path, found=f"a volume of {sizes} voxels", allowed="sizes above 0")
    if datatype not in _DTYPES:
        what = "colour voxels" if datatype in _COLOURS else f"voxels of NIfTI datatype {datatype}"
        raise VolumeError(path, found=what, allowed="one integer or real number per voxel")
    if scalar and (len(shape) < 3 or math.prod(shape[3:]) > 1):
        raise VolumeError(
            path,
            found=f"a {len(shape)}-D file of {sizes} voxels",
            allowed="one 3-D volume (further dimensions of size 1 are fine)",
            fix="Save one volume of it as a file of its own.",
        )
    return shape


def _check_pixdim(path: Path, pixdim: tuple[float, ...]) -> None:
    if not all(math.isfinite(size) and size > 0 for size in pixdim):
        raise GeometryError(
            path,
            found=f"voxel size (pixdim) {', '.join(f'{size:g}' for size in pixdim)}",
            allowed="finite sizes above 0 mm",
            fix="Correct the header from the scanner's data; distances cannot be guessed.",
        )


def _check_scaling(path: Path, scaling: tuple[float, ...]) -> None:
    # NaN is how some writers say "no scaling"; the readers, SimpleITK included, agree on that.
    if any(math.isinf(value) for value in scaling):
        raise VolumeError(
            path,
            found="scl_slope {:g} and scl_inter {:g}".format(*scaling),
            allowed="finite intensity scaling",
        )


def _check_transforms(
    path: Path,
    codes: tuple[int, ...],
    *,
    qform: tuple[float, ...],
    sform: tuple[float, ...],
    pixdim: tuple[float, ...],
) -> None:
    qform_code, sform_code = codes
    used = (*(qform if qform_code > 0 else ()), *(sform if sform_code > 0 else ()))
    if not all(map(math.isfinite, used)):
        raise GeometryError(
            path, found="NaN or Inf in the qform or sform", allowed="finite transforms"
        )
    if sform_code <= 0:
        return
    axes = np.array(sform, dtype=np.float64).reshape(3, 4)[:, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if (lengths == 0).any() or np.abs(lengths / pixdim - 1).max() > 0.01:
        raise GeometryError(
            path,
            found="an sform with voxels of "
            f"{', '.join(f'{length:.4g}' for length in lengths)} where the header says "
            f"{', '.join(f'{size:.4g}' for size in pixdim)}",
            allowed="one voxel size",
            fix="Resample the volume to a grid without scaling in its sform.",
        )
    check_orthonormal(path, axes / lengths)


def check_orthonormal(path: object, direction: np.ndarray) -> None:
    """Refuse axes that are sheared or not of unit length.

    Args:
        path: The file, for the message.
        direction: [3, 3], one unit vector per column.

    Raises:
        GeometryError: The columns are not orthonormal to 1e-3.
    """
    if not np.allclose(direction.T @ direction, np.eye(3), rtol=0, atol=1e-3):
        raise GeometryError(
            path,
            found=f"sheared or non-orthonormal axes {np.round(direction, 4).tolist()}",
            allowed="three axes at right angles",
            fix="Resample the volume to an orthogonal grid.",
        )


def _check_voxels(
    path: Path,
    stream: IO[bytes] | gzip.GzipFile,
    head: bytes,
    offset: int,
    promised: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> int:
    """Read to the end, so that gzip's checksum is tested; returns the number of bytes."""
    position = 0
    chunk, pending = head, b""
    while chunk:
        start, position = position, position + len(chunk)
        if dtype.kind == "f":
            pending += chunk[max(offset - start, 0) :]
            whole = len(pending) - len(pending) % dtype.itemsize
            first = position - len(pending) - offset
            values = np.frombuffer(pending[:whole], dtype)
            _check_finite(path, values, first, promised - offset, shape)
            pending = pending[whole:]
        chunk = stream.read(_CHUNK_BYTES)
    return position


def _check_finite(
    path: Path, values: np.ndarray, first: int, data_bytes: int, shape: tuple[int, ...]
) -> None:
    """``first`` is where ``values`` begin in the data, in bytes."""
    index = first // values.dtype.itemsize
    values = values[: max(data_bytes // values.dtype.itemsize - index, 0)]
    finite = np.isfinite(values)
    if finite.all():
        return
    bad = int(np.argmin(finite))
    where = tuple(int(i) for i in np.unravel_index(index + bad, shape, order="F"))
    raise VolumeError(
        path,
        found=f"a {values[bad]} voxel at (x, y, z) = {where[:3]}",
        allowed="finite voxels",
        fix="Replace NaN and Inf by a background value before using the volume.",
    )
