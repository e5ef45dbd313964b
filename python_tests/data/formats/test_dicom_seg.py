# SPDX-License-Identifier: Apache-2.0
"""DICOM segmentations become label maps on the grid of their scan."""

from __future__ import annotations

import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.dicom import compress, enhanced, refuse, save, segmentation, write_slices

from fastproto.data import Volume, check_same_grid, read_label, read_volume
from fastproto.data.dataset import labels_of
from fastproto.data.formats.dicom_pixels import stored_frames
from fastproto.data.formats.dicom_seg import segment_names
from fastproto.errors import (
    FastprotoError,
    FastprotoWarning,
    GeometryError,
    LabelError,
    VolumeError,
)

STACK = np.random.default_rng(0).integers(-1000, 2000, (6, 64, 72)).astype("i2")
NAMES = {2: "Liver", 3: "Tumour"}


@pytest.fixture
def scan(tmp_path: Path) -> Volume:
    """Positions (-20.5, 30.25, 2.5 z), pixels of 0.7 x 0.9 mm."""
    return read_volume(write_slices(tmp_path / "ct", STACK, [2.5 * z for z in range(6)]))


@pytest.fixture
def truth() -> np.ndarray:
    """Liver in slices 1 to 3, tumour in 3 and 4; odd boxes so that bits straddle bytes."""
    labels = np.zeros((6, 64, 72), np.uint8)
    labels[1:4, 5:16, 9:30] = 2
    labels[3:5, 20:27, 31:38] = 3
    return labels


def place(z: int) -> tuple[float, float, float]:
    return -20.5, 30.25, 2.5 * z


def frames(truth: np.ndarray) -> list[tuple[int, Any, np.ndarray]]:
    """One for each segment and slice where it is drawn, from above."""
    drawn = [(value, z) for value in NAMES for z in range(6)[::-1] if (truth[z] == value).any()]
    return [(value, place(z), (truth[z] == value).astype("u1")) for value, z in drawn]


