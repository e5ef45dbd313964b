# SPDX-License-Identifier: Apache-2.0
"""A label map as a DICOM segmentation (SEG) of the series it was found in, by highdicom.

It is of type BINARY, which viewers read, with a frame for each slice where an organ is. Its
segments are numbered from 1 in the order of the label values, as the standard wants it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from fastproto._version import __version__
from fastproto.data.anatomy import Code, organ, organ_colours
from fastproto.data.formats.checks import require_volume, unique_names
from fastproto.data.formats.dicom_header import EXPORT_AGAIN, pydicom_reading
from fastproto.errors import import_extra

if TYPE_CHECKING:
    from pydicom import Dataset

    from fastproto.data.volume import Volume

_INSTEAD = "Write it as .seg.nrrd or .nii.gz."
# What the standard wants of every image, and what it lets be empty.
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID",
           "FrameOfReferenceUID")  # fmt: skip
_MAY_BE_EMPTY = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber",
                 "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName")  # fmt: skip
_LABEL_LENGTH = 64  # of SegmentLabel


def require_highdicom() -> ModuleType:
    """The library that writes segmentations.

    Raises:
        ArgumentError: It is not installed.
    """
    instead = "Or write .seg.nrrd or .nii.gz."
    library: ModuleType = import_extra("dicom-seg", "highdicom", otherwise=instead)
    return library


def source_images(like: Volume) -> list[Dataset]:
    """The headers of the files that a scan was read from, in the order of its slices.

    Raises:
        VolumeError: It was not read from DICOM, from several multi-frame files, or from files
            that a segmentation cannot refer to.
        ArgumentError: highdicom is missing.
    """
    require_highdicom()
    import pydicom

    require_volume(
        like.slices,
        like.name,
        found="a scan that is no DICOM series",
        allowed="one, for a DICOM segmentation (.dcm), which refers to it",
        fix=_INSTEAD,
    )
    paths = [*dict.fromkeys(path for path, _ in like.slices or ())]
    require_volume(
        len(paths) in (1, len(like.array)),
        like.name,
        found=f"a series of {len(paths)} multi-frame files",
        allowed="single slices or one multi-frame file, for a DICOM segmentation (.dcm)",
        fix=_INSTEAD,
    )
    headers: list[Dataset] = []
    for path in paths:
        with pydicom_reading(path):
            header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
            missing = [keyword for keyword in _NEEDED if not header.get(keyword)]
            header.decode()
            header.SpecificCharacterSet = "ISO_IR 192"  # UTF-8, which has the letters of any name
            for keyword in _MAY_BE_EMPTY:
                if keyword not in header:
                    setattr(header, keyword, "")
        require_volume(
            not missing,
            path,
            found=f"no {' and no '.join(missing)}",
            allowed="slices with one, to which a DICOM segmentation (.dcm) refers",
            fix=f"{EXPORT_AGAIN} {_INSTEAD}",
        )
        headers.append(header)
    return headers


def write_segmentation(
    path: Path, labels: np.ndarray, names: Mapping[int, str], like: Volume
) -> None:
    """Write a segmentation.

    Args:
        path: Where.
        labels: [Z, Y, X], integers of 0 and above, on the grid of ``like``.
        names: Of every value above 0; a segment each, also where it does not occur.
        like: The scan, as `fastproto.data.read_volume` read it from DICOM.

    Raises:
        VolumeError: As `source_images`, or headers that highdicom cannot use.
        ArgumentError: highdicom is missing.
        OSError: It cannot be written.
    """
    headers = source_images(like)
    slices = like.slices or ()
    order = [frame for _, frame in slices] if len(headers) == 1 else [*range(len(labels))]
    numbers = np.zeros(max(names) + 1, np.uint16)  # of the segment, by label value
    numbers[sorted(names)] = np.arange(1, len(names) + 1)
    frames = np.empty(labels.shape, np.uint8 if len(names) < 256 else np.uint16)
    for index, slice_ in zip(order, labels, strict=True):
        frames[index] = numbers[slice_]
    with pydicom_reading(like.path or path):
        segmentation = _segmentation(headers, frames, names)
    segmentation.save_as(path, enforce_file_format=True)


def _segmentation(
    headers: Sequence[Dataset], frames: np.ndarray, names: Mapping[int, str]
) -> Dataset:
    highdicom = require_highdicom()
    from highdicom.color import CIELabColor
    from highdicom.seg import Segmentation, SegmentDescription
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    def coded(code: Code) -> CodedConcept:
        return CodedConcept(code.value, "SCT", code.meaning)

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="fastproto", family=codes.DCM.ArtificialIntelligence, version=__version__
    )
    colours = organ_colours(names)
    titles = unique_names(names.items())
    descriptions = []
    for number, value in enumerate(sorted(names), start=1):
        known = organ(names[value])
        description = SegmentDescription(
            segment_number=number,
            segment_label=titles[value].replace("\\", "/")[:_LABEL_LENGTH],
            segmented_property_category=coded(known.category),
            segmented_property_type=coded(known.type),
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
            display_color=CIELabColor.from_rgb(*colours[value]),
        )
        if known.side:
            kind = description.SegmentedPropertyTypeCodeSequence[0]
            kind.SegmentedPropertyTypeModifierCodeSequence = [coded(known.side)]
        descriptions.append(description)
    with warnings.catch_warnings():  # such as that nothing was found, so that all is empty
        warnings.simplefilter("ignore")
        segmentation = Segmentation(
            source_images=headers,
            pixel_array=frames,
            segmentation_type="BINARY",
            segment_descriptions=descriptions,
            series_instance_uid=highdicom.UID(),
            series_number=int(headers[0].get("SeriesNumber") or 0) + 1000,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="fastproto",
            manufacturer_model_name="fastproto",
            software_versions=__version__,
            device_serial_number=__version__,
            content_description="Organs found by fastproto",
            content_label="SEGMENTATION",
        )
    segmentation.SeriesDescription = "Organs found by fastproto"
    return segmentation
