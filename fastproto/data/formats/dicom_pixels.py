# SPDX-License-Identifier: Apache-2.0
"""The pixels of DICOM files: what they store, and the scanner's values slope * stored + intercept.

PhotometricInterpretation is for displays: MONOCHROME1 means that they show small values bright, and
says nothing about the values. pydicom reads plain pixels and run lengths. GDCM, in SimpleITK,
decodes the rest (JPEG of all kinds); it sees a copy of the file that asks for nothing but that,
because ITK inverts MONOCHROME1.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastproto.data.formats.checks import require_volume
from fastproto.data.formats.dicom_header import EXPORT_AGAIN, Slice, pydicom_reading
from fastproto.data.formats.reading import reading

if TYPE_CHECKING:
    from pydicom import Dataset

_END_OF_IMAGE = b"\xff\xd9"  # in JPEG, JPEG-LS and JPEG 2000
_TAGS = [
    *("NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData"),
]
_TYPES = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32)


def read_pixels(slices: Sequence[Slice]) -> np.ndarray:
    """[Z, Y, X] of the scanner's values, one file at a time so that nothing is held twice.

    The type is the smallest of integers that holds all that these bits and rescalings can give; it
    is float32 where a slope or intercept is no whole number.
    """
    places: dict[Path, dict[int, int]] = {}
    for index, item in enumerate(slices):
        places.setdefault(item.path, {})[item.frame] = index
    array = np.empty((len(slices), *slices[0].size), _value_type(slices))
    for path, indices in places.items():
        for frame, pixels in enumerate(stored_frames(path)):
            index = indices[frame]
            item = slices[index]
            if (item.slope, item.intercept) != (1, 0):
                pixels = pixels * item.slope + item.intercept
            array[index] = pixels
    return array


def stored_frames(path: Path) -> Iterator[np.ndarray]:
    """The numbers that a grey DICOM file stores, [rows, columns] of each frame in turn.

    Single bits are unpacked a frame at a time, since a segmentation has a frame for every segment
    in every slice.

    Raises:
        VolumeError: It is damaged, truncated, or compressed by a method that GDCM does not know.
    """
    import pydicom
    from pydicom.pixels import pixel_array

    with pydicom_reading(path):
        dataset = pydicom.dcmread(path, force=True, specific_tags=[*_TAGS])
        require_volume(
            "PixelData" in dataset,
            path,
            found="a truncated DICOM file (without its pixels)",
            allowed="a complete DICOM file",
            fix=EXPORT_AGAIN,
        )
        shape = int(dataset.get("NumberOfFrames") or 1), int(dataset.Rows), int(dataset.Columns)
        if not hasattr(dataset.file_meta, "TransferSyntaxUID"):  # the rules of old files
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        syntax = dataset.file_meta.TransferSyntaxUID
        bits = dataset.BitsAllocated == 1 == dataset.BitsStored
        if bits and not syntax.is_encapsulated:
            return _unpacked(path, np.frombuffer(dataset.PixelData, np.uint8), shape)
        array = (
            _decode(path, dataset, shape[0])
            if syntax.is_encapsulated and syntax != pydicom.uid.RLELossless
            else pixel_array(dataset, raw=True, correct_unused_bits=False)
        ).reshape(shape)
        return iter(array if bits else _significant_bits(path, array, dataset))


def _unpacked(path: Path, packed: np.ndarray, shape: tuple[int, int, int]) -> Iterator[np.ndarray]:
    """Frames of single bits; they follow each other without gaps, so that bytes are shared."""
    size = shape[1] * shape[2]
    require_volume(
        0 < size * shape[0] <= packed.size * 8,
        path,
        found=f"a truncated DICOM file ({packed.size} bytes for {shape[0]} frames of {size} bits)",
        allowed="a complete DICOM file",
        fix=EXPORT_AGAIN,
    )

    def frame(start: int) -> np.ndarray:
        bits = np.unpackbits(packed[start // 8 : (start + size + 7) // 8], bitorder="little")
        return bits[start % 8 :][:size].reshape(shape[1:])

    return map(frame, range(0, size * shape[0], size))


def _decode(path: Path, dataset: Dataset, frames: int) -> np.ndarray:
    """The stored values of pixels that are compressed as JPEG, JPEG-LS or JPEG 2000.

    They have no checksum: a changed bit that leaves a valid picture cannot be seen.
    """
    import SimpleITK as sitk
    from pydicom.encaps import generate_frames
    from pydicom.uid import MultiFrameGrayscaleWordSecondaryCaptureImageStorage, generate_uid

    require_volume(
        # GDCM fills the rest of some pictures that are cut off.
        all(
            frame.rstrip(b"\0").endswith(_END_OF_IMAGE)
            for frame in generate_frames(dataset.PixelData, number_of_frames=frames)
        ),
        path,
        found="a damaged or truncated DICOM file (compressed pixels without their end)",
        allowed="a complete DICOM file",
        fix=EXPORT_AGAIN,
    )
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.SOPClassUID = MultiFrameGrayscaleWordSecondaryCaptureImageStorage
    dataset.SOPInstanceUID = generate_uid()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    with tempfile.TemporaryDirectory(prefix="fastproto-") as folder:
        copy = Path(folder) / "slice.dcm"
        dataset.save_as(copy, enforce_file_format=True)
        with reading(path, fix=EXPORT_AGAIN), _overheard() as said:
            image = sitk.ReadImage(str(copy), imageIO="GDCMImageIO")
        if not said:
            return sitk.GetArrayFromImage(image)
        # Other threads write there too; what is wrong with the pixels is said each time.
        with reading(path, fix=EXPORT_AGAIN), _overheard() as again:
            sitk.ReadImage(str(copy), imageIO="GDCMImageIO")
    damage = [line for line in said if line in again and line.strip()]
    require_volume(
        not damage,
        path,
        found=lambda: f"damaged compressed pixels ({damage[-1].strip()})",
        allowed="a complete DICOM file",
        fix=EXPORT_AGAIN,
    )
    if sys.stderr is not None:
        sys.stderr.write("".join(said + again))
    return sitk.GetArrayFromImage(image)


@contextlib.contextmanager
def _overheard() -> Iterator[list[str]]:
    """Collect what is written to file descriptor 2 meanwhile, line by line, without addresses.

    ITK and GDCM complain there about what they then make up, and no switch of SimpleITK tells.
    """
    lines: list[str] = []
    with tempfile.TemporaryFile() as heard:
        try:
            saved = os.dup(2)
        except OSError:  # the process has no stderr
            yield lines
            return
        try:
            os.dup2(heard.fileno(), 2)
            yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            heard.seek(0)
            text = heard.read().decode(errors="replace")
            lines += re.sub(r"0x[0-9a-f]{6,}", "0x", text).splitlines(keepends=True)


def _significant_bits(path: Path, array: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Without what the unused bits of every word hold (old overlays), and with the right sign."""
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    high = int(dataset.HighBit)
    require_volume(
        allocated in (8, 16, 32) and 0 < stored <= high + 1 <= allocated,
        path,
        found=f"{stored} bits up to bit {high} in words of {allocated}",
        allowed="words of 8, 16 or 32 bits",
        fix=EXPORT_AGAIN,
    )
    signed = "i" if dataset.get("PixelRepresentation") else "u"
    array = array.astype(f"{signed}{allocated // 8}", copy=False)
    if stored < allocated:
        array = (array << (allocated - 1 - high)) >> (allocated - stored)
    return array


def _value_type(slices: Sequence[Slice]) -> np.dtype:
    low, high = np.inf, -np.inf
    for item in slices:
        require_volume(
            np.isfinite([item.slope, item.intercept]).all() and item.slope,
            item.path,
            found=f"RescaleSlope {item.slope:g} and RescaleIntercept {item.intercept:g}",
            allowed="finite numbers, and a slope that is not 0",
            fix=EXPORT_AGAIN,
        )
        if not (item.slope.is_integer() and item.intercept.is_integer()):
            return np.dtype(np.float32)
        ends = [limit * item.slope + item.intercept for limit in item.limits]
        low, high = min(low, *ends), max(high, *ends)
    fitting = (t for t in _TYPES if np.iinfo(t).min <= low and high <= np.iinfo(t).max)
    return np.dtype(next(fitting, np.float32))