def test_binary(tmp_path: Path, scan: Volume, truth: np.ndarray):
    path = save(segmentation(frames(truth), NAMES), tmp_path / "seg.dcm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        label = read_label(path, like=scan)
    np.testing.assert_array_equal(label.array, truth)
    assert label.array.dtype == np.uint8
    assert label.path == path
    check_same_grid(scan, label)
    assert segment_names(path) == NAMES


def test_a_folder_with_the_segmentation(
    tmp_path: Path, scan: Volume, truth: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "seg").mkdir()
    (tmp_path / "seg" / "notes").touch()
    refuse(monkeypatch, "notes")
    save(segmentation(frames(truth), NAMES), tmp_path / "seg" / "1-1")
    np.testing.assert_array_equal(read_label(tmp_path / "seg", like=scan).array, truth)


def test_a_multi_frame_scan(tmp_path: Path, truth: np.ndarray):
    image = save(enhanced(STACK, [place(z) for z in range(6)]), tmp_path / "scan.dcm")
    path = save(segmentation(frames(truth), NAMES), tmp_path / "seg.dcm")
    np.testing.assert_array_equal(read_label(path, like=read_volume(image)).array, truth)


def test_labelmap(tmp_path: Path, scan: Volume, truth: np.ndarray):
    maps = [(0, place(z), truth[z]) for z in (1, 2, 3, 4)]
    path = save(segmentation(maps, NAMES, "LABELMAP"), tmp_path / "seg.dcm")
    np.testing.assert_array_equal(read_label(path, like=scan).array, truth)
    assert segment_names(path) == NAMES
    described = {0: "Background", **NAMES}  # as highdicom writes it
    save(segmentation(maps, described, "LABELMAP"), path)
    np.testing.assert_array_equal(read_label(path, like=scan).array, truth)
    assert segment_names(path) == NAMES


@pytest.mark.parametrize("method", [None, "rle", "jpeg", "j2k"])
def test_fractional(tmp_path: Path, scan: Volume, truth: np.ndarray, method: str | None):
    """Whole fractions count in silence; of others, a half and more, with a word."""
    folder = tmp_path / "seg"
    folder.mkdir()
    drawn = [(value, position, pixels * np.uint8(200)) for value, position, pixels in frames(truth)]
    whole = segmentation(drawn, NAMES, "FRACTIONAL", MaximumFractionalValue=200)
    path = save(whole, folder / "seg.dcm")
    if method:
        compress(folder, method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_label(path, like=scan).array, truth)
    for _, _, pixels in drawn:
        pixels[pixels == 200] = 100
        pixels[0] = 99
    save(segmentation(drawn, NAMES, "FRACTIONAL", MaximumFractionalValue=200), path)
    with pytest.warns(FastprotoWarning, match="half of a voxel or more counts"):
        np.testing.assert_array_equal(read_label(path, like=scan).array, truth)


def test_other_axes_and_a_part_of_the_slices(tmp_path: Path, scan: Volume, truth: np.ndarray):
    """Rows from the back, columns from the left, and only rows 3 to 40."""
    turned = [
        (value, (-20.5 + 0.7 * 71, 30.25 + 0.9 * 40, z), pixels[40:2:-1, ::-1])
        for value, (_, _, z), pixels in frames(truth)
    ]
    dataset = segmentation(turned, NAMES, axes=(-1, 0, 0, 0, -1, 0))
    path = save(dataset, tmp_path / "seg.dcm")
    np.testing.assert_array_equal(read_label(path, like=scan).array, truth)


def test_sagittal_frames(tmp_path: Path, scan: Volume, truth: np.ndarray):
    """Columns towards the back, rows upwards."""
    sides = [(2, (-20.5 + 0.7 * x, 30.25, 0), (truth[:, :, x] == 2)) for x in range(72)]
    sides = [(value, position, pixels.astype("u1")) for value, position, pixels in sides]
    dataset = segmentation(sides, NAMES, axes=(0, 1, 0, 0, 0, 1), spacing=(2.5, 0.9))
    path = save(dataset, tmp_path / "seg.dcm")
    np.testing.assert_array_equal(read_label(path, like=scan).array, np.where(truth == 2, 2, 0))


@pytest.mark.parametrize(("shift", "spacing"), [
    ((0, 0, 1.2), (0.9, 0.7)), ((0.2, 0, 0), (0.9, 0.7)), ((0, 0, 50), (0.9, 0.7)),
    ((0, 0, 0), (0.9, 0.75)), ((0, 0, 0), (0.9, 0)),
    ((float("nan"), 0, 0), (0.9, 0.7)),
])  # fmt: skip
def test_frames_off_the_grid(
    tmp_path: Path, scan: Volume, truth: np.ndarray, shift: tuple, spacing: tuple
):
    moved = [
        (value, [a + b if b == b else None for a, b in zip(position, shift, strict=True)], pixels)
        for value, position, pixels in frames(truth)
    ]
    moved = [
        (value, [p for p in position if p is not None], pixels) for value, position, pixels in moved
    ]
    path = save(segmentation(moved, NAMES, spacing=spacing), tmp_path / "seg.dcm")
    with pytest.raises(
        GeometryError, match=r"frame 1: found pixels that are no voxels of the scan"
    ):
        read_label(path, like=scan)


def test_overlapping_segments(tmp_path: Path, scan: Volume, truth: np.ndarray):
    both = frames(truth)
    both[-1][2][5, 9] = 1
    both[-1] = (3, place(1), both[-1][2])
    path = save(segmentation(both, NAMES), tmp_path / "seg.dcm")
    with pytest.raises(LabelError, match="1 pixels of both segment 2 and segment 3"):
        read_label(path, like=scan)


def test_names_that_occur_twice_or_not_at_all(tmp_path: Path, truth: np.ndarray):
    names = {2: "Lesion", 3: "lesion", 4: "Left\nkidney", 5: None}
    path = save(segmentation(frames(truth), names), tmp_path / "seg.dcm")
    known = {2: "Lesion 2", 3: "lesion 3", 4: "Left kidney", 5: "segment 5"}
    assert segment_names(path) == known


def test_refused(tmp_path: Path, scan: Volume, truth: np.ndarray):
    path = save(segmentation(frames(truth), NAMES), tmp_path / "seg.dcm")
    with pytest.raises(VolumeError, match="together with the scan that it annotates"):
        read_label(path)
    with pytest.raises(VolumeError, match=r"objects without images \(Segmentation Storage\)"):
        read_volume(path)
    whole = path.read_bytes()
    for cut in (1, 500, 3000):
        path.write_bytes(whole[:-cut])
        with pytest.raises(VolumeError, match="truncated"):
            read_label(path, like=scan)


@pytest.mark.parametrize("kind", ["BINARX", "", None])
def test_an_unknown_type_is_not_taken_for_a_binary_one(
    tmp_path: Path, scan: Volume, truth: np.ndarray, kind: str | None
):
    dataset = segmentation(frames(truth), NAMES, SegmentationType=kind)
    with pytest.raises(VolumeError, match="allowed: BINARY, LABELMAP, FRACTIONAL"):
        read_label(save(dataset, tmp_path / "seg.dcm"), like=scan)


@pytest.mark.parametrize(("change", "words"), [
    ({}, r"frame \d+: found segment 3, which nothing describes; allowed: .*: 2, 9"),
    ({"SegmentSequence": None}, "segments numbered none at all; .*different numbers above 0"),
    ({"SegmentationType": "FRACTIONAL"}, "SegmentationType FRACTIONAL without a maximum"),
])  # fmt: skip
def test_what_nothing_describes(
    tmp_path: Path, scan: Volume, truth: np.ndarray, change: dict, words: str
):
    """Numbers of segments without a name, or a scale without its end, may be damage."""
    drawn = [(3 if value == max(NAMES) else value, *rest) for value, *rest in frames(truth)]
    dataset = segmentation(drawn, {2: "liver", 9: "dot"}, **change)
    with pytest.raises(VolumeError, match=words):
        read_label(save(dataset, tmp_path / "seg.dcm"), like=scan)


def test_segments_of_one_number(tmp_path: Path, scan: Volume, truth: np.ndarray):
    dataset = segmentation(frames(truth), NAMES)
    dataset.SegmentSequence[1].SegmentNumber = dataset.SegmentSequence[0].SegmentNumber
    with pytest.raises(VolumeError, match=r"segments numbered (\d+), \1"):
        read_label(save(dataset, tmp_path / "seg.dcm"), like=scan)


@pytest.mark.parametrize(("kind", "stored", "most"), [
    ("BINARY", "FRACTIONAL", 1), ("FRACTIONAL", "FRACTIONAL", 6), ("LABELMAP", "LABELMAP", 65535),
])  # fmt: skip
def test_values_that_a_type_does_not_have(
    tmp_path: Path, scan: Volume, truth: np.ndarray, kind: str, stored: str, most: int
):
    drawn = [(value, at, pixels.astype("i4") * 7) for value, at, pixels in frames(truth)]
    if kind == "LABELMAP":
        drawn = [(value, at, pixels * 10000) for value, at, pixels in drawn]
    dataset = segmentation(drawn, NAMES, stored, MaximumFractionalValue=6)
    dataset.SegmentationType = kind
    with pytest.raises(VolumeError, match=rf"found values 0 to 70*; allowed: 0 to {most} "):
        read_label(save(dataset, tmp_path / "seg.dcm"), like=scan)


def test_frames_are_unpacked_one_at_a_time(tmp_path: Path):
    """Of a size that is no multiple of 8, so that frames share bytes."""
    stored = np.random.default_rng(0).integers(0, 2, (64, 511, 257)).astype("u1")
    drawn = [(2, (0, 0, z), pixels) for z, pixels in enumerate(stored)]
    path = save(segmentation(drawn, NAMES), tmp_path / "seg.dcm")
    tracemalloc.start()
    for pixels, expected in zip(stored_frames(path), stored, strict=True):
        np.testing.assert_array_equal(pixels, expected)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 4 * path.stat().st_size < stored.nbytes


def test_damaged_files(tmp_path: Path, scan: Volume, truth: np.ndarray):
    """Value representations, lengths and values: whatever breaks is an error of ours."""
    path = save(segmentation(frames(truth), NAMES), tmp_path / "seg.dcm")
    whole = path.read_bytes()
    header = whole.index(b"\xe0\x7f\x10\x00")
    representations = [
        at for at in range(132, header) if whole[at : at + 2] in (b"CS", b"UI", b"US", b"IS", b"SQ")
    ]
    random = np.random.default_rng(0)
    refused = 0
    for number in range(len(representations) + 150):
        mutated = bytearray(whole)
        if number < len(representations):
            at = representations[number]
            mutated[at : at + 2] = (b"FD", b"UL", b"XX")[number % 3]
        else:
            for at in random.integers(132, header, 3):
                mutated[at] = random.integers(256)
        path.write_bytes(mutated)
        for read in (lambda: labels_of(path), lambda: read_label(path, like=scan)):
            try:
                read()
            except FastprotoError:
                refused += 1
    assert refused > 50
