# SPDX-License-Identifier: Apache-2.0
"""Mutated image files, each read by fastproto and by an independent reader.

A format is a function that makes a good file and damages it (``mutate.py`` has the common damage)
and a second reading of what results: nibabel's, pynrrd's, pydicom's, for MetaImage one written here
from its specification. ``judge.py`` compares, ``campaign.py`` runs many cases in processes that may
die.
"""

from support.fuzz import dicom, dicom_frames, metaimage, nifti, nrrd
from support.fuzz.judge import Format

FORMATS: dict[str, Format] = {
    "nii": Format(nifti.plain, nifti.read),
    "nii.gz": Format(nifti.gzipped, nifti.read),
    "nrrd": Format(nrrd.attached, nrrd.read),
    "nhdr": Format(nrrd.detached, nrrd.read),
    "mha": Format(metaimage.local, metaimage.read),
    "mhd": Format(metaimage.detached, metaimage.read),
    "dicom": Format(dicom.series, dicom.read),
    "multi-frame": Format(dicom_frames.scan, dicom_frames.read_scan),
    "seg": Format(dicom_frames.segmentation, dicom_frames.read_labels, dicom_frames.read_as_learn),
}
