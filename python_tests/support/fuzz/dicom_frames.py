# SPDX-License-Identifier: Apache-2.0
"""Multi-frame DICOM files: enhanced scans, and segmentations beside the scan they annotate."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import UID, ImplicitVRLittleEndian, RLELossless

from fastproto.data import Volume, read_label, read_volume
from fastproto.data.dataset import labels_of
from support import dicom as made
from support.fuzz import dicom
from support.fuzz.judge import LPS_TO_RAS, Reading, Unreadable
from support.fuzz.mutate import STRUCTURED, Case, Rng, damage, pick, rounds, voxels

_FILE, _SCAN = "frames.dcm", "scan.nii"
_MR = "1.2.840.10008.5.1.4.1.1.4.1"
_LABELMAPS = "1.2.840.10008.5.1.4.1.1.66.7"
_SHARED, _EACH = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
_GROUPS = (
    *("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence"),
    *("PixelValueTransformationSequence", "SegmentIdentificationSequence"),
)
_PLACES = (
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
    *("RescaleSlope", "RescaleIntercept", "ReferencedSegmentNumber"),
)
# In the data set itself; those of functional groups are changed where they stand.
_TOP = (
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "NumberOfFrames"),
    *("Modality", "SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient"),
    *("PixelSpacing", "RescaleSlope", "RescaleIntercept", "SliceThickness"),
)
_OF_SEGMENTATIONS = ("SegmentationType", "SegmentationType", "MaximumFractionalValue")


def scan(rng: Rng) -> Case:
    """An enhanced CT or MR whose frames lie in any order; groups are shared or of each frame."""
    array = voxels(rng, ("u2", "i2", "u1"))
    affine, axes, spacing = dicom.placed(rng)
    order = rng.permutation(array.shape[2])
    rescaling = pick(rng, (None, ((1, -1024),), ((0.5, 3), (2, -7))))
    parts: dict[str, list[dict[str, Any]]] = {
        "PlanePositionSequence": [
            {"ImagePositionPatient": dicom.decimals(affine[:3, 3] + k * affine[:3, 2])}
            for k in order
        ],
        "PlaneOrientationSequence": [{"ImageOrientationPatient": dicom.decimals(axes[:, :2].T, 9)}],
        "PixelMeasuresSequence": [
            {
                "PixelSpacing": dicom.decimals(spacing[[1, 0]]),
                "SliceThickness": dicom.decimals(spacing)[2],
            }
        ],
    }
    if rescaling is not None:
        parts["PixelValueTransformationSequence"] = [
            {"RescaleSlope": slope, "RescaleIntercept": intercept, "RescaleType": "US"}
            for slope, intercept in (rescaling[k % len(rescaling)] for k in range(len(order)))
        ][: len(order) if len(rescaling) > 1 else 1]
    stored = np.ascontiguousarray(array.transpose(2, 1, 0)[order])
    ct = rng.random() < 0.5
    fields = {"Modality": "CT" if ct else "MR", **made.pixels(stored)}
    dataset = made.new(made.ENHANCED_CT if ct else _MR, **fields)
    _add_groups(rng, dataset, parts, len(order))
    return _case(rng, dataset, _TOP)


def segmentation(rng: Rng) -> Case:
    """A segmentation of any type, its frames along any axis of the scan, and the scan itself."""
    array = voxels(rng, ("i2",))
    affine, _, spacing = dicom.placed(rng)
    kind = pick(rng, ("BINARY", "BINARY", "FRACTIONAL", "LABELMAP"))
    numbers = sorted(rng.choice((1, 2, 3, 4, 7, 200), size=3, replace=False).tolist())
    labels = rng.choice((0, 0, *numbers), array.shape)
    # Columns and rows of a frame grow along two axes of the scan, forward or backward.
    across, down, along = rng.permutation(3)
    turned = [axis for axis in (across, down) if rng.random() < 0.5]
    start = np.array([array.shape[axis] - 1 if axis in turned else 0 for axis in range(3)])
    seen = np.flip(labels, tuple(turned)).transpose(along, down, across)
    most = pick(rng, (1, 100, 255)) if kind == "FRACTIONAL" else 1
    frames, places, segments = [], [], []
    for k in rng.permutation(len(seen)):
        for number in rng.permutation(numbers) if kind != "LABELMAP" else (0,):
            drawn = seen[k] == number if number else seen[k]
            if not drawn.any():
                continue
            if kind == "FRACTIONAL":
                low = rng.integers(0, (most + 1) // 2, drawn.shape)
                drawn = np.where(drawn, most - low // 2, low * (rng.random() < 0.5))
            index = start.copy()
            index[along] = k
            frames.append(drawn)
            segments.append({"ReferencedSegmentNumber": int(number)})
            places.append(affine[:3, :3] @ index + affine[:3, 3])
    unit = affine[:3, :3] / spacing
    axes = [unit[:, axis] * (-1 if axis in turned else 1) for axis in (across, down)]
    parts: dict[str, list[dict[str, Any]]] = {
        "PlanePositionSequence": [
            {"ImagePositionPatient": dicom.decimals(place)} for place in places
        ],
        "PlaneOrientationSequence": [
            {"ImageOrientationPatient": dicom.decimals(np.stack(axes), 9)}
        ],
        "PixelMeasuresSequence": [
            {
                "PixelSpacing": dicom.decimals(spacing[[down, across]]),
                "SliceThickness": dicom.decimals(spacing)[along],
            }
        ],
    }
    if kind != "LABELMAP":
        parts["SegmentIdentificationSequence"] = segments
    stored = np.stack(frames).astype(pick(rng, ("u1", "u2")) if kind == "LABELMAP" else "u1")
    fields = made.pixels(stored)
    if kind == "BINARY":
        fields |= {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}
        fields["PixelData"] = pydicom.pixels.pack_bits(stored)
    if kind == "FRACTIONAL":
        fields["MaximumFractionalValue"] = most
    dataset = made.new(
        _LABELMAPS if kind == "LABELMAP" else made.SEGMENTATION,
        **{
            **fields,
            "Modality": "SEG",
            "SegmentationType": kind,
            "SegmentSequence": [_segment(number) for number in numbers],
        },
    )
    _add_groups(rng, dataset, parts, len(frames))
    case = _case(rng, dataset, (*_TOP, *_OF_SEGMENTATIONS * 2))
    image = nibabel.Nifti1Image(array, LPS_TO_RAS @ affine)
    image.set_sform(LPS_TO_RAS @ affine, 1)
    image.header.set_xyzt_units("mm")
    return Case({**case.files, _SCAN: image.to_bytes()}, _FILE, case.done)


def _segment(number: int) -> Dataset:
    item = Dataset()
    item.SegmentNumber, item.SegmentLabel = number, f"Organ {number}"
    return item


def _add_groups(
    rng: Rng, dataset: FileDataset, parts: dict[str, list[dict[str, Any]]], frames: int
) -> None:
    """Functional groups: what all frames have alike is shared, or repeated for each."""
    shared = [name for name, items in parts.items() if len(items) == 1 and rng.random() < 0.6]
    setattr(dataset, _SHARED, [made.groups(**{name: parts[name][0] for name in shared})])
    each = [
        {name: items[k % len(items)] for name, items in parts.items() if name not in shared}
        for k in range(frames)
    ]
    setattr(dataset, _EACH, [made.groups(**items) for items in each])
    dataset.NumberOfFrames = frames


def _case(rng: Rng, dataset: FileDataset, top: Sequence[str]) -> Case:
    """The file, with the damage of some rounds."""
    uid = UID("1.2.826.0.1.3680043.8.498.3.1")
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
    syntax = pick(rng, ("explicit", "explicit", "implicit", "rle"))
    if syntax == "implicit":
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    elif syntax == "rle" and dataset.BitsAllocated > 1:
        dataset.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    times, done = rounds(rng), []
    structured = sum(rng.random() < STRUCTURED for _ in range(times))
    whole = _bytes(dataset)
    for _ in range(structured):
        done.append(_edit(rng, dataset, top))
    try:
        content = _bytes(dataset)
    except Exception as error:  # pydicom writes no such file
        content = whole
        done.append(f"not written: {type(error).__name__}")
        times = structured + 1
    for _ in range(times - structured):
        content, text = damage(rng, content)
        done.append(text)
    return Case({_FILE: content}, _FILE, done)


def _bytes(dataset: FileDataset) -> bytes:
    buffer = io.BytesIO()
    with pydicom.config.disable_value_validation():
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _edit(rng: Rng, dataset: FileDataset, top: Sequence[str]) -> str:
    """One change: to the elements of the file, of its groups, or to which groups there are."""
    kind = pick(rng, ("top", "group", "group", "group", "groups", "segments"))
    if kind == "segments" and "SegmentSequence" in dataset and len(dataset.SegmentSequence):
        chosen = [pick(rng, dataset.SegmentSequence)]
        if rng.random() < 0.3:
            dataset.SegmentSequence.remove(chosen[0])
            return "a segment without description"
        return f"{dicom.edit_element(rng, chosen, ('SegmentNumber', 'SegmentLabel'))} of a segment"
    if kind == "groups":
        return _edit_groups(rng, dataset)
    inside = [*_items(dataset)]
    if kind in ("group", "segments") and inside:
        name, where, sequence = pick(rng, inside)
        words = ("one", "all") if where == _EACH else ("one",)
        whom = pick(rng, words)
        groups = dataset[where].value
        elements = [
            items[0]
            for group in (groups if whom == "all" else [pick(rng, groups)])
            if (items := group.get(sequence))
        ]
        if elements:
            return f"{dicom.edit_element(rng, elements, (name,))} of {whom} in {where}"
    return dicom.edit_element(rng, [dataset], top)


def _items(dataset: FileDataset) -> Iterator[tuple[str, str, str]]:
    """Element, and the groups and sequence in which it stands."""
    for where in (_SHARED, _EACH):
        for group in (dataset.get(where) or [])[:1]:
            for sequence in group:
                for element in sequence.value[0] if sequence.value else ():
                    yield element.keyword, where, sequence.keyword


def _edit_groups(rng: Rng, dataset: FileDataset) -> str:
    where = pick(rng, (_SHARED, _EACH, _EACH, _EACH))
    groups = dataset.get(where)
    if not groups:
        return f"no {where} to change"
    kind = pick(rng, ("drop", "repeat", "swap", "sequence", "sequences", "none"))
    place = int(rng.integers(len(groups)))
    if kind == "drop":
        del groups[place]
    elif kind == "repeat":
        groups.append(groups[place])
    elif kind == "swap":
        other = int(rng.integers(len(groups)))
        groups[place], groups[other] = groups[other], groups[place]
    elif kind == "none":
        delattr(dataset, where)
    else:
        sequences = [element.keyword for element in groups[place]]
        if not sequences:
            return f"no sequence in {where}"
        name = pick(rng, sequences)
        for group in groups if kind == "sequences" else [groups[place]]:
            if name in group:
                delattr(group, name)
        return f"{where}: {kind[:8]} {name} deleted"
    return f"{where}: {kind}"


def read_scan(path: Path) -> Reading:
    """Pydicom's frames and numbers, sorted and stacked by position."""
    dataset = pydicom.dcmread(path)
    frames = [*_frames(dataset)]
    if len(frames) < 2:
        raise Unreadable("no frames")
    first, _ = frames[0]
    row, column, normal = dicom.axes_of(dicom.numbers(first, "ImageOrientationPatient", 6))
    places = np.array([dicom.numbers(item, "ImagePositionPatient", 3) for item, _ in frames])
    for item, _ in frames:
        for name, count in (("ImageOrientationPatient", 6), ("PixelSpacing", 2)):
            mine, other = (dicom.numbers(each, name, count) for each in (item, first))
            if not np.allclose(mine, other, rtol=2e-3, atol=2e-3):
                raise Unreadable(f"frames of different {name}")
    planes, intercepts = [], []
    for item, pixels in frames:
        slope, intercept = dicom.rescaling(item)
        planes.append((pixels if (slope, intercept) == (1, 0) else pixels * slope + intercept).T)
        intercepts.append(abs(intercept))
    order = np.argsort(places @ normal, kind="stable")
    spacing = dicom.numbers(first, "PixelSpacing", 2)
    affine = dicom.stacked(places[order], (row, column, normal), spacing, None)
    return Reading(np.stack([planes[k] for k in order], axis=2), affine, max(intercepts))


