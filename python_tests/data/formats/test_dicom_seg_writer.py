# SPDX-License-Identifier: Apache-2.0
"""Label maps as DICOM segmentations of their scans, read again by pydicom and by us."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from support.dicom import ENHANCED_CT, enhanced, save, write_slices

from fastproto import __version__
from fastproto.data import Volume, read_label, read_volume, write_label
from fastproto.data.dataset import labels_of
from fastproto.data.formats.dicom_seg import segment_names
from fastproto.data.volume import check_label_output
from fastproto.errors import ArgumentError, VolumeError

pytest.importorskip("highdicom")

STACK = np.random.default_rng(0).integers(-1000, 2000, (6, 21, 19)).astype("i2")
HEIGHTS = [20.0, 12.5, 15.0, 17.5, 10.0, 22.5]  # of the files, in no order
PATIENT = {
    "PatientName": "Müller^Anna", "PatientID": "p7", "PatientBirthDate": "19700102",
    "PatientSex": "F", "AccessionNumber": "a9", "StudyID": "s1", "StudyDate": "20240305",
    "StudyTime": "101112", "StudyDescription": "abdomen", "SpecificCharacterSet": "ISO_IR 192",
    "FrameOfReferenceUID": "1.2.77", "SeriesNumber": 4,
}  # fmt: skip
NAMES = {3: "kidney_left", 5: "Liver", 9: "a thing"}


@pytest.fixture
def labels() -> np.ndarray:
    """Kidney in slices 1 and 2, liver in 2 to 4; the thing is nowhere."""
    array = np.zeros(STACK.shape, np.uint8)
    array[1:3, 5:16, 9:14] = 3
    array[2:5, 2:4, 1:8] = 5
    return array


def scan_of_slices(folder: Path, **elements) -> Volume:
    return read_volume(write_slices(folder, STACK, HEIGHTS, **{**PATIENT, **elements}))


def renumbered(labels: np.ndarray) -> np.ndarray:
    return np.array([0, 0, 0, 1, 0, 2, 0, 0, 0, 3], np.uint8)[labels]


def frames(dataset: Dataset) -> list[tuple[int, tuple[float, ...], np.ndarray, list[str]]]:
    """Segment, position, pixels and the referenced instances (and frames) of every frame."""
    found = []
    for group, pixels in zip(
        dataset.PerFrameFunctionalGroupsSequence, dataset.pixel_array, strict=True
    ):
        sources = group.DerivationImageSequence[0].SourceImageSequence
        found.append(
            (
                group.SegmentIdentificationSequence[0].ReferencedSegmentNumber,
                tuple(group.PlanePositionSequence[0].ImagePositionPatient),
                pixels,
                [_reference(item) for item in sources],
            )
        )
    return found


def _reference(item: Dataset) -> str:
    return f"{item.ReferencedSOPInstanceUID} {item.get('ReferencedFrameNumber', '')}".strip()


def test_what_pydicom_reads(tmp_path: Path, labels: np.ndarray):
    scan = scan_of_slices(tmp_path / "ct")
    path = tmp_path / "out" / "ct.dcm"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_label(path, labels, scan, NAMES)
    assert [entry.name for entry in path.parent.iterdir()] == ["ct.dcm"]
    dataset = dcmread(path)
    assert dataset.SegmentationType == "BINARY"
    assert dataset.Modality == "SEG"
    assert dataset.SeriesNumber == 1004
    for keyword, value in PATIENT.items():
        if keyword not in ("SeriesNumber", "SpecificCharacterSet"):
            assert dataset.get(keyword) == value, keyword
    assert dataset.StudyInstanceUID == "1.2"
    assert dataset.SeriesInstanceUID != "1.2.3"
    assert (dataset.Manufacturer, dataset.ManufacturerModelName) == ("fastproto", "fastproto")
    assert dataset.SoftwareVersions == __version__

    files = {
        dcmread(path).ImagePositionPatient[2]: dcmread(path) for path in (tmp_path / "ct").iterdir()
    }
    heights = sorted(files)
    (series,) = dataset.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == "1.2.3"
    referenced = {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence}
    assert referenced == {file.SOPInstanceUID for file in files.values()}

    found = frames(dataset)
    drawn = {(1, heights[z]) for z in (1, 2)} | {(2, heights[z]) for z in (2, 3, 4)}
    assert {(segment, position[2]) for segment, position, *_ in found} == drawn
    assert len(found) == 5  # the empty ones are left out
    for segment, position, pixels, sources in found:
        value, z = {1: 3, 2: 5}[segment], heights.index(position[2])
        assert position[:2] == (-20.5, 30.25)
        np.testing.assert_array_equal(pixels, labels[z] == value)
        assert sources == [files[position[2]].SOPInstanceUID]


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="no dciodvfy (Debian: dicom3tools)")
def test_a_validator_finds_no_error(tmp_path: Path, labels: np.ndarray):
    path = tmp_path / "ct.dcm"
    write_label(path, labels, scan_of_slices(tmp_path / "ct"), NAMES)
    checked = subprocess.run(["dciodvfy", path], stderr=subprocess.PIPE, text=True)
    assert "Segmentation" in checked.stderr
    assert "Error" not in checked.stderr, checked.stderr


def test_segments_have_codes_colours_and_their_algorithm(tmp_path: Path, labels: np.ndarray):
    path = tmp_path / "ct.dcm"
    write_label(path, labels, scan_of_slices(tmp_path / "ct"), NAMES)
    kidney, liver, thing = dcmread(path).SegmentSequence
    assert [item.SegmentNumber for item in (kidney, liver, thing)] == [1, 2, 3]
    assert [item.SegmentLabel for item in (kidney, liver, thing)] == [*NAMES.values()]
    for item in (kidney, liver, thing):
        assert item.SegmentAlgorithmType == "AUTOMATIC"
        assert item.SegmentAlgorithmName == "fastproto"
        (algorithm,) = item.SegmentationAlgorithmIdentificationSequence
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("fastproto", __version__)
        assert len(item.RecommendedDisplayCIELabValue) == 3
    assert kidney.RecommendedDisplayCIELabValue != liver.RecommendedDisplayCIELabValue

    def code(sequence) -> tuple[str, str]:
        return sequence[0].CodingSchemeDesignator, sequence[0].CodeValue

    assert code(kidney.SegmentedPropertyTypeCodeSequence) == ("SCT", "64033007")
    side = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence
    assert code(side) == ("SCT", "7771000")
    assert code(liver.SegmentedPropertyTypeCodeSequence) == ("SCT", "10200004")
    assert (
        "SegmentedPropertyTypeModifierCodeSequence"
        not in liver.SegmentedPropertyTypeCodeSequence[0]
    )
    assert code(liver.SegmentedPropertyCategoryCodeSequence) == ("SCT", "123037004")
    assert code(thing.SegmentedPropertyTypeCodeSequence) == ("SCT", "85756007")


def test_our_reader_finds_the_same_voxels(tmp_path: Path, labels: np.ndarray):
    scan = scan_of_slices(tmp_path / "ct")
    path = tmp_path / "ct.dcm"
    write_label(path, labels, scan, NAMES)
    np.testing.assert_array_equal(read_label(path, like=scan).array, renumbered(labels))
    table = labels_of(path)
    assert table is not None
    assert table.names == {1: "kidney_left", 2: "Liver", 3: "a thing"}


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [4, 1, 2, 3, 0, 5], [5, 4, 3, 2, 1, 0]])
def test_a_multi_frame_scan(tmp_path: Path, labels: np.ndarray, order: list[int]):
    """Its frames are referenced by number, in whatever order they lie."""
    positions = [(-20.5, 30.25, 2.5 * z) for z in order]
    elements = {**PATIENT, "InstanceNumber": 1, "ContentDate": "20240305", "ContentTime": "101112"}
    source = enhanced(STACK, positions, **elements)
    scan = read_volume(save(source, tmp_path / "scan.dcm"))
    path = tmp_path / "seg.dcm"
    write_label(path, labels, scan, NAMES)
    np.testing.assert_array_equal(read_label(path, like=scan).array, renumbered(labels))
    dataset = dcmread(path)
    found = frames(dataset)
    assert len(found) == 5
    for segment, position, pixels, sources in found:
        z = round(position[2] / 2.5)
        np.testing.assert_array_equal(pixels, labels[z] == {1: 3, 2: 5}[segment])
        assert sources == [f"{source.SOPInstanceUID} {order.index(z) + 1}"]
    (series,) = dataset.ReferencedSeriesSequence
    (instance,) = series.ReferencedInstanceSequence
    assert instance.ReferencedSOPClassUID == ENHANCED_CT
    assert dataset.FrameOfReferenceUID == "1.2.77"


def test_nothing_was_found(tmp_path: Path, labels: np.ndarray):
    scan = scan_of_slices(tmp_path / "ct")
    path = tmp_path / "ct.dcm"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_label(path, np.zeros_like(labels), scan, {1: "Liver"})
    assert not read_label(path, like=scan).array.any()
    assert segment_names(path) == {1: "Liver"}


def test_many_organs_and_long_names(tmp_path: Path, labels: np.ndarray):
    scan = scan_of_slices(tmp_path / "ct")
    names = {value: f"organ {value} " + "x\\" * 60 for value in range(1, 301)}
    array = (np.arange(labels.size) % 301).reshape(labels.shape)
    path = tmp_path / "ct.dcm"
    write_label(path, array, scan, names)
    np.testing.assert_array_equal(read_label(path, like=scan).array, array)
    assert segment_names(path)[300].startswith("organ 300 x/x/")


@pytest.mark.parametrize("source", [None, "ISO_IR 100", "ISO_IR 192", ["", "ISO 2022 IR 87"]])
def test_names_of_any_language(tmp_path: Path, labels: np.ndarray, source: str | None):
    patient = (
        {None: "Muller^Anna", "ISO_IR 100": "Müller^Anna"}.get(source, "山田^Anna")
        if not isinstance(source, list)
        else "Yamada^Taro=山田^太郎"
    )
    scan = scan_of_slices(tmp_path / "ct", SpecificCharacterSet=source, PatientName=patient)
    path = tmp_path / "ct.dcm"
    write_label(path, labels, scan, {3: "Größe 肝", 5: "Liver"})
    dataset = dcmread(path)
    assert str(dataset.PatientName) == patient
    assert segment_names(path) == {1: "Größe 肝", 2: "Liver"}


def test_headers_without_what_may_be_empty(tmp_path: Path, labels: np.ndarray):
    folder = write_slices(tmp_path / "ct", STACK, HEIGHTS, FrameOfReferenceUID="1.2.77")
    scan = read_volume(folder)
    write_label(tmp_path / "ct.dcm", labels, scan, NAMES)
    assert not dcmread(tmp_path / "ct.dcm").PatientName
    np.testing.assert_array_equal(
        read_label(tmp_path / "ct.dcm", like=scan).array, renumbered(labels)
    )


def test_no_frame_of_reference_is_refused(tmp_path: Path, labels: np.ndarray):
    scan = scan_of_slices(tmp_path / "ct", FrameOfReferenceUID=None)
    for refused in (
        lambda: check_label_output(tmp_path / "ct.dcm", scan),
        lambda: write_label(tmp_path / "ct.dcm", labels, scan, NAMES),
    ):
        with pytest.raises(VolumeError, match=r"found no FrameOfReferenceUID.*\.seg\.nrrd"):
            refused()
    assert not (tmp_path / "ct.dcm").exists()


def test_several_multi_frame_files_are_refused(tmp_path: Path, labels: np.ndarray):
    folder = tmp_path / "ct"
    folder.mkdir()
    for part in range(2):
        positions = [(0, 0, 2.5 * z) for z in range(3 * part, 3 * part + 3)]
        save(enhanced(STACK[:3], positions, **PATIENT), folder / f"{part}.dcm")
    with pytest.raises(VolumeError, match="found a series of 2 multi-frame files"):
        write_label(tmp_path / "out.dcm", labels, read_volume(folder), NAMES)


def test_a_scan_that_is_not_dicom_is_refused(tmp_path: Path, labels: np.ndarray):
    scan = Volume(STACK, path=Path("scan.nii.gz"))
    with pytest.raises(VolumeError, match=r"^scan\.nii\.gz: found a scan that is no DICOM series"):
        write_label(tmp_path / "out.dcm", labels, scan, NAMES)


def test_a_missing_library_is_named(
    tmp_path: Path, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    scan = scan_of_slices(tmp_path / "ct")
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ArgumentError, match=r"pip install 'fastproto\[dicom-seg\]'"):
        write_label(tmp_path / "ct.dcm", labels, scan, NAMES)
