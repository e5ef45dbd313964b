# SPDX-License-Identifier: Apache-2.0
"""NIfTI-1 files, read and written with numpy.

The voxels are placed as nibabel and the viewers place them: by the sform where its code is above 0,
else by the qform where its code is, else without orientation about the centre. Header lengths in
metres or micrometres are converted, as ITK does; most programs take all of them for millimetres,
and most files say that or nothing. What places the voxels is kept as it was, for a result to carry
(``Voxels.nifti``): whoever opens a scan and its label map sees them in one place.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastproto.data.formats.body import GZIP, deflated, inflated, is_gzip, opened, read_array, skip
from fastproto.data.formats.checks import (
    GRID_TOLERANCE,
    Grid,
    Numbers,
    Voxels,
    check_axes,
    check_finite,
    check_size,
    check_spacing,
    grid,
    require_geometry,
    require_volume,
)
from fastproto.errors import warn

_DTYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8",
    256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
_COLOURS = (128, 2304)
_HEADER_BYTES = 348
_DATA_OFFSET = 352
_VECTOR_INTENT = 1007
_SCANNER = 1  # the code of a form that places the voxels where the scanner saw them
_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown, metres, millimetres, micrometres
# As in nibabel: a smaller square of a quaternion's real part is rounding of 0.
_HALF_TURN = 3 * float(np.finfo(np.float32).eps)
# Of nifti1.h in the NIfTI-1.1 standard, what is used here: type and offset.
_LAYOUT: Any = {
    "sizeof_hdr": ("i4", 0), "regular": ("S1", 38), "dim": ("8i2", 40), "intent": ("i2", 68),
    "datatype": ("i2", 70), "bitpix": ("i2", 72), "pixdim": ("8f4", 76), "vox_offset": ("f4", 108),
    "scaling": ("2f4", 112), "units": ("u1", 123), "form_codes": ("2i2", 252),
    "qform": ("6f4", 256), "sform": ("(3,4)f4", 280), "magic": ("S4", 344),
}  # fmt: skip
_FIELDS = np.dtype(_LAYOUT)
_PLACE = ["pixdim", "units", "form_codes", "qform", "sform"]


class _Header(NamedTuple):
    """The fields, sizes (x first), voxel type, and where the data begin."""

    fields: np.void
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int


def read(path: Path) -> Voxels:
    """Read a .nii or .nii.gz file to its end, with every check.

    Raises:
        VolumeError, GeometryError: What the checks find.
        OSError, zlib.error, EOFError, MemoryError: Unreadable.
    """
    with opened(path) as file:
        compressed = is_gzip(file)
        stream = inflated(file) if compressed else file
        header = _header(path, stream.read(_HEADER_BYTES))
        _check_header(path, header)
        skip(stream, header.offset - _HEADER_BYTES)
        slope, intercept = header.fields["scaling"].tolist()
        scaling = (1.0, 0.0) if slope == 0 or math.isnan(slope) else (slope, intercept)
        array = read_array(path, stream, header.shape[2::-1], header.dtype, *scaling)
    if compressed and path.name.lower().endswith(".nii"):
        warn(path, "the file is gzip-compressed: call it .nii.gz, other programs may not read it.")
    return Voxels(array, *_grid(header.fields, header.shape), header.fields[_PLACE].copy())


def write(path: Path, voxels: Voxels) -> None:
    """Write a file, compressed as its name says.

    Where ``voxels`` lie on the grid of a NIfTI file, both its forms and their codes are written as
    they were there.

    Raises:
        OSError: It cannot be written.
    """
    array = voxels.array
    shape = array.shape[:-4:-1]
    fields = np.zeros((), _FIELDS)
    fields["sizeof_hdr"], fields["regular"], fields["magic"] = _HEADER_BYTES, b"r", b"n+1"
    fields["dim"] = (3, *shape, 1, 1, 1, 1)
    if array.ndim == 4:
        fields["dim"], fields["intent"] = (5, *shape, 1, len(array), 1, 1), _VECTOR_INTENT
    fields["datatype"] = next(code for code, name in _DTYPES.items() if array.dtype == name)
    fields["bitpix"] = 8 * array.itemsize
    fields["vox_offset"], fields["scaling"] = _DATA_OFFSET, (1, 0)
    kept = voxels.nifti
    place: np.void | np.ndarray = _place(*voxels[1:4])
    if kept is not None and _grid(kept, shape) == voxels[1:4]:
        place = kept
    for name in _PLACE:
        fields[name] = place[name]
    data = fields.tobytes().ljust(_DATA_OFFSET, b"\0")
    with open(path, "wb") as file:
        if path.name.endswith(".gz"):
            file.writelines(deflated(array, GZIP, before=data))
        else:
            file.write(data)
            file.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)


def _header(path: Path, head: bytes) -> _Header:
    """Parse the header, of which only what that needs is checked."""
    order = ">" if head[:1] == b"\0" else "<"
    fields = np.frombuffer(head.ljust(_HEADER_BYTES), _FIELDS.newbyteorder(order), 1)[0]
    magic = fields["magic"]
    known = {b"ni1": "the header of a two-file NIfTI volume", b"": "an Analyze 7.5 file"}
    of_348 = fields["sizeof_hdr"] == _HEADER_BYTES == len(head)
    what = known.get(magic, "no NIfTI header") if of_348 else "no NIfTI header"
    require_volume(
        of_348 and magic == b"n+1",
        path,
        found="a NIfTI-2 file" if fields["sizeof_hdr"] == 540 else what,
        allowed="a single-file NIfTI-1 volume",
        fix="Convert it, or copy it again: it may be damaged, truncated or of another format.",
    )
    dimensions, *size = fields["dim"].tolist()
    datatype, offset = int(fields["datatype"]), float(fields["vox_offset"])
    what = "colour" if datatype in _COLOURS else f"NIfTI datatype {datatype}"
    slope, intercept = fields["scaling"].tolist()
    scaled = f"scl_slope {slope:g} and scl_inter {intercept:g}"
    finite = math.isfinite(intercept) or slope == 0
    at_least = "a whole number from 348 (the header) on"
    for usable, found, allowed in (
        (1 <= dimensions <= 7, f"{dimensions} dimensions in the header", "3"),
        (datatype in _DTYPES, f"voxels of {what}", "one integer or real number per voxel"),
        (offset >= _HEADER_BYTES and offset.is_integer(), f"vox_offset {offset:g}", at_least),
        # A slope of 0 or NaN says that there is no scaling.
        (math.isnan(slope) or (finite and math.isfinite(slope)), scaled, "finite scaling"),
    ):
        require_volume(usable, path, found=found, allowed=allowed)
    dtype = np.dtype(order + _DTYPES[datatype])
    return _Header(fields, tuple(size[:dimensions]), dtype, int(offset))


@np.errstate(over="ignore", invalid="ignore")  # what comes of it is refused
def _check_header(path: Path, header: _Header) -> None:
    fields, shape = header.fields, header.shape
    check_size(path, shape)
    unit = int(fields["units"]) & 7
    found = f"the unit of length {unit} (xyzt_units)"
    allowed = "1 metres, 2 millimetres, 3 micrometres or 0 unknown"
    require_geometry(unit in _MM, path, found=found, allowed=allowed)
    pixdim = fields["pixdim"][1:4] * _MM[unit]
    check_spacing(path, pixdim, "voxel size (pixdim)")
    codes = fields["form_codes"]
    found = f"qform_code {codes[0]} and sform_code {codes[1]}"
    known = ((codes >= 0) & (codes <= 5)).all()
    require_geometry(known, path, found=found, allowed="codes of 0 to 5")
    uses_qform, uses_sform = codes > 0
    if uses_qform:
        check_finite(path, "the qform", fields["qform"])
        length = float(np.linalg.norm(fields["qform"][:3]))
        found = f"a qform whose quaternion has the length {length:g}"
        require_geometry(length <= 1.001, path, found=found, allowed="a length of at most 1")
    if uses_sform:
        check_finite(path, "the sform", fields["sform"].ravel())
        axes = fields["sform"][:, :3] * _MM[unit]
        lengths = np.linalg.norm(axes, axis=0)
        require_geometry(
            (lengths != 0).all() and np.abs(lengths / pixdim - 1).max() <= 0.01,
            path,
            found="an sform with voxels of {:.4g}, {:.4g}, {:.4g}".format(*lengths),
            allowed="the voxel size of the header, {:.4g}, {:.4g}, {:.4g}".format(*pixdim),
            fix="Resample the volume to a grid without scaling in its sform.",
        )
        check_axes(path, axes / lengths)
    if uses_qform and uses_sform:
        corners = np.indices((2, 2, 2)).reshape(3, 8) * (np.array(shape[:3])[:, None] - 1)
        apart = (fields["sform"] - _qform(fields)) @ np.vstack([corners, np.ones(8)])
        distance = np.linalg.norm(apart, axis=0).max() * _MM[unit]
        if distance > GRID_TOLERANCE * pixdim.min():
            warn(
                path,
                f"its sform and qform place the voxels up to {distance:.3g} mm apart; the sform is "
                "taken, as nibabel and most viewers do. A NIfTI result carries both.",
            )
    if not (uses_qform or uses_sform):
        warn(
            path,
            "its header says nothing about orientation (qform and sform have code 0): taken to "
            "run to the left, to the front and upwards, centred, as nibabel does.",
        )


def _grid(fields: np.void, shape: tuple[int, ...]) -> Grid:
    """Spacing, origin and direction in mm and LPS, of a header that was checked."""
    uses_qform, uses_sform = fields["form_codes"] > 0
    if uses_sform:
        affine = fields["sform"].astype(np.float64)
    elif uses_qform:
        affine = _qform(fields)
    else:  # as nibabel's get_base_affine: x runs to the left, and the centre is at 0
        steps = fields["pixdim"][1:4] * (-1.0, 1.0, 1.0)
        affine = np.column_stack([np.diag(steps), steps * (1 - np.array(shape[:3])) / 2])
    affine *= _MM[int(fields["units"]) & 7] * np.array([[-1], [-1], [1]])  # RAS to LPS
    spacing = np.linalg.norm(affine[:, :3], axis=0)
    return grid(spacing, affine[:, 3], affine[:, :3] / spacing)


def _qform(fields: np.void) -> np.ndarray:
    """[3, 4] from indices to RAS, in the header's unit of length."""
    b, c, d = fields["qform"][:3].tolist()
    rest = 1 - b * b - c * c - d * d
    a = math.sqrt(rest) if rest > _HALF_TURN else 0.0
    a, b, c, d = np.array([a, b, c, d]) / math.hypot(a, b, c, d)
    rotation = np.array([
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
    ])  # fmt: skip
    steps = fields["pixdim"][1:4].astype(np.float64)
    steps[2] *= -1 if fields["pixdim"][0] < 0 else 1
    return np.column_stack([rotation * steps, fields["qform"][3:]])


