# SPDX-License-Identifier: Apache-2.0
"""NIfTI-1 files, decompressed once: voxels and checks are our own, the geometry is SimpleITK's.

SimpleITK fills the missing half of a truncated file with zeros, turns NaN and Inf voxels into 0,
reads a NaN or zero voxel size as 1 and falls back to the qform where the sform is sheared, all
without an error; and of "a.nii.gz" it takes the voxels from an "a.nii" beside it. So it only sees
the header, of a file that was read to its end and found good.
Field offsets: nifti1.h of the NIfTI-1.1 standard.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import SimpleITK as sitk

from fastproto.data.formats.common import (
    Voxels,
    check_orthonormal,
    check_three_dimensions,
    read_image,
    reading,
    write_image,
)
from fastproto.errors import GeometryError, VolumeError, require

_DTYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8",
    256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
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

_Stream = IO[bytes] | gzip.GzipFile


class _Header(NamedTuple):
    """Sizes (x first), voxel type, (slope, intercept), and where the data begin and end."""

    shape: tuple[int, ...]
    dtype: np.dtype
    scaling: tuple[float, float]
    offset: int
    end: int


def read(path: Path) -> Voxels:
    """Read a .nii or .nii.gz file to its end, with every check.

    Raises:
        VolumeError: No NIfTI file, truncated or damaged, no 3-D scalar volume, NaN or Inf voxels.
        GeometryError: Voxel sizes or a transform that cannot be used.
    """
    with _opened(path) as stream:
        head = stream.read(_HEADER_BYTES)
        header = _check_header(path, head, scalar=True)
        data = bytearray()
        size = 0
        for chunk in _chunks(head, stream):
            tested = len(data) // header.dtype.itemsize
            data += chunk[max(header.offset - size, 0) : max(header.end - size, 0)]
            size += len(chunk)
            if header.dtype.kind == "f":
                _check_finite(path, data, tested, header)
        _check_complete(path, size, header)
    array = np.frombuffer(data, header.dtype).reshape(header.shape[2::-1])
    array = _scaled(array.astype(array.dtype.newbyteorder("="), copy=False), header)
    kind = {"u": "unsigned integer", "i": "signed integer", "f": "float"}[array.dtype.kind]
    info = sitk.ImageFileReader()
    info.SetFileName(str(path))
    with reading(path):
        info.ReadImageInformation()
        found = sitk.GetPixelIDValueAsString(info.GetPixelIDValue())
        if (info.GetSize(), found) != (header.shape[:3], f"{8 * array.itemsize}-bit {kind}"):
            # By the header's intent a vector of one component, whose signs ITK may turn.
            return read_image(path)
        # Through an image, for ITK's checks of one.
        grid = sitk.Image([1, 1, 1], sitk.sitkUInt8)
        grid.SetSpacing(info.GetSpacing())
        grid.SetOrigin(info.GetOrigin())
        grid.SetDirection(info.GetDirection())
    return array, grid.GetSpacing(), grid.GetOrigin(), grid.GetDirection()


def write(path: Path, image: sitk.Image) -> None:
    """Write a file and see that it is whole: SimpleITK says nothing when the disk is full.

    Raises:
        RuntimeError, VolumeError: It cannot be written, or is short.
    """
    write_image(path, image)
    with _opened(path) as stream:
        head = stream.read(_HEADER_BYTES)
        header = _check_header(path, head, scalar=False)
        _check_complete(path, sum(map(len, _chunks(head, stream))), header)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Stream]:
    """The file's bytes, decompressed where they begin as gzip's."""
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        try:
            if not compressed:
                yield file
                return
            with gzip.GzipFile(fileobj=file) as stream:
                yield stream
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise VolumeError(
                path,
                found=f"a truncated or damaged gzip stream ({error})",
                allowed="a complete .nii.gz file",
                fix="Copy or export the file again.",
            ) from error
        except MemoryError as error:
            raise VolumeError(
                path, found="more data than memory holds", allowed="a volume that fits"
            ) from error


def _chunks(chunk: bytes, stream: _Stream) -> Iterator[bytes]:
    """The bytes read already, then all others; to the end, where gzip tests its checksum."""
    while chunk:
        yield chunk
        chunk = stream.read(_CHUNK_BYTES)


def _check_header(path: Path, head: bytes, *, scalar: bool) -> _Header:
    order = _byte_order(path, head)

    def field(place: tuple[int, str]) -> tuple:
        return struct.unpack_from(order + place[1], head, place[0])

    (datatype,) = field(_DATATYPE)
    shape = _check_shape(path, field(_DIM), datatype)
    if scalar:
        check_three_dimensions(path, shape, "file")
    pixdim, scaling = field(_PIXDIM)[1:4], field(_SCALING)
    require(
        all(math.isfinite(size) and size > 0 for size in pixdim),
        path,
        error=GeometryError,
        found=f"voxel size (pixdim) {', '.join(f'{size:g}' for size in pixdim)}",
        allowed="finite sizes above 0 mm",
        fix="Correct the header from the scanner's data; distances cannot be guessed.",
    )
    # NaN is how some writers say "no scaling"; the readers, SimpleITK included, agree on that.
    require(
        not any(map(math.isinf, scaling)),
        path,
        error=VolumeError,
        found="scl_slope {:g} and scl_inter {:g}".format(*scaling),
        allowed="finite intensity scaling",
    )
    qform_code, sform_code = field(_FORM_CODES)
    qform = field(_QFORM) if qform_code > 0 else ()
    sform = field(_SFORM) if sform_code > 0 else ()
    _check_transforms(path, qform, sform, pixdim)
    (offset,) = field(_VOX_OFFSET)
    require(
        math.isfinite(offset) and offset >= _HEADER_BYTES,
        path,
        error=VolumeError,
        found=f"vox_offset {offset:g}",
        allowed=f"at least {_HEADER_BYTES} (the header)",
    )
    dtype = np.dtype(order + _DTYPES[datatype])
    end = int(offset) + math.prod(shape) * dtype.itemsize
    return _Header(shape, dtype, scaling, int(offset), end)


def _byte_order(path: Path, head: bytes) -> str:
    """The struct code of the header's byte order, where it is a NIfTI-1 header at all."""
    if len(head) == _HEADER_BYTES:
        for order in "<>":
            (size,) = struct.unpack_from(order + "i", head)
            if size == _HEADER_BYTES and head[-4:] == b"n+1\0":
                return order
            require(
                size != 540,
                path,
                error=VolumeError,
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


def _check_shape(path: Path, dim: tuple[int, ...], datatype: int) -> tuple[int, ...]:
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
    return shape


def _check_transforms(
    path: Path, qform: tuple[float, ...], sform: tuple[float, ...], pixdim: tuple[float, ...]
) -> None:
    """Of the transforms that are used; an unused one is empty."""
    require(
        all(map(math.isfinite, (*qform, *sform))),
        path,
        error=GeometryError,
        found="NaN or Inf in the qform or sform",
        allowed="finite transforms",
    )
    if not sform:
        return
    axes = np.array(sform, dtype=np.float64).reshape(3, 4)[:, :3]
    lengths = np.linalg.norm(axes, axis=0)
    require(
        (lengths != 0).all() and np.abs(lengths / pixdim - 1).max() <= 0.01,
        path,
        error=GeometryError,
        found="an sform with voxels of "
        f"{', '.join(f'{length:.4g}' for length in lengths)} where the header says "
        f"{', '.join(f'{size:.4g}' for size in pixdim)}",
        allowed="one voxel size",
        fix="Resample the volume to a grid without scaling in its sform.",
    )
    check_orthonormal(path, axes / lengths)


def _check_complete(path: Path, size: int, header: _Header) -> None:
    require(
        size >= header.end,
        path,
        error=VolumeError,
        found=f"{size} bytes of data where the header promises {header.end} "
        f"({' x '.join(map(str, header.shape))} voxels of {header.dtype.itemsize} bytes)",
        allowed="a complete file",
        fix="The file is truncated or its header damaged: copy or export it again.",
    )


def _check_finite(path: Path, data: bytearray, tested: int, header: _Header) -> None:
    """Of the data read so far, all whole voxels but the first ``tested``."""
    whole = len(data) // header.dtype.itemsize
    if whole == tested:
        return
    values = np.frombuffer(data, header.dtype, whole)[tested:]
    finite = np.isfinite(values)
    if finite.all():
        return
    bad = int(np.argmin(finite))
    where = np.unravel_index(tested + bad, header.shape, order="F")
    raise VolumeError(
        path,
        found=f"a {values[bad]} voxel at (x, y, z) = {tuple(map(int, where[:3]))}",
        allowed="finite voxels",
        fix="Replace NaN and Inf by a background value before using the volume.",
    )


def _scaled(array: np.ndarray, header: _Header) -> np.ndarray:
    """Voxels times slope plus intercept in the types and by the rules of ITK, bit for bit."""
    slope, intercept = (value if math.isfinite(value) else 0.0 for value in header.scaling)
    smallest = np.finfo(np.float64).eps
    if abs(slope) < smallest:
        slope = 1.0
    if abs(slope - 1) <= smallest and abs(intercept) <= smallest:
        return array
    scaled = array if array.dtype.kind == "f" else array.astype(np.float32)
    with np.errstate(over="ignore"):
        for plane in scaled:
            plane[...] = np.multiply(plane, slope, dtype=np.float64) + intercept
    return scaled