def read_labels(path: Path) -> Reading:
    """Every pixel of pydicom's frames put where its position in the patient says."""
    image: Any = nibabel.load(path.parent / _SCAN)
    dataset = pydicom.dcmread(path)
    kind = dataset.SegmentationType
    numbers = [int(item.SegmentNumber) for item in dataset.SegmentSequence]
    if kind == "LABELMAP" and 0 in numbers:
        numbers.remove(0)  # the background, described
    if len(set(numbers)) < len(numbers) or min(numbers) < 1:
        raise Unreadable("segments of equal numbers, or a segment 0")
    most = int(dataset.MaximumFractionalValue) if kind == "FRACTIONAL" else 1
    labels = np.zeros(image.shape, np.uint16)
    assumed = []
    for item, pixels in _frames(dataset):
        if kind == "LABELMAP":
            drawn = pixels
        else:
            if not 0 <= pixels.min() <= pixels.max() <= most:
                raise Unreadable(f"values of a segmentation of type {kind}")
            if ((pixels > 0) & (pixels < most)).any():
                assumed.append("fractions")
            drawn = np.where(pixels >= most / 2, int(item.ReferencedSegmentNumber), 0)
        if not set(np.unique(drawn[drawn > 0]).tolist()) <= set(numbers) or (
            kind != "LABELMAP" and int(item.ReferencedSegmentNumber) not in numbers
        ):
            raise Unreadable("a segment that is not described")
        axes = np.array(dicom.numbers(item, "ImageOrientationPatient", 6)).reshape(2, 3)
        y, x = dicom.numbers(item, "PixelSpacing", 2)
        rows, columns = (index[..., None] for index in np.array(np.indices(drawn.shape)))
        place = np.array(dicom.numbers(item, "ImagePositionPatient", 3))
        place = place + columns * axes[0] * x + rows * axes[1] * y
        place = np.concatenate([place, np.ones((*drawn.shape, 1))], axis=-1)
        index = place @ (np.linalg.inv(image.affine) @ LPS_TO_RAS).T
        whole = np.rint(index).astype(int)[..., :3]
        if not np.abs(index[..., :3] - whole).max() < 0.1:
            raise Unreadable("pixels beside the voxels")
        if (whole < 0).any() or (whole >= image.shape).any():
            raise Unreadable("pixels outside the scan")
        target = tuple(whole[drawn > 0].T)
        if ((labels[target] > 0) & (labels[target] != drawn[drawn > 0])).any():
            raise Unreadable("segments that overlap")
        labels[target] = drawn[drawn > 0]
    return Reading(labels, image.affine, assumed=assumed)


