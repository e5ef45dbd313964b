# SPDX-License-Identifier: Apache-2.0
"""The file formats of volumes by their ending; DICOM series are folders, see ``dicom``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fastproto.data.formats import metaimage, nifti, nrrd
from fastproto.data.formats.checks import Voxels


class Format(NamedTuple):
    """How files of one ending are read, and written where they are.

    Attributes:
        read: Reads a file and checks what ``check_voxels`` cannot; raises VolumeError,
            GeometryError, or what ``reading`` turns into one.
        write: Writes a file completely or raises OSError; gets [Z, Y, X] or [C, Z, Y, X] of u1, u2,
            i2, i4 or f4.
    """

    read: Callable[[Path], Voxels]
    write: Callable[[Path, Voxels], None] | None = None


FORMATS = {
    ".nii.gz": Format(nifti.read, nifti.write),
    ".nii": Format(nifti.read, nifti.write),
    ".seg.nrrd": Format(nrrd.read),  # 3D Slicer's segmentations, see `write_label`
    ".nrrd": Format(nrrd.read, nrrd.write),
    ".nhdr": Format(nrrd.read),
    ".mha": Format(metaimage.read, metaimage.write),
    ".mhd": Format(metaimage.read),
}
READABLE = tuple(FORMATS)
WRITABLE = {suffix: format_.write for suffix, format_ in FORMATS.items() if format_.write}
# What to do about files of other formats that users have, by their ending.
CONVERT = {
    ".hdr": "Analyze and two-file NIfTI do not hold together: make one .nii.gz of it, e.g. with "
    "3D Slicer or nibabel, and look whether left and right are right.",
    ".mnc": "Convert this MINC volume with `mnc2nii scan.mnc scan.nii`.",
    ".mgz": "Convert this FreeSurfer volume with `mri_convert scan.mgz scan.nii.gz`.",
}
CONVERT |= {".img": CONVERT[".hdr"], ".img.gz": CONVERT[".hdr"], ".mgh": CONVERT[".mgz"]}
CONVERT |= dict.fromkeys((".nii.bz2", ".nii.xz", ".nii.zst"), "Unpack it, and call it .nii.")
CONVERT = {ending: text for ending, text in CONVERT.items() if ending not in FORMATS}
