# SPDX-License-Identifier: Apache-2.0
"""Image files for the tests of readers: byte by byte, without a library that might mend them."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastproto.data import Volume, read_volume
from fastproto.errors import InputError

ARRAY = np.random.default_rng(0).normal(100, 30, (5, 6, 7)).astype(np.float32)
SHORTS = np.random.default_rng(0).integers(-1000, 3000, (5, 6, 7)).astype(np.int16)

_TYPES = {"i2": 4, "f4": 16, "f8": 64, "u1": 2, "i4": 8, "u2": 512}


def refused(path: Path, kind: type[InputError], *words: str) -> None:
    """``read_volume`` raises exactly ``kind``, and the message names the file and the words."""
    with pytest.raises(kind) as caught:
        read_volume(path)
    assert type(caught.value) is kind
    for word in (str(path), *words):
        assert word in str(caught.value)


def affine_of(volume: Volume) -> np.ndarray:
    """[4, 4] from indices to RAS, as nibabel's."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(volume.direction, (3, 3)) * volume.spacing
    affine[:3, 3] = volume.origin
    return np.diag([-1, -1, 1, 1]) @ affine


def nifti_bytes(array: np.ndarray, *, extension: bytes = b"", data: bytes = b"", **fields: Any):
    """A NIfTI-1 file of ``array`` [Z, Y, X], header fields as nibabel names them.

    By default 0.7 x 0.8 x 2.5 mm without any form; ``data`` takes the place of the voxels.
    """
    import nibabel

    header = nibabel.Nifti1Header(endianness="<")
    values = {
        "dim": [array.ndim, *array.shape[::-1], *[1] * (7 - array.ndim)],
        "datatype": _TYPES[array.dtype.str[1:]],
        "bitpix": 8 * array.itemsize,
        "pixdim": [1, 0.7, 0.8, 2.5, 0, 0, 0, 0],
        "vox_offset": 352 + len(extension),
        "scl_slope": 1,
        "scl_inter": 0,
        "magic": b"n+1",
        **fields,
    }
    for name, value in values.items():
        header[name] = value
    return header.binaryblock + bytes(4) + extension + (data or array.tobytes())


def write_nifti(path: Path, array: np.ndarray, **fields: Any) -> Path:
    """The file of ``nifti_bytes``, compressed as its name says."""
    content = nifti_bytes(array, **fields)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def text_header(lines: dict[str, str | None], given: dict[str, str | None], separator: str) -> str:
    """``lines`` and then those ``given`` that are new; None leaves one out."""
    merged = {**lines, **given}
    return "".join(
        f"{key}{separator}{value}\n" for key, value in merged.items() if value is not None
    )