def _frames(dataset: FileDataset) -> Iterator[tuple[Dataset, np.ndarray]]:
    """For each frame all elements of its groups, of the shared ones and of the file; its pixels."""
    count = int(dataset.get("NumberOfFrames") or 1)
    each = dataset.get(_EACH) or []
    if len(each) != count:
        raise Unreadable("not one group for each frame")
    if dataset.BitsAllocated == 1:
        dataset.PixelRepresentation = 0  # a single bit has no sign
    pixels = dicom.stored(dataset)
    for group, plane in zip(each, pixels.reshape(count, *pixels.shape[-2:]), strict=True):
        elements = Dataset()
        for source in (dataset, *(dataset.get(_SHARED) or [])[:1], group):
            inner = [(source.get(name) or [Dataset()])[0] for name in _GROUPS]
            for item in (source, *inner) if source is dataset else inner:
                for name in _PLACES:
                    if name in item:
                        elements[item[name].tag] = item[name]
        yield elements, plane


def read_as_learn(path: Path) -> Volume:
    """What `fastproto learn` takes from a segmentation: labels on the scan's grid, all named."""
    label = read_label(path, like=read_volume(path.parent / _SCAN))
    names = labels_of(path)
    assert names is not None
    assert set(np.unique(label.array).tolist()) - {0} <= set(names.names), names
    return label
