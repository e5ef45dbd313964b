# SPDX-License-Identifier: Apache-2.0
"""Label maps, grids, and writing volumes."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from fastproto.data import (
    Volume,
    check_labels,
    check_same_grid,
    read_label,
    read_volume,
    write_volume,
)
from fastproto.data.formats.table import WRITABLE
from fastproto.errors import ArgumentError, GeometryError, LabelError, OutputError

FORMATS = [".nii.gz", ".nii", ".nrrd", ".mha"]


class TestLabels:
    def label_file(self, tmp_path: Path, array: np.ndarray) -> Path:
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / "label.nii.gz"))
        return tmp_path / "label.nii.gz"

    @pytest.mark.parametrize(("dtype", "high", "stored"), [
        *((dtype, 100, np.uint8) for dtype in ("u1", "i2", "i8", "f4", "f8")),
        *((dtype, 300, np.uint16) for dtype in ("i2", "i8", "f4", "f8")),
    ])  # fmt: skip
    def test_integers(self, tmp_path: Path, dtype: str, high: int, stored: type):
        array = np.random.default_rng(1).integers(0, 7, (4, 5, 6))
        array[0, 0, 0] = high
        label = read_label(self.label_file(tmp_path, array.astype(dtype)))
        assert label.array.dtype == stored
        np.testing.assert_array_equal(label.array, array)

    def test_nearly_integers_are_rounded(self, tmp_path: Path):
        array = np.array([0, 0.9996, 2.0004, 3], np.float32).reshape(1, 2, 2)
        label = read_label(self.label_file(tmp_path, array))
        assert label.array.ravel().tolist() == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        ("value", "words"),
        [(0.5, "fractional label 0.5"), (-1.0, "label -1"), (70000.0, "label 70000")],
    )
    def test_unusable_values(self, tmp_path: Path, value: float, words: str):
        array = np.zeros((3, 4, 5), np.float32)
        array[2, 1, 0] = value
        with pytest.raises(LabelError, match=words):
            read_label(self.label_file(tmp_path, array))

    def test_present_unknown_and_no_labels(self):
        array = np.zeros((3, 4, 5), np.uint16)
        with pytest.raises(LabelError, match="empty"):
            check_labels(Volume(array))
        assert check_labels(Volume(array), needed=False) == []
        array[0, 0, :3] = 4, 300, 2
        assert check_labels(Volume(array)) == [2, 4, 300]
        assert check_labels(Volume(array), {2: "a", 4: "b", 300: "c", 5: "d"}) == [2, 4, 300]
        with pytest.raises(LabelError, match=r"unknown labels 4, 300.*2 liver"):
            check_labels(Volume(array), {2: "liver"})


def test_header_rounding_makes_no_other_grid():
    a = Volume(np.zeros((50, 60, 70)), (0.7, 0.7, 2), (-200.123456, 10, 0))
    b = Volume(np.ones((50, 60, 70)), (0.7000001, 0.7, 2), (-200.1235, 10, 0))
    check_same_grid(a, b)


@pytest.mark.parametrize("other", [
    Volume(np.zeros((4, 5, 7))), Volume(np.zeros((4, 5, 6)), spacing=(1, 1, 1.1)),
    Volume(np.zeros((4, 5, 6)), origin=(0, 0.5, 0)),
    Volume(np.zeros((4, 5, 6)), direction=(1, 0, 0, 0, -1, 0, 0, 0, 1)),
    Volume(np.zeros((4, 5, 6)), origin=(float("nan"), 0, 0)),
])  # fmt: skip
def test_other_grids_are_refused(other: Volume):
    with pytest.raises(GeometryError):
        check_same_grid(Volume(np.zeros((4, 5, 6))), other)


class TestWriting:
    @pytest.fixture
    def like(self) -> Volume:
        turn = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, -1.0)
        array = np.zeros((4, 5, 6), np.int16)
        return Volume(array, (0.71, 0.83, 2.5), (-123.4375, 17.25, 1009.5), turn)

    @pytest.mark.parametrize("name", [
        "a.nii", "a.nii.gz", "a.nrrd", "a.mha", "sub-01.ses-1.nii.gz", "sub-01.ses-1.nrrd",
        "new/folder/a.nii.gz",
    ])  # fmt: skip
    def test_round_trip(self, tmp_path: Path, like: Volume, name: str):
        array = np.random.default_rng(0).integers(0, 9, like.array.shape)
        write_volume(tmp_path / name, array, like)
        read = read_label(tmp_path / name)
        np.testing.assert_array_equal(read.array, array)
        np.testing.assert_allclose(read.spacing, like.spacing, rtol=1e-6)
        np.testing.assert_allclose(read.origin, like.origin, rtol=1e-6)
        np.testing.assert_allclose(read.direction, like.direction, atol=1e-6)
        check_same_grid(like, read)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]

    @pytest.mark.parametrize("suffix", FORMATS)
    def test_a_grid_in_numbers_of_numpy(self, tmp_path: Path, like: Volume, suffix: str):
        fields = (like.spacing, like.origin, like.direction)
        grid = (tuple(np.array(field, np.float32)) for field in fields)
        write_volume(tmp_path / f"a{suffix}", like.array, Volume(like.array, *grid))
        check_same_grid(like, read_volume(tmp_path / f"a{suffix}"))

    @pytest.mark.parametrize("suffix", FORMATS)
    @pytest.mark.parametrize(("values", "stored"), [
        ([0, 255], np.uint8), ([0, 256], np.uint16), ([-1024, 3071], np.int16),
        ([0, 70000], np.int32), ([False, True], np.uint8), ([0.25, 0.75], np.float32),
    ])  # fmt: skip
    def test_types(self, tmp_path: Path, like: Volume, suffix: str, values: list, stored: type):
        array = np.resize(np.array(values), like.array.shape)
        write_volume(tmp_path / f"v{suffix}", array, like)
        read = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"v{suffix}")))
        assert read.dtype == stored
        np.testing.assert_array_equal(read, array)

    @pytest.mark.parametrize("suffix", FORMATS)
    def test_probabilities_are_vector_pixels(self, tmp_path: Path, like: Volume, suffix: str):
        array = np.random.default_rng(0).random((3, *like.array.shape))
        write_volume(tmp_path / f"p{suffix}", array, like)
        image = sitk.ReadImage(str(tmp_path / f"p{suffix}"))
        assert (image.GetNumberOfComponentsPerPixel(), image.GetDimension()) == (3, 3)
        stored = np.moveaxis(sitk.GetArrayFromImage(image), -1, 0)
        np.testing.assert_array_equal(stored, array.astype(np.float32))
        np.testing.assert_allclose(image.GetOrigin(), like.origin, rtol=1e-6)

    def test_no_patient_metadata(self, tmp_path: Path):
        image = sitk.GetImageFromArray(np.ones((1, 8, 9), np.int16))
        for tag, value in {
            "0008|0060": "CT", "0010|0010": "DOE^JANE", "0010|0030": "19700101",
            "0020|0032": "0\\0\\0", "0020|0037": "1\\0\\0\\0\\1\\0", "0018|0050": "3",
        }.items():  # fmt: skip
            image.SetMetaData(tag, value)
        (tmp_path / "series").mkdir()
        sitk.WriteImage(image, str(tmp_path / "series" / "slice.dcm"))
        scan = read_volume(tmp_path / "series")
        for suffix in (".nrrd", ".mha", ".nii"):
            write_volume(tmp_path / f"out{suffix}", scan.array, scan)
            content = (tmp_path / f"out{suffix}").read_bytes()
            assert b"DOE" not in content
            assert b"19700101" not in content

    @pytest.mark.parametrize("name", ["a.png", "a.mhd", "a", "a.gz", "A.NII"])
    def test_unknown_suffix(self, tmp_path: Path, like: Volume, name: str):
        with pytest.raises(ArgumentError, match="suffix"):
            write_volume(tmp_path / name, like.array, like)

    @pytest.mark.parametrize("array", [
        np.zeros((4, 5, 7)), np.zeros((5, 6)), np.zeros((1, 2, 4, 5, 6)),
        np.full((4, 5, 6), np.nan), np.full((4, 5, 6), 2**40),
    ])  # fmt: skip
    def test_unusable_arrays(self, tmp_path: Path, like: Volume, array: np.ndarray):
        with pytest.raises(ArgumentError, match="array"):
            write_volume(tmp_path / "a.nii.gz", array, like)

    def test_folder_in_the_way(self, tmp_path: Path, like: Volume):
        (tmp_path / "file").write_text("")
        (tmp_path / "a.nii.gz").mkdir()
        for path in (tmp_path / "file" / "a.nii.gz", tmp_path / "a.nii.gz"):
            with pytest.raises(OutputError):
                write_volume(path, like.array, like)

    @pytest.mark.parametrize("failure", ["an exception", "a full disk"])
    @pytest.mark.parametrize("suffix", FORMATS)
    def test_a_failing_writer_keeps_the_old_file(
        self, tmp_path: Path, suffix: str, failure: str, monkeypatch: pytest.MonkeyPatch, capfd
    ):
        """A file-size limit stands for a full disk: the writer fails midway."""
        array = np.random.default_rng(0).integers(0, 60000, (20, 100, 100))
        path = tmp_path / f"a{suffix}"
        write_volume(path, np.zeros_like(array), Volume(array))
        old = path.read_bytes()

        def fail(path: Path, voxels: object) -> None:
            path.write_bytes(old[: len(old) // 2])
            raise OSError(errno.ENOSPC, "no space left")

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if failure == "an exception":
            monkeypatch.setitem(WRITABLE, suffix, fail)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        words = {"an exception": "no space left", "a full disk": "nothing was overwritten"}
        try:
            with pytest.raises(OutputError, match=words[failure]):
                write_volume(path, array, Volume(array))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == old
        assert list(tmp_path.iterdir()) == [path]
        assert capfd.readouterr() == ("", "")
