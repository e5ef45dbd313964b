# SPDX-License-Identifier: Apache-2.0
"""DICOM series of single slices: elements with edge values, damaged files; and pydicom."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    MRImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)

from support.fuzz.judge import LPS_TO_RAS, Reading, Unreadable, Unverified
from support.fuzz.mutate import STRUCTURED, Case, Rng, damage, grid, pick, rounds, voxels

_SYNTAXES = (
    ExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    RLELossless,
)
_UID = "1.2.826.0.1.3680043.8.498."
_DECIMALS: tuple[Any, ...] = (
    0,
    1,
    -1,
    0.5,
    2,
    1000,
    -1024,
    1e-4,
    1e30,
    "",
    "abc",
    "1,5",
    " 7 ",
    "nan",
    "1\\2",
)
_WORDS: tuple[Any, ...] = (0, 1, 2, 3, 7, 8, 12, 15, 16, 32, 64, 255, 65535)
# Keyword: edge values.
ELEMENTS: dict[str, tuple[Any, ...]] = {
    "Rows": _WORDS,
    "Columns": _WORDS,
    "BitsAllocated": _WORDS,
    "BitsStored": _WORDS,
    "HighBit": _WORDS,
    "PixelRepresentation": (0, 1, 2),
    "SamplesPerPixel": (0, 1, 3, 4),
    "PlanarConfiguration": (0, 1),
    "PhotometricInterpretation": (
        "MONOCHROME1",
        "MONOCHROME2",
        "RGB",
        "PALETTE COLOR",
        "YBR_FULL",
        "",
    ),
    "NumberOfFrames": ("1", "0", "2", "5", "-1", "x"),
    "RescaleSlope": _DECIMALS,
    "RescaleIntercept": _DECIMALS,
    "RescaleType": ("HU", "US", ""),
    "WindowCenter": _DECIMALS,
    "WindowWidth": _DECIMALS,
    "PixelPaddingValue": (0, 100),
    "SmallestImagePixelValue": (0, 100),
    "ImagePositionPatient": ("", "1\\2", "1\\2\\3\\4", "a\\b\\c"),
    "ImageOrientationPatient": (
        "",
        "1\\0\\0",
        "1\\0\\0\\0\\1\\0",
        "0\\0\\0\\0\\0\\0",
        "1\\0\\0\\1\\0\\0",
    ),
    "PixelSpacing": ("", "1", "1\\2\\3", "0\\0", "-1\\1", "0.5\\0.7"),
    "ImagerPixelSpacing": ("0.2\\0.2",),
    "PixelAspectRatio": ("1\\2",),
    "SliceThickness": _DECIMALS,
    "SpacingBetweenSlices": _DECIMALS,
    "SliceLocation": _DECIMALS,
    "InstanceNumber": ("0", "1", "-5", "", "x"),
    "SeriesInstanceUID": (_UID + "9", "", "no uid"),
    "FrameOfReferenceUID": (_UID + "8", ""),
    "SOPInstanceUID": (_UID + "7", ""),
    "AcquisitionNumber": ("1", "2"),
    "TemporalPositionIdentifier": ("1", "2"),
    "GantryDetectorTilt": ("0", "10", "-30"),
    "PatientPosition": ("HFS", "FFP", ""),
    "Modality": ("CT", "MR", "PT", "OT", "SEG", ""),
    "ImageType": ("ORIGINAL\\PRIMARY\\AXIAL", "ORIGINAL\\PRIMARY\\LOCALIZER", "DERIVED\\SECONDARY"),
    "BurnedInAnnotation": ("YES",),
    "SpecificCharacterSet": ("ISO_IR 192", "ISO_IR 100", "nonsense"),
    "PatientName": ("Ünlü^Ä", "", "x" * 100),
    "SegmentationType": ("BINARY", "FRACTIONAL", "LABELMAP", ""),
    "MaximumFractionalValue": _WORDS,
    "ReferencedSegmentNumber": _WORDS,
    "SegmentNumber": _WORDS,
    "SegmentLabel": ("", "Liver", " liver\t", "Ünlü"),
}
_NOT_NUMBERS = ("RGB", "PALETTE COLOR", "YBR_FULL")
_NUDGED = (
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "RescaleSlope",
    "RescaleIntercept",
)


def series(rng: Rng) -> Case:
    """A folder with one series, of which one file or all are damaged."""
    slices = _slices(rng)
    done: list[str] = []
    files: dict[str, bytes] = {}
    times = rounds(rng)
    structured = [rng.random() < STRUCTURED for _ in range(times)]
    for _ in range(sum(structured)):
        chosen = slices if rng.random() < 0.5 else [pick(rng, slices)]
        done.append(_edit(rng, slices, chosen))
    order = rng.permutation(len(slices))
    for number, place in enumerate(order):
        buffer = io.BytesIO()
        try:
            with pydicom.config.disable_value_validation():
                slices[place].save_as(buffer, enforce_file_format=True)
        except Exception as error:  # pydicom writes no such file: try without the change
            done.append(f"not written: {type(error).__name__}")
            continue
        files[f"IM{number:04d}"] = buffer.getvalue()
    for _ in range(times - sum(structured)):
        name = pick(rng, tuple(files) or ("IM0000",))
        files[name], text = damage(rng, files.get(name, b""))
        done.append(f"{name}: {text}")
    if times == 0 and rng.random() < 0.5:
        files["notes.txt"] = b"not a slice"
    return Case(files, "", done)


def _slices(rng: Rng) -> list[FileDataset]:
    array = voxels(rng, ("u2", "i2", "u2", "i2", "u1"))
    affine, axes, spacing = placed(rng)
    bits = 8 * array.dtype.itemsize
    syntax, storage = pick(rng, _SYNTAXES), pick(rng, (CTImageStorage, MRImageStorage))
    rescale = pick(rng, ((1, 0), (1, -1024), (0.25, 3.5), (2, 7), None))
    photometric = "MONOCHROME1" if rng.random() < 0.1 else "MONOCHROME2"
    slices, packed = [], syntax == RLELossless
    for k in range(array.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = storage
        meta.MediaStorageSOPInstanceUID = UID(f"{_UID}3.{k + 1}")
        meta.TransferSyntaxUID = UID(ExplicitVRLittleEndian if packed else syntax)
        d = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        d.SOPClassUID, d.SOPInstanceUID = storage, meta.MediaStorageSOPInstanceUID
        d.Modality = "CT" if storage == CTImageStorage else "MR"
        d.PatientName, d.PatientID, d.StudyInstanceUID = "Fuzz", "F", _UID + "1"
        d.SeriesInstanceUID, d.FrameOfReferenceUID = _UID + "2", _UID + "4"
        d.InstanceNumber, d.Columns, d.Rows = k + 1, array.shape[0], array.shape[1]
        d.PixelSpacing, d.SliceThickness = decimals(spacing[[1, 0]]), decimals(spacing)[2]
        d.ImagePositionPatient = decimals(affine[:3, 3] + k * affine[:3, 2])
        d.ImageOrientationPatient = decimals(axes[:, :2].T, 9)
        d.SamplesPerPixel, d.PhotometricInterpretation = 1, photometric
        d.BitsAllocated, d.BitsStored, d.HighBit = bits, bits, bits - 1
        d.PixelRepresentation = int(array.dtype.kind == "i")
        if rescale is not None:
            d.RescaleSlope, d.RescaleIntercept = rescale
        big = syntax == ExplicitVRBigEndian
        plane = array[:, :, k].T.astype(array.dtype.newbyteorder(">" if big else "<"))
        data = plane.tobytes()
        d.PixelData = data + b"\0" * (len(data) % 2)
        d["PixelData"].VR = "OW" if bits > 8 else "OB"
        if packed:
            d.compress(RLELossless, generate_instance_uid=False)
        slices.append(d)
    return slices


def placed(rng: Rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A grid in LPS whose slices follow the normal: affine [4, 4], unit axes [3, 3], spacing."""
    affine = LPS_TO_RAS @ grid(rng)
    if np.linalg.det(affine) < 0:  # the normal is the cross product of row and column
        affine[:, 2] *= -1
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return affine, affine[:3, :3] / spacing, spacing


