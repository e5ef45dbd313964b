# SPDX-License-Identifier: Apache-2.0
"""NIfTI-1 files, decompressed once: voxels and checks are our own, the geometry is SimpleITK's.

SimpleITK fills the missing half of a truncated file with zeros, turns NaN and Inf voxels into 0,
reads a NaN or zero voxel size as 1 and falls back to the qform where the sform is sheared, all
without an error; and of "a.nii.gz" it takes the voxels from an "a.nii" beside it. So it only sees
the header, of a file that was read to its end and found good.
"""

from __future__ import annotations

import contextlib
import gzip
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import SimpleITK as sitk

from fastproto.data.formats.checks import (
    Voxels,
    check_axes,
    check_complete,
    check_finite,
    check_size,
    check_spacing,
    check_values,
    require_geometry,
    require_volume,
)
from fastproto.data.formats.simpleitk import quiet, read_image, reading, write_image

_DTYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8",
    256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
_COLOURS = (128, 2304)
_CHUNK_BYTES = 1 << 22
_HEADER_BYTES = 348
# Of nifti1.h in the NIfTI-1.1 standard, what is used here: type and offset.
_LAYOUT: Any = {
    "sizeof_hdr": ("i4", 0), "dim": ("8i2", 40), "datatype": ("i2", 70), "pixdim": ("8f4", 76),
    "vox_offset": ("f4", 108), "scaling": ("2f4", 112), "form_codes": ("2i2", 252),
    "qform": ("6f4", 256), "sform": ("(3,4)f4", 280), "magic": ("S4", 344),
}  # fmt: skip
_FIELDS = np.dtype(_LAYOUT)

_Stream = IO[bytes] | gzip.GzipFile


class _Header(NamedTuple):
    """The fields, sizes (x first), voxel type, and where the data begin and end."""

    fields: np.void
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    end: int


def read(path: Path) -> Voxels:
    """Read a .nii or .nii.gz file to its end, with every check.

    Raises:
        VolumeError, GeometryError: What the checks find.
        OSError, zlib.error, EOFError, MemoryError, RuntimeError: Unreadable.
    """
    with _opened(path) as stream:
        head = stream.read(_HEADER_BYTES)
        header = _header(path, head)
        _check_header(path, header)
        data = bytearray()
        size = 0
        for chunk in _chunks(head, stream):
            data += chunk[max(header.offset - size, 0) : max(header.end - size, 0)]
            size += len(chunk)
    check_complete(path, size, header.end)
    array = np.frombuffer(data, header.dtype).reshape(header.shape[2::-1])
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    array = _scaled(array, *header.fields["scaling"].tolist())
    with quiet():
        info = sitk.ImageFileReader()
        info.SetFileName(str(path))
        info.ReadImageInformation()
        grid = sitk.GetImageFromArray(array[:1, :1, :1])
        if (info.GetSize(), info.GetPixelID()) != (header.shape[:3], grid.GetPixelID()):
            # By the header's intent a vector of one component, whose signs ITK may turn.
            check_values(path, array)
            return read_image(path)
        # Through an image, for ITK's checks of one.
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
    with reading(path), _opened(path) as stream:
        head = stream.read(_HEADER_BYTES)
        check_complete(path, sum(map(len, _chunks(head, stream))), _header(path, head).end)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Stream]:
    """The file's bytes, decompressed where they begin as gzip's."""
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        with gzip.GzipFile(fileobj=file) if compressed else contextlib.nullcontext(file) as stream:
            yield stream


def _chunks(chunk: bytes, stream: _Stream) -> Iterator[bytes]:
    """The bytes read already, then all others; to the end, where gzip tests its checksum."""
    while chunk:
        yield chunk
        chunk = stream.read(_CHUNK_BYTES)


def _header(path: Path, head: bytes) -> _Header:
    """Parse the header, of which only what that needs is checked."""
    order = ">" if head[:1] == b"\0" else "<"
    fields = np.frombuffer(head.ljust(_HEADER_BYTES), _FIELDS.newbyteorder(order), 1)[0]
    require_volume(
        fields["sizeof_hdr"] == _HEADER_BYTES == len(head) and fields["magic"] == b"n+1",
        path,
        found="a NIfTI-2 file" if fields["sizeof_hdr"] == 540 else "no NIfTI header",
        allowed="a single-file NIfTI-1 volume",
        fix="Convert it, or copy it again: it may be damaged, truncated or of another format.",
    )
    dimensions, *size = fields["dim"].tolist()
    datatype, offset = int(fields["datatype"]), float(fields["vox_offset"])
    what = "colour" if datatype in _COLOURS else f"NIfTI datatype {datatype}"
    scaling = "scl_slope {:g} and scl_inter {:g}".format(*fields["scaling"])
    for usable, found, allowed in (
        (1 <= dimensions <= 7, f"{dimensions} dimensions in the header", "3"),
        (datatype in _DTYPES, f"voxels of {what}", "one integer or real number per voxel"),
        (348 <= offset < math.inf, f"vox_offset {offset:g}", "at least 348 (the header)"),
        # NaN is how some writers say "no scaling"; the readers, SimpleITK included, agree on that.
        (not np.isinf(fields["scaling"]).any(), scaling, "finite intensity scaling"),
    ):
        require_volume(usable, path, found=found, allowed=allowed)
    shape = tuple(size[:dimensions])
    dtype = np.dtype(order + _DTYPES[datatype])
    end = int(offset) + math.prod(shape) * dtype.itemsize
    return _Header(fields, shape, dtype, int(offset), end)


def _check_header(path: Path, header: _Header) -> None:
    fields = header.fields
    check_size(path, header.shape)
    pixdim = fields["pixdim"][1:4].astype(np.float64)
    check_spacing(path, pixdim, "voxel size (pixdim)")
    uses_qform, uses_sform = fields["form_codes"] > 0
    check_finite(path, "the qform", fields["qform"] if uses_qform else ())
    if not uses_sform:
        return
    check_finite(path, "the sform", fields["sform"].ravel())
    axes = fields["sform"][:, :3].astype(np.float64)
    lengths = np.linalg.norm(axes, axis=0)
    require_geometry(
        (lengths != 0).all() and np.abs(lengths / pixdim - 1).max() <= 0.01,
        path,
        found="an sform with voxels of {:.4g}, {:.4g}, {:.4g}".format(*lengths),
        allowed="the voxel size of the header, {:.4g}, {:.4g}, {:.4g}".format(*pixdim),
        fix="Resample the volume to a grid without scaling in its sform.",
    )
    check_axes(path, axes / lengths)


def _scaled(array: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """Voxels times slope plus intercept in the types and by the rules of ITK, bit for bit."""
    slope, intercept = (value if math.isfinite(value) else 0.0 for value in (slope, intercept))
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