def _place(spacing: Numbers, origin: Numbers, direction: Numbers) -> np.ndarray:
    """The fields of a header that places voxels there, by both forms."""
    fields = np.zeros((), _FIELDS)
    to_ras = np.array([-1.0, -1.0, 1.0])
    axes = np.array(direction).reshape(3, 3) * to_ras[:, None]
    handed = -1 if np.linalg.det(axes) < 0 else 1
    fields["pixdim"][:4] = (handed, *spacing)
    fields["units"], fields["form_codes"] = 2, _SCANNER
    fields["sform"] = np.column_stack([axes * spacing, to_ras * origin])
    # The quaternion is the eigenvector of the largest eigenvalue (Bar-Itzhack, 2000).
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = axes * (1, 1, handed)
    matrix = [
        [xx + yy + zz, 0, 0, 0],
        [zy - yz, xx - yy - zz, 0, 0],
        [xz - zx, yx + xy, yy - xx - zz, 0],
        [yx - xy, zx + xz, zy + yz, zz - xx - yy],
    ]
    quaternion = np.linalg.eigh(matrix)[1][:, -1]  # which reads the lower triangle
    quaternion *= -1 if quaternion[0] < 0 else 1
    fields["qform"] = (*quaternion[1:], *(to_ras * origin))
    return fields