def decimals(values: np.ndarray, digits: int = 6) -> list[float]:
    """Numbers as a decimal string (DS) holds them."""
    return [float(f"{value:.{digits}f}") for value in values.ravel()]


def _edit(rng: Rng, slices: list[FileDataset], chosen: Sequence[Dataset]) -> str:
    """One change to the elements of the chosen files, or to which files there are."""
    kind = pick(rng, ("element",) * 6 + ("syntax", "files", "bits", "class"))
    whom = "all" if len(chosen) > 1 else "one"
    if kind == "element":
        return f"{edit_element(rng, chosen, tuple(ELEMENTS))} of {whom}"
    if kind == "syntax":
        others = (DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, "1.2.3")
        syntax = pick(rng, (*_SYNTAXES, *others))
        for item in chosen:
            item.file_meta.TransferSyntaxUID = UID(syntax)
        return f"transfer syntax of {whom} = {syntax}"
    if kind == "files":
        return _files(rng, slices)
    if kind == "class":
        storage = pick(rng, (SecondaryCaptureImageStorage, MRImageStorage, SegmentationStorage))
        for item in chosen:
            item.SOPClassUID = item.file_meta.MediaStorageSOPClassUID = storage
        return f"class of {whom} = {storage}"
    stored = int(rng.integers(7, 16))
    for item in chosen:
        item.BitsStored, item.HighBit = stored, stored - 1
    return f"{stored} bits stored of {whom}"


