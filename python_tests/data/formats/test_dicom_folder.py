# SPDX-License-Identifier: Apache-2.0
"""What lies in a folder beside the slices of a series: left out with a word, or refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from support.dicom import COLOUR, STRUCTURES, enhanced, new, pixels, refuse, save, write_slices

from fastproto.data import read_volume
from fastproto.errors import FastprotoWarning, GeometryError, VolumeError

STACK = np.random.default_rng(0).integers(-1000, 2000, (6, 8, 10)).astype("i2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_slices(tmp_path / "series", STACK, range(6))


def screenshot(path: Path, series: str = "9.9") -> Path:
    elements = pixels(np.zeros((8, 30), "u1"), SamplesPerPixel=3, PhotometricInterpretation="RGB")
    elements |= {"Columns": 10, "PlanarConfiguration": 0, "SeriesInstanceUID": series}
    return save(new(COLOUR, **elements), path)


def truncated(path: Path, size: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(size * len(data)) if size < 1 else int(size)])


@pytest.mark.parametrize("series", ["1.2.3", "9.9"])
def test_colour_screenshots_do_not_block(folder: Path, series: str):
    screenshot(folder / "report", series)
    with pytest.warns(FastprotoWarning, match=r"series: left out colour images \(1: report\)"):
        np.testing.assert_array_equal(read_volume(folder).array, STACK)
    np.testing.assert_array_equal(read_volume(folder, series="1.2.3").array, STACK)


def test_images_without_a_place_do_not_block(folder: Path):
    """A film without functional groups, and a series of grey screenshots."""
    film = new(COLOUR, **pixels(np.zeros((4, 8, 10), "u1")), NumberOfFrames=4)
    save(film, folder / "film")
    grey = new(COLOUR, **pixels(np.zeros((8, 10), "u1"), SeriesInstanceUID="9.9"))
    save(grey, folder / "grey")
    with pytest.warns(FastprotoWarning) as caught:
        np.testing.assert_array_equal(read_volume(folder).array, STACK)
    text = str(caught[0].message)
    assert "images that do not say where they lie (1: grey)" in text
    assert "multi-frame files that do not say where their frames lie (1: film)" in text
    with pytest.raises(GeometryError, match=r"grey.*ImagePositionPatient"):
        read_volume(folder, series="9.9")


def test_a_multi_frame_scan_is_a_series_of_its_own(folder: Path):
    other = enhanced(STACK[:2], [(0, 0, 0), (0, 0, 1)], SeriesInstanceUID="9.9")
    save(other, folder / "enhanced")
    with pytest.raises(VolumeError, match=r"2 series .*1\.2\.3: 6 CT.*9\.9: 2 CT slices"):
        read_volume(folder)
    for series, expected in (("1.2.3", STACK), ("9.9", STACK[:2])):
        np.testing.assert_array_equal(read_volume(folder, series=series).array, expected)


@pytest.mark.parametrize("content", [
    bytes(128) + b"DICM\2\0\0\0UL\4\0\0\0\0\0", bytes(128) + b"DICM" + bytes(range(256)), b"",
])  # fmt: skip
def test_the_index_of_a_disc_is_skipped(folder: Path, content: bytes):
    (folder / "DICOMDIR").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_volume(folder).array, STACK)


def test_objects_without_images_are_skipped(folder: Path):
    save(new(STRUCTURES, Modality="RTSTRUCT"), folder / "structures")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_volume(folder).array, STACK)


class TestBroken:
    @pytest.mark.parametrize("size", [0.95, 0.8])
    def test_a_file_of_another_series_does_not_block(self, folder: Path, size: float):
        write_slices(folder.parent / "b", STACK[:1], [0], SeriesInstanceUID="9.9")
        other = (folder.parent / "b" / "IM00").rename(folder / "other")
        while b"9.9" in other.read_bytes() and b"\x28\0\x10\0" in other.read_bytes():
            truncated(other, size)  # within its header, behind the series
        assert b"9.9" in other.read_bytes()
        np.testing.assert_array_equal(read_volume(folder, series="1.2.3").array, STACK)
        with pytest.warns(FastprotoWarning, match=r"left out a damaged or truncated .* \(1: other"):
            np.testing.assert_array_equal(read_volume(folder).array, STACK)

    @pytest.mark.parametrize("size", [150, 300, 0.3, 0.9])
    @pytest.mark.parametrize("series", [None, "1.2.3"])
    def test_a_slice_at_the_end_is_missed(self, folder: Path, series: str | None, size: float):
        """No gap would show."""
        truncated(folder / "IM05", size)
        with pytest.raises(VolumeError, match=r"IM05.*damaged or truncated"):
            read_volume(folder, series=series)

    def test_a_slice_that_is_cut_off_within_its_uid(self, folder: Path):
        last = folder / "IM05"
        content = last.read_bytes()
        last.write_bytes(content[: content.index(b"1.2.3", content.index(b"\x20\x00\x0e\x00")) + 3])
        with pytest.raises(VolumeError, match=r"IM05.*damaged or truncated"):
            read_volume(folder)

    def test_a_slice_that_claims_to_be_several_frames(self, folder: Path):
        dataset = pydicom.dcmread(folder / "IM05")
        dataset.NumberOfFrames = 5
        save(dataset, folder / "IM05")
        with pytest.raises(VolumeError, match=r"IM05.*0 positions for 5 frames"):
            read_volume(folder)

    def test_a_file_that_may_have_been_a_slice(self, folder: Path):
        last = folder / "IM05"
        last.write_bytes(b"")
        with pytest.raises(VolumeError, match="IM05: found empty files"):
            read_volume(folder)
        last.unlink()
        last.symlink_to(folder / "nowhere")
        with pytest.raises(VolumeError, match="IM05: found broken links"):
            read_volume(folder)
        last.unlink()
        for path in folder.iterdir():
            path.rename(path.with_suffix(".dcm"))
        last.with_suffix(".dcm").write_bytes(bytes(5000))
        with pytest.raises(VolumeError, match=r"IM05\.dcm: found files that are not DICOM"):
            read_volume(folder)

    def test_files_that_cannot_be_opened(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        """Only one named as the slices are may be one of them."""
        (folder / "notes.txt").write_text("no slice")
        refuse(monkeypatch, "notes.txt")
        with pytest.warns(FastprotoWarning, match=r"no access \(Permission denied\) \(1: notes"):
            np.testing.assert_array_equal(read_volume(folder).array, STACK)
        refuse(monkeypatch, "IM05")
        with pytest.raises(VolumeError, match=r"IM05: found no access \(Permission denied\)"):
            read_volume(folder)

    def test_what_cannot_have_been_one_is_named(self, folder: Path):
        for path in folder.iterdir():
            path.rename(path.with_suffix(".dcm"))
        (folder / "LICENSE").write_text("no slice")
        (folder / "lock").write_bytes(b"")
        (folder / ".IM06.dcm").write_bytes((folder / "IM05.dcm").read_bytes())
        (folder / "._IM05.dcm").write_bytes(b"\0\5\x16\7")
        with pytest.warns(FastprotoWarning) as caught:
            np.testing.assert_array_equal(read_volume(folder).array, STACK)
        text = str(caught[0].message)
        assert "files whose names begin with a dot (1: .IM06.dcm)" in text
        assert "empty files (1: lock)" in text
        assert "LICENSE" not in text

    def test_nothing_but_what_is_no_slice(self, tmp_path: Path):
        save(new(STRUCTURES, Modality="RTSTRUCT"), tmp_path / "structures")
        screenshot(tmp_path / "report")
        with pytest.raises(VolumeError, match=r"colour images .*RT Structure Set Storage"):
            read_volume(tmp_path)
