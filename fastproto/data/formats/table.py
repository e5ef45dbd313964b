# SPDX-License-Identifier: Apache-2.0
"""The file formats of volumes by their ending; DICOM series are folders, see ``dicom``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import SimpleITK as sitk

from fastproto.data.formats import metaimage, nifti
from fastproto.data.formats.checks import Voxels
from fastproto.data.formats.simpleitk import read_image, write_image


class Format(NamedTuple):
    """How files of one ending are read, and written where they are.

    Attributes:
        read: Reads a file and checks what ``check_voxels`` cannot; raises VolumeError,
            GeometryError, or what ``reading`` turns into one.
        write: Writes an image completely or raises RuntimeError or VolumeError.
    """

    read: Callable[[Path], Voxels]
    write: Callable[[Path, sitk.Image], None] | None = None


FORMATS = {
    ".nii.gz": Format(nifti.read, nifti.write),
    ".nii": Format(nifti.read, nifti.write),
    ".nrrd": Format(read_image, write_image),
    ".nhdr": Format(read_image),
    ".mha": Format(metaimage.read, write_image),
    ".mhd": Format(metaimage.read),
}
READABLE = tuple(FORMATS)
WRITABLE = {suffix: format_.write for suffix, format_ in FORMATS.items() if format_.write}