def edit_element(rng: Rng, chosen: Sequence[Dataset], names: Sequence[str]) -> str:
    """Set, delete or nudge one of the elements ``names`` in all the chosen data sets."""
    kind = pick(rng, ("set", "set", "set", "delete", "nudge", "nudge"))
    nudged = [name for name in names if name in _NUDGED]
    name = pick(rng, nudged if kind == "nudge" and nudged else names)
    if kind == "set" or (kind == "nudge" and not nudged):
        value = pick(rng, ELEMENTS[name])
        with pydicom.config.disable_value_validation():
            for item in chosen:
                _set(item, name, value)
        return f"{name} = {value!r}"
    if kind == "delete":
        for item in chosen:
            if name in item:
                del item[name]
        return f"{name} deleted"
    size = pick(rng, (1e-6, 1e-4, 1e-3, 1e-2, 0.1, 1, -2))
    for item in chosen:
        try:
            values = np.atleast_1d(item[name].value).astype(float)
        except (KeyError, ValueError):  # deleted or no number since an earlier round
            continue
        if values.size:
            values[int(rng.integers(values.size))] += size
            _set(item, name, "\\".join(f"{x:.10g}"[:16] for x in values))
    return f"{name} + {size}"


def _set(item: Dataset, name: str, value: Any) -> None:
    vr = pydicom.datadict.dictionary_VR(pydicom.datadict.tag_for_keyword(name) or 0)
    vr = "US" if vr == "US or SS" else vr
    if vr in ("DS", "IS"):  # as bytes: no reader's rule about numbers stands in the way
        item[name] = pydicom.dataelem.RawDataElement(
            pydicom.tag.Tag(name), vr, len(str(value)), str(value).encode(), 0, False, True
        )
    else:
        item.add_new(name, vr, value)


def _files(rng: Rng, slices: list[FileDataset]) -> str:
    kind = pick(rng, ("drop", "repeat", "reverse", "numbers", "second", "one"))
    place = int(rng.integers(len(slices)))
    if kind == "drop" and len(slices) > 1:
        del slices[place]
    elif kind == "repeat":
        slices.append(slices[place])
    elif kind == "reverse":
        places = [item.get("ImagePositionPatient") for item in slices]
        for item, position in zip(slices, reversed(places), strict=True):
            item.ImagePositionPatient = position
    elif kind == "numbers":
        for item, number in zip(slices, rng.permutation(len(slices)), strict=True):
            item.InstanceNumber = int(number)
    elif kind == "second":
        for item in slices[place:]:
            item.SeriesInstanceUID = _UID + "5"
    else:
        del slices[1:]
    return f"files: {kind}"


