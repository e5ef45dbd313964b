# SPDX-License-Identifier: Apache-2.0
"""Segmentations of 3D Slicer (.seg.nrrd): written with names, colours and terms, and read again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import nrrd
import numpy as np
import pytest

from fastproto.data import Volume, check_same_grid, read_label, read_volume, write_label
from fastproto.data.anatomy import organ
from fastproto.data.dataset import labels_of
from fastproto.data.formats.nrrd import segment_names
from fastproto.errors import ArgumentError, GeometryError, LabelError, OutputError, VolumeError

NAMES = {7: "kidney_left", 2: "Liver", 300: "Größe \\n"}


@pytest.fixture
def scan() -> Volume:
    turned = (0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    return Volume(np.zeros((5, 6, 7)), (0.7, 0.9, 2.5), (-20.5, 30.25, 4.0), turned)


@pytest.fixture
def labels() -> np.ndarray:
    array = np.zeros((5, 6, 7), np.int32)
    array[1:3, 2:4, 1:6], array[3, 1:3, 2:6], array[0, 0, 0] = 2, 7, 300
    return array


def test_an_independent_reader_finds_voxels_names_and_colours(
    tmp_path: Path, scan: Volume, labels: np.ndarray
):
    path = tmp_path / "ct.seg.nrrd"
    write_label(path, labels, scan, NAMES)
    assert [entry.name for entry in tmp_path.iterdir()] == ["ct.seg.nrrd"]
    array, header = nrrd.read(str(path), index_order="C")
    np.testing.assert_array_equal(array, labels)
    assert array.dtype == np.uint16
    np.testing.assert_allclose(header["space origin"], scan.origin)
    assert header["space"] == "left-posterior-superior"
    assert header["Segmentation_MasterRepresentation"] == "Binary labelmap"
    assert header["Segmentation_ContainedRepresentationNames"] == "Binary labelmap|"
    assert header["Segmentation_ReferenceImageExtentOffset"] == "0 0 0"
    assert "Segmentation_ConversionParameters" in header
    about = [
        {
            key.partition("_")[2]: text
            for key, text in header.items()
            if key.startswith(f"Segment{i}_")
        }
        for i in range(3)
    ]
    assert [each["LabelValue"] for each in about] == ["2", "7", "300"]
    assert [each["Name"] for each in about[:2]] == ["Liver", "kidney_left"]
    assert len({each["ID"] for each in about}) == 3
    for each in about:
        assert each["Layer"] == "0"
        assert each["Extent"] == "0 6 0 5 0 4"
        colour = [float(number) for number in each["Color"].split()]
        assert len(colour) == 3
        assert all(0 <= level <= 1 for level in colour)
    assert colour_of(about[0]) == organ("liver").colour
    assert colour_of(about[1]) == organ("left kidney").colour
    assert about[1]["Tags"].rstrip("|").split("~")[1:4] == [
        "SCT^123037004^Anatomical Structure", "SCT^64033007^Kidney", "SCT^7771000^Left",
    ]  # fmt: skip
    terms = about[2]["Tags"].removeprefix("TerminologyEntry:").removesuffix("|").split("~")
    assert terms[1:4] == ["SCT^85756007^Tissue", "SCT^85756007^Tissue", "^^"]
    assert len(terms) == 7
    assert f"Segment{3}_ID" not in header


def colour_of(segment: dict[str, str]) -> tuple[int, ...]:
    return tuple(round(float(number) * 255) for number in segment["Color"].split())


def test_it_is_read_again_with_its_names(tmp_path: Path, scan: Volume, labels: np.ndarray):
    path = tmp_path / "ct.seg.nrrd"
    write_label(path, labels, scan, NAMES)
    label = read_label(path)
    np.testing.assert_array_equal(label.array, labels)
    check_same_grid(scan, label)
    table = labels_of(path)
    assert table is not None
    assert table.names == {2: "Liver", 7: "kidney_left", 300: "Größe \\n"}


def test_values_without_a_name(tmp_path: Path, scan: Volume, labels: np.ndarray):
    path = tmp_path / "ct.seg.nrrd"
    write_label(path, labels, scan, {2: "liver", 5: "spleen"})
    assert segment_names(path) == {2: "liver", 5: "spleen", 7: "label 7", 300: "label 300"}
    with pytest.raises(ArgumentError, match="without any label"):
        write_label(path, np.zeros_like(labels), scan)
    write_label(path, np.zeros_like(labels), scan, {5: "spleen"})
    assert segment_names(path) == {5: "spleen"}
    assert not read_volume(path).array.any()


def test_what_is_no_label_map_is_refused(tmp_path: Path, scan: Volume, labels: np.ndarray):
    path = tmp_path / "ct.seg.nrrd"
    with pytest.raises(LabelError, match="label -1"):
        write_label(path, labels - 1, scan, NAMES)
    with pytest.raises(LabelError, match="fractional"):
        write_label(path, labels + 0.5, scan, NAMES)
    with pytest.raises(ArgumentError, match=r"found shape \(4, 6, 7\)"):
        write_label(path, labels[1:], scan, NAMES)
    with pytest.raises(ArgumentError, match=r"\.seg\.nrrd.*\.dcm"):
        write_label(tmp_path / "ct.png", labels, scan, NAMES)
    (tmp_path / "folder.seg.nrrd").mkdir()
    with pytest.raises(OutputError):
        write_label(tmp_path / "folder.seg.nrrd", labels, scan, NAMES)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.seg.nrrd"]


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_other_formats_hold_the_values_alone(
    tmp_path: Path, scan: Volume, labels: np.ndarray, ending: str
):
    path = tmp_path / f"ct{ending}"
    write_label(path, labels, scan, NAMES)
    np.testing.assert_array_equal(read_label(path).array, labels)
    assert labels_of(path) is None


def write_slicer(path: Path, labels: np.ndarray, segments: list[dict[str, str]]) -> Path:
    """As 3D Slicer writes it, by an independent writer."""
    header = {"space": "left-posterior-superior", "space directions": np.eye(3),
              "space origin": np.zeros(3), "encoding": "gzip"}  # fmt: skip
    for index, about in enumerate(segments):
        header |= {f"Segment{index}_{key}": text for key, text in about.items()}
    nrrd.write(str(path), labels, header)
    return path


def test_names_of_3d_slicer(tmp_path: Path):
    """Two of one name, one without, and an older file, which says no value."""
    labels = np.zeros((4, 4, 4), np.uint8)
    segments = [
        {"ID": "Segment_1", "Name": "Tumour", "LabelValue": "1"},
        {"ID": "a", "Name": "tumour", "LabelValue": "4"},
        {"ID": "b", "Name": "", "LabelValue": "3"},
    ]
    path = write_slicer(tmp_path / "a.seg.nrrd", labels, segments)
    assert segment_names(path) == {1: "Tumour 1", 4: "tumour 4", 3: "segment 3"}
    path = write_slicer(tmp_path / "b.seg.nrrd", labels, [{"ID": "x", "Name": "Liver"}])
    assert segment_names(path) == {1: "Liver"}


@pytest.mark.parametrize("values", [("2", "2"), ("0", "1"), ("x", "1")])
def test_segments_of_unusable_values_are_refused(tmp_path: Path, values: tuple[str, str]):
    segments = [{"ID": value, "Name": "organ", "LabelValue": value} for value in values]
    path = write_slicer(tmp_path / "a.seg.nrrd", np.zeros((4, 4, 4), np.uint8), segments)
    with pytest.raises(VolumeError, match=f"label values {', '.join(values)}"):
        segment_names(path)


def test_a_cropped_segmentation_is_put_on_the_grid_of_its_scan(
    tmp_path: Path, scan: Volume, labels: np.ndarray
):
    path = tmp_path / "a.seg.nrrd"
    axes = np.array(scan.direction).reshape(3, 3) * np.array(scan.spacing)
    origin = tuple((np.array(scan.origin) + axes @ (1, 2, 1)).tolist())
    part = dataclasses.replace(scan, array=scan.array[1:4, 2:5, 1:6], origin=origin)
    write_label(path, labels[1:4, 2:5, 1:6], part, NAMES)
    expected = np.zeros_like(labels)
    expected[1:4, 2:5, 1:6] = labels[1:4, 2:5, 1:6]
    label = read_label(path, like=scan)
    np.testing.assert_array_equal(label.array, expected)
    check_same_grid(scan, label)
    assert label.path == path
    # Between the voxels, outside, or of other voxels it stays as it is, to be refused.
    for moved in ((0.4, 0.0, 0.0), (0.0, -5.0, 0.0), (20.0, 0.0, 0.0)):
        other = dataclasses.replace(part, origin=tuple(np.add(origin, moved)))
        write_label(path, labels[1:4, 2:5, 1:6], other, NAMES)
        with pytest.raises(GeometryError):
            check_same_grid(scan, read_label(path, like=scan))
    write_label(
        path, labels[1:4, 2:5, 1:6], dataclasses.replace(part, spacing=(0.7, 0.7, 2.5)), NAMES
    )
    assert read_label(path, like=scan).array.shape == (3, 3, 5)
