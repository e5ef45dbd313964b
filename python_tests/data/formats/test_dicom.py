# SPDX-License-Identifier: Apache-2.0
"""DICOM series folders, written slice by slice with SimpleITK."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from fastproto.data import read_volume
from fastproto.data.intensity import check_intensities
from fastproto.data.phantom import make_patient
from fastproto.errors import FastprotoWarning, GeometryError, VolumeError

STRAIGHT = (1, 0, 0, 0, 1, 0)


def write_slice(
    path: Path,
    pixels: np.ndarray,
    position: Sequence[float],
    *,
    axes: Sequence[float] = STRAIGHT,
    spacing: tuple[float, float] = (0.7, 0.9),
    uid: str = "1.2.3",
    **tags: str,
) -> None:
    """A CT slice; ``spacing`` is (x, y)."""
    image = sitk.GetImageFromArray(pixels[None])
    image.SetSpacing((*spacing, 1.0))
    values = {
        "0008|0060": "CT", "0020|000d": "1.2", "0020|000e": uid,
        "0020|0032": "\\".join(map(str, position)), "0020|0037": "\\".join(map(str, axes)),
        "0018|0050": "5", "0028|1052": "-1024", "0028|1053": "1", **tags,
    }  # fmt: skip
    for tag, value in values.items():
        image.SetMetaData(tag, value)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(path.with_suffix(".dcm")))
    writer.Execute(image)
    path.with_suffix(".dcm").rename(path)


@pytest.fixture
def stack() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 2000, (6, 8, 10)).astype(np.int16)


def write_series(folder: Path, stack: np.ndarray, heights: Sequence[float], **kwargs) -> Path:
    """Slices named against their order, without suffix."""
    folder.mkdir(exist_ok=True)
    for index, (pixels, z) in enumerate(zip(stack, heights, strict=True)):
        write_slice(folder / f"IM{90 - index}", pixels, (-20.5, 30.25, z), **kwargs)
    return folder


class TestGoodSeries:
    def test_values_order_and_geometry(self, tmp_path: Path, stack: np.ndarray, capfd):
        folder = write_series(tmp_path / "s", stack, [-3 + 2.5 * i for i in range(6)])
        volume = read_volume(folder)
        np.testing.assert_array_equal(volume.array, stack)
        np.testing.assert_allclose(volume.spacing, (0.7, 0.9, 2.5))
        np.testing.assert_allclose(volume.origin, (-20.5, 30.25, -3))
        np.testing.assert_allclose(volume.direction, np.eye(3).ravel())
        assert volume.path == folder
        assert volume.modality == "CT"
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(("heights", "step"), [
        (range(0, 12, 2), 2),  # the thickness of 5 does not count
        ([0, 0.63, 1.25, 1.88, 2.5, 3.13], 0.626),  # rounded positions are even enough
    ])  # fmt: skip
    def test_step_is_the_distance_of_slices(
        self, tmp_path: Path, stack: np.ndarray, heights: Sequence[float], step: float
    ):
        volume = read_volume(write_series(tmp_path / "s", stack, heights))
        assert volume.spacing[2] == pytest.approx(step)

    def test_descending_files_are_sorted_along_the_normal(self, tmp_path: Path, stack: np.ndarray):
        volume = read_volume(write_series(tmp_path / "s", stack, range(10, 4, -1)))
        np.testing.assert_array_equal(volume.array, stack[::-1])
        assert volume.origin[2] == 5

    def test_oblique_slices(self, tmp_path: Path, stack: np.ndarray):
        row, column = np.array([0.8, 0.6, 0]), np.array([0, 0, -1.0])
        normal = np.cross(row, column)
        for index, pixels in enumerate(stack):
            position = np.array([5, 6, 7]) + 1.5 * index * normal
            write_slice(tmp_path / f"s{index}", pixels, position, axes=[*row, *column])
        volume = read_volume(tmp_path)
        np.testing.assert_array_equal(volume.array, stack)
        expected = np.stack([row, column, normal], axis=1).ravel()
        np.testing.assert_allclose(volume.direction, expected, atol=1e-9)
        assert volume.spacing[2] == pytest.approx(1.5)

    def test_rounded_axes_become_orthonormal(self, tmp_path: Path, stack: np.ndarray):
        """Those nearest to both, whatever the order of rows and columns."""
        axes = [0.8, 0.6, 0, -0.6003, 0.7998, 0]
        for index, pixels in enumerate(stack):
            write_slice(tmp_path / f"s{index}", pixels, (0, 0, 1.5 * index), axes=axes)
        found = np.array(read_volume(tmp_path).direction).reshape(3, 3)
        np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-12)
        row, column = found.T[:2]
        errors = [np.linalg.norm(row - axes[:3]), np.linalg.norm(column - axes[3:])]
        assert errors == [pytest.approx(errors[0], rel=1e-2)] * 2
        assert max(errors) < 3e-4

    def test_other_files_are_no_slices(self, tmp_path: Path, stack: np.ndarray):
        folder = write_series(tmp_path / "s", stack, range(6))
        (folder / "notes.txt").write_text("not a slice " * 50)
        (folder / ".hidden").write_bytes((folder / "IM90").read_bytes())
        (folder / "sub").mkdir()
        structures = bytearray((folder / "IM90").read_bytes())
        place = structures.find(b"\x02\x00\x02\x00UI") + 8
        uid = b"1.2.840.10008.5.1.4.1.1.481.3"
        structures[place - 2 : place] = (30).to_bytes(2, "little")
        structures[place : place + 26] = uid + b"\0"
        (folder / "RTSTRUCT").write_bytes(structures)
        with pytest.warns(FastprotoWarning, match=r"begin with a dot \(1: \.hidden\)"):
            np.testing.assert_array_equal(read_volume(folder).array, stack)

    def test_one_of_several_series_is_chosen_by_uid(self, tmp_path: Path, stack: np.ndarray):
        folder = write_series(tmp_path / "s", stack, range(6))
        write_slice(folder / "other", stack[0, :4], (0, 0, 0), uid="9.9")
        np.testing.assert_array_equal(read_volume(folder, series="1.2.3").array, stack)
        for series in (None, "4.4"):
            with pytest.raises(VolumeError) as caught:
                read_volume(folder, series=series)
            assert "1.2.3: 6 CT slices of 10 x 8" in str(caught.value)
            assert "9.9: 1 CT slices of 10 x 4" in str(caught.value)

    def test_one_slice_takes_its_thickness(self, tmp_path: Path, stack: np.ndarray):
        volume = read_volume(write_series(tmp_path / "s", stack[:1], [0]))
        assert volume.array.shape == (1, 8, 10)
        assert volume.spacing[2] == 5

    def test_slices_with_different_rescaling(self, tmp_path: Path, stack: np.ndarray):
        """As in PET: the first slices come out as integers, a later one as real numbers."""
        folder = write_series(tmp_path / "s", stack[:2], [0, 1])
        path = folder / "half"
        doubled = {"0028|1053": "2", "0028|1052": "0"}
        write_slice(path, 2 * stack[2], (-20.5, 30.25, 2), **doubled)
        slope = b"\x28\x00\x53\x10\x02\x00\x00\x00"
        assert slope + b"2 " in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(slope + b"2 ", slope + b".5"))
        volume = read_volume(folder)
        np.testing.assert_array_equal(volume.array[:2], stack[:2])
        np.testing.assert_array_equal(volume.array[2], stack[2] / 2)
        assert volume.array.dtype.kind == "f"


class TestBadSeries:
    @pytest.mark.parametrize(("heights", "words"), [
        *(([3 * i for i in range(6) if i != missing],
           f"gap of 6.00 mm between {3 * missing - 3}.00 and {3 * missing + 3}.00 mm.*3.00 mm")
          for missing in (1, 3, 4)),
        ([0, 1, 2, 3.2, 4.2, 5.2], "evenly spaced"), ([0, 1, 2, 2, 3, 4], "two slices at 2.00"),
    ])  # fmt: skip
    def test_missing_and_doubled_slices_are_located(
        self, tmp_path: Path, stack: np.ndarray, heights: Sequence[float], words: str, capfd
    ):
        with pytest.raises(VolumeError, match=words):
            read_volume(write_series(tmp_path / "s", stack[: len(heights)], heights))
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(("rows", "options", "kind", "words"), [
        (4, {}, VolumeError, "slices of 10 x 4, 10 x 8"),
        (8, {"axes": (1, 0, 0, 0, 0, -1)}, GeometryError, "different orientation .*other"),
        (8, {"spacing": (0.7, 1.0)}, GeometryError, "one pixel size"),
    ])  # fmt: skip
    def test_mixed_slices(
        self, tmp_path: Path, stack: np.ndarray, rows: int, options: dict, kind: type, words: str
    ):
        folder = write_series(tmp_path / "s", stack, range(6))
        write_slice(folder / "other", stack[0, :rows], (-20.5, 30.25, 6), **options)
        with pytest.raises(kind, match=words):
            read_volume(folder)

    def test_gantry_tilt(self, tmp_path: Path, stack: np.ndarray):
        for index, pixels in enumerate(stack):
            write_slice(tmp_path / f"s{index}", pixels, (0, 0.3 * index, 2 * index))
        with pytest.raises(GeometryError, match=r"sheared by 1\.50 mm"):
            read_volume(tmp_path)

    def test_axes_that_are_not_orthonormal(self, tmp_path: Path, stack: np.ndarray):
        folder = write_series(tmp_path / "s", stack, range(6))
        for path in folder.iterdir():
            data = path.read_bytes()
            assert b"1\\0\\0\\0\\1\\0" in data
            path.write_bytes(data.replace(b"1\\0\\0\\0\\1\\0", b"1\\0\\0\\1\\1\\0"))
        with pytest.raises(GeometryError, match="right angles"):
            read_volume(folder)

    @pytest.mark.parametrize("keep", [0.3, 0.9])
    def test_truncated_slice(self, tmp_path: Path, stack: np.ndarray, keep: float, capfd):
        folder = write_series(tmp_path / "s", stack, range(6))
        data = (folder / "IM85").read_bytes()
        (folder / "IM85").write_bytes(data[: int(keep * len(data))])
        with pytest.raises(VolumeError, match=r"IM85.*truncated"):
            read_volume(folder)
        assert capfd.readouterr() == ("", "")

    def test_folder_without_slices(self, tmp_path: Path):
        (tmp_path / "notes.txt").write_text("nothing here")
        with pytest.raises(VolumeError, match="without DICOM"):
            read_volume(tmp_path)

    def test_colour_slices(self, tmp_path: Path):
        image = sitk.GetImageFromArray(np.zeros((1, 8, 9, 3), np.uint8), isVector=True)
        sitk.WriteImage(image, str(tmp_path / "rgb.dcm"))
        with pytest.raises(VolumeError, match="colour"):
            read_volume(tmp_path)

    @pytest.mark.parametrize("tag", ["0020|0032", "0020|0037", "0028|0030"])
    def test_slices_without_position(self, tmp_path: Path, stack: np.ndarray, tag: str):
        """The element is renamed to one that nobody knows."""
        folder = write_series(tmp_path / "s", stack, range(6))
        group, element = (int(half, 16).to_bytes(2, "little") for half in tag.split("|"))
        data = (folder / "IM87").read_bytes()
        assert data.count(group + element) == 1
        unknown = bytes([element[0] + 1]) + element[1:]
        (folder / "IM87").write_bytes(data.replace(group + element, group + unknown))
        with pytest.raises(GeometryError, match=r"IM87.*ImagePositionPatient"):
            read_volume(folder)


@pytest.mark.data
class TestRealSeries:
    def test_jpeg2000_ct_without_suffix(self, test_data: Path):
        volume = read_volume(test_data / "dicom" / "totalseg_ct_jpeg2000" / "series")
        assert volume.array.shape == (20, 512, 512)
        np.testing.assert_allclose(volume.spacing, (0.9765625, 0.9765625, 2))
        np.testing.assert_allclose(volume.origin, (-249.51171875, -437.51171875, -804.5))
        assert -1100 < volume.array.min() < -900

    def test_flipped_series_is_what_simpleitk_reads(self, test_data: Path):
        folder = test_data / "dicom" / "torchio_small" / "series"
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
        expected = sitk.ReadImage(names)
        volume = read_volume(folder)
        np.testing.assert_array_equal(volume.array, sitk.GetArrayViewFromImage(expected))
        np.testing.assert_allclose(volume.spacing, expected.GetSpacing(), rtol=1e-6)
        np.testing.assert_allclose(volume.origin, expected.GetOrigin())
        np.testing.assert_allclose(volume.direction, expected.GetDirection(), atol=1e-9)


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({}, None),
        ({"0028|1052": "0"}, r"not Hounsfield units \(air at"),
        ({"0008|0060": "PT"}, "DICOM modality PT"),
        ({"0008|0060": "MR"}, "DICOM modality MR"),
    ],
)
def test_a_series_that_is_no_ct_in_hounsfield_units(tmp_path: Path, tags: dict, words: str | None):
    stack = make_patient(3)[0].array[::12]
    heights = [5.0 * i for i in range(len(stack))]
    # Stored from 0, as scanners do; the writer takes the rescaled values.
    shift = 1024 if "0028|1052" in tags else 0
    volume = read_volume(write_series(tmp_path / "s", stack + np.int16(shift), heights, **tags))
    np.testing.assert_array_equal(volume.array, stack + shift)
    assert volume.modality == tags.get("0008|0060", "CT")
    expected = pytest.raises(VolumeError, match=words) if words else contextlib.nullcontext()
    with expected:
        check_intensities(volume, "ct")