def read(path: Path) -> Reading:
    """Pydicom's pixels and numbers, sorted and stacked by position."""
    items, assumed = [], []
    for file in sorted(path.iterdir()):
        try:
            item = pydicom.dcmread(file)
        except pydicom.errors.InvalidDicomError:
            continue
        classes = item.file_meta.get("MediaStorageSOPClassUID"), item.get("SOPClassUID")
        if SegmentationStorage in classes:
            continue
        colours = item.get("PhotometricInterpretation") in _NOT_NUMBERS
        damaged = "Rows" not in item or "PixelData" not in item
        if item.get("SamplesPerPixel", 1) != 1 or colours or damaged:
            assumed.append(f"{file.name}: no slice, by its header")
        else:
            items.append(item)
    series = Counter(str(item.get("SeriesInstanceUID")) for item in items)
    for item in [item for item in items if "ImagePositionPatient" not in item]:
        if str(item.get("SeriesInstanceUID")) != series.most_common(1)[0][0]:
            assumed.append("an image of another series, without a place")
            items.remove(item)
    if len({str(item.get("SeriesInstanceUID")) for item in items}) != 1:
        raise Unreadable("not one series")
    row, column, normal = axes_of(numbers(items[0], "ImageOrientationPatient", 6))
    places = np.array([numbers(item, "ImagePositionPatient", 3) for item in items])
    order = np.argsort(places @ normal, kind="stable")
    items, places = [items[i] for i in order], places[order]
    planes, intercepts = [], [0.0]
    for item in items:
        if int(item.get("NumberOfFrames") or 1) != 1:
            raise Unreadable("no single slices")
        slope, intercept = rescaling(item)
        pixels = stored(item)
        if (slope, intercept) != (1, 0):
            pixels = pixels * slope + intercept
        intercepts.append(abs(intercept))
        if pixels.ndim != 2:
            raise Unreadable("no single slices")
        planes.append(pixels.T)
    spacing = numbers(items[0], "PixelSpacing", 2)
    affine = stacked(places, (row, column, normal), spacing, items[0].get("SliceThickness"))
    return Reading(np.stack(planes, axis=2), affine, max(intercepts), assumed)


def rescaling(item: Dataset) -> tuple[float, float]:
    """Slope and intercept; an empty element is an absent one, where both are."""
    values = item.get("RescaleSlope"), item.get("RescaleIntercept")
    return (1.0, 0.0) if values == (None, None) else (float(values[0]), float(values[1]))


def stored(item: Dataset) -> np.ndarray:
    """Pydicom's pixels [.., rows, columns], whatever the file says of how to display them."""
    item.SamplesPerPixel = 1
    if "TransferSyntaxUID" not in item.file_meta:  # what pydicom has found the elements to be
        implicit = item.original_encoding == (True, True)
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        item.file_meta.TransferSyntaxUID = syntax
    item.PhotometricInterpretation = "MONOCHROME2"
    pixels = item.pixel_array
    if item.get("HighBit", item.BitsStored - 1) != item.BitsStored - 1:
        raise Unverified("bits at another place, which pydicom does not look at")
    return pixels


def axes_of(orientation: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where columns and rows of pixels grow, at right angles, and the normal."""
    row, column = np.array(orientation).reshape(2, 3)
    row = row / np.linalg.norm(row)
    column = column - (column @ row) * row
    column = column / np.linalg.norm(column)
    return row, column, np.cross(row, column)


def stacked(
    places: np.ndarray,
    axes: tuple[np.ndarray, np.ndarray, np.ndarray],
    spacing: Sequence[float],
    thickness: Any,
) -> np.ndarray:
    """The affine, in RAS, of slices that lie at the sorted ``places``."""
    row, column, normal = axes
    y, x = spacing
    steps = np.diff(places @ normal)
    step = float(steps.mean()) if len(places) > 1 else float(thickness)
    if len(places) > 1 and (steps.min() <= 0 or np.ptp(steps) > 0.2 * step):
        raise Unreadable("unequal steps")
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row * x, column * y, normal * step], axis=1)
    affine[:3, 3] = places[0]
    return LPS_TO_RAS @ affine


def numbers(item: Dataset, name: str, count: int) -> list[float]:
    value = item.get(name)
    found = [float(number) for number in (value if value is not None else ())]
    if len(found) != count:
        raise Unreadable(f"{name}: {value}")
    return found
