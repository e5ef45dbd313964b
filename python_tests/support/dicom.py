# SPDX-License-Identifier: Apache-2.0
"""Small DICOM files, written with pydicom: slices, enhanced multi-frame scans and segmentations."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import Dataset, dcmread
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.pixels import pack_bits
from pydicom.uid import UID, ExplicitVRLittleEndian, RLELossless, generate_uid

from fastproto.data.formats import dicom_header

CT = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
COLOUR = "1.2.840.10008.5.1.4.1.1.7"
STRUCTURES = "1.2.840.10008.5.1.4.1.1.481.3"
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
STRAIGHT = (1, 0, 0, 0, 1, 0)


def new(sop_class: str = CT, **elements: Any) -> FileDataset:
    """A data set with a file's meta information; ``elements`` by keyword, None for none."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(sop_class)
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    values = {"Modality": "CT", "StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.2.3"}
    return _with(dataset, **{**values, **elements})


def save(dataset: FileDataset, path: Path) -> Path:
    dataset.save_as(path, enforce_file_format=True)
    return path


def refuse(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make files of this name ones that may not be opened, for root too."""

    def opened(path: Path, *args: Any) -> Any:
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        return open(path, *args)

    monkeypatch.setattr(dicom_header, "open", opened, raising=False)


def pixels(stored: np.ndarray, bits: int | None = None, **elements: Any) -> dict[str, Any]:
    """The elements of grey pixels [..., rows, columns]; ``bits`` are BitsStored."""
    allocated = stored.dtype.itemsize * 8
    bits = bits or allocated
    return {
        "Rows": stored.shape[-2], "Columns": stored.shape[-1], "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": allocated, "BitsStored": bits,
        "HighBit": bits - 1, "PixelRepresentation": int(stored.dtype.kind == "i"),
        "PixelData": stored.tobytes(), **elements,
    }  # fmt: skip


def write_slices(
    folder: Path, stack: np.ndarray, heights: Sequence[float], bits: int | None = None, **elements
) -> Path:
    """A series of slices IM00, IM01, ... of 0.7 x 0.9 mm; ``elements`` may be functions of z."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (stored, z) in enumerate(zip(stack, heights, strict=True)):
        chosen = {key: value(z) if callable(value) else value for key, value in elements.items()}
        place = {"ImagePositionPatient": [-20.5, 30.25, z], "ImageOrientationPatient": [*STRAIGHT],
                 "PixelSpacing": [0.9, 0.7], "SliceThickness": 5}  # fmt: skip
        save(new(**{**pixels(stored, bits), **place, **chosen}), folder / f"IM{index:02d}")
    return folder


def compress(folder: Path, method: str) -> None:
    """Compress every file of a folder: "rle" by pydicom, "jpeg" and "j2k" (lossless) by GDCM."""
    for path in folder.iterdir():
        dataset = dcmread(path)
        if method == "rle":
            dataset.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
        else:
            stored = dataset.pixel_array
            image = sitk.GetImageFromArray(stored.reshape(-1, *stored.shape[-2:]))
            writer = sitk.ImageFileWriter()
            writer.SetImageIO("GDCMImageIO")
            writer.SetUseCompression(True)
            writer.SetCompressor({"jpeg": "JPEG", "j2k": "JPEG2000"}[method])
            with tempfile.TemporaryDirectory() as temporary:
                writer.SetFileName(f"{temporary}/a.dcm")
                writer.Execute(image)
                encoded = dcmread(f"{temporary}/a.dcm")
            dataset.file_meta.TransferSyntaxUID = encoded.file_meta.TransferSyntaxUID
            dataset.PixelData = encoded.PixelData
            dataset["PixelData"].VR = "OB"
            dataset["PixelData"].is_undefined_length = True
        assert dataset.file_meta.TransferSyntaxUID.is_encapsulated
        save(dataset, path)


def groups(**elements: Any) -> Dataset:
    """An item of functional groups: each sequence with one item of these elements."""
    return _with(Dataset(), **{name: [_with(Dataset(), **item)] for name, item in elements.items()})


def enhanced(
    stack: np.ndarray,
    positions: Sequence[Sequence[float]],
    rescaling: Sequence[tuple[float, float]] | None = None,
    axes: Sequence[Sequence[float]] | None = None,
    **elements: Any,
) -> FileDataset:
    """A multi-frame CT [frames, rows, columns] of 0.7 x 0.9 mm with a position for each frame."""
    frames = []
    for index, position in enumerate(positions):
        frame = groups(PlanePositionSequence={"ImagePositionPatient": [*position]})
        if rescaling:
            slope, intercept = rescaling[index]
            item = {"RescaleSlope": slope, "RescaleIntercept": intercept, "RescaleType": "HU"}
            frame.update(groups(PixelValueTransformationSequence=item))
        if axes:
            item = {"ImageOrientationPatient": [*axes[index]]}
            frame.update(groups(PlaneOrientationSequence=item))
        frames.append(frame)
    shared = groups(PixelMeasuresSequence={"PixelSpacing": [0.9, 0.7], "SliceThickness": 5})
    if axes is None:
        item = {"ImageOrientationPatient": [*STRAIGHT]}
        shared.update(groups(PlaneOrientationSequence=item))
    return new(ENHANCED_CT, **{
        **pixels(stack), "NumberOfFrames": len(stack), "SharedFunctionalGroupsSequence": [shared],
        "PerFrameFunctionalGroupsSequence": frames, **elements,
    })  # fmt: skip


def segmentation(
    frames: Sequence[tuple[int, Sequence[float], np.ndarray]],
    names: dict[int, str],
    kind: str = "BINARY",
    spacing: Sequence[float] = (0.9, 0.7),
    axes: Sequence[float] = STRAIGHT,
    **elements: Any,
) -> FileDataset:
    """A SEG of frames (segment, position, pixels [rows, columns]); no segment for a LABELMAP."""
    items = []
    for segment, position, _ in frames:
        item = groups(PlanePositionSequence={"ImagePositionPatient": [*position]})
        number = {"ReferencedSegmentNumber": segment}
        if kind != "LABELMAP":
            item.update(groups(SegmentIdentificationSequence=number))
        items.append(item)
    shared = groups(
        PixelMeasuresSequence={"PixelSpacing": [*spacing], "SliceThickness": 5},
        PlaneOrientationSequence={"ImageOrientationPatient": [*axes]},
    )
    segments = [
        _with(Dataset(), SegmentNumber=number, SegmentLabel=name) for number, name in names.items()
    ]
    stored = np.stack([values for _, _, values in frames])
    fields = pixels(stored)
    if kind == "BINARY":
        fields |= {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}
        fields["PixelData"] = pack_bits(stored.astype(np.uint8))
    return new(SEGMENTATION, **{
        **fields, "Modality": "SEG", "SeriesInstanceUID": "1.2.99", "NumberOfFrames": len(frames),
        "SegmentationType": kind, "SegmentSequence": segments,
        "SharedFunctionalGroupsSequence": [shared],
        "PerFrameFunctionalGroupsSequence": items, **elements,
    })  # fmt: skip


def _with(dataset: Any, **elements: Any) -> Any:
    for keyword, value in elements.items():
        if value is None and keyword in dataset:
            del dataset[keyword]
        elif value is not None:
            setattr(dataset, keyword, value)
    return dataset
