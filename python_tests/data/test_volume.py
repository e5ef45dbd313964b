# SPDX-License-Identifier: Apache-2.0
"""Reading and writing volumes: every kind of bad file is written here and must be refused."""

from __future__ import annotations

import gzip
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastproto.data import (
    Volume,
    check_labels,
    check_same_grid,
    read_label,
    read_volume,
    write_volume,
)
from fastproto.errors import (
    ArgumentError,
    GeometryError,
    InputError,
    LabelError,
    OutputError,
    VolumeError,
)

FORMATS = [".nii.gz", ".nii", ".nrrd", ".mha"]
PIXDIM, SLOPE, INTER, QFORM_CODE, QUATERN, SROW, DIM = 80, 112, 116, 252, 256, 280, 40


def image_of(array: np.ndarray, **kwargs: bool) -> sitk.Image:
    image = sitk.GetImageFromArray(array, **kwargs)
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((-11.5, 7.25, 130.0))
    image.SetDirection((0, 0, -1, 1, 0, 0, 0, -1, 0))
    return image


@pytest.fixture
def random_array() -> np.ndarray:
    return np.random.default_rng(0).normal(100, 30, (5, 6, 7)).astype(np.float32)


@pytest.fixture
def nifti_with(tmp_path: Path, random_array: np.ndarray) -> Callable[..., Path]:
    """Writes a good .nii with some bytes of the header or data replaced."""

    def write(*patches: tuple[int, str, tuple], name: str = "patched.nii") -> Path:
        good = tmp_path / "good.nii"
        sitk.WriteImage(image_of(random_array), str(good))
        data = bytearray(good.read_bytes())
        for offset, code, values in patches:
            struct.pack_into("<" + code, data, offset, *values)
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


class TestGoodFiles:
    @pytest.mark.parametrize("suffix", [*FORMATS, ".mhd", ".nhdr"])
    def test_array_and_geometry(self, tmp_path: Path, random_array: np.ndarray, suffix: str):
        image = image_of(random_array)
        sitk.WriteImage(image, str(tmp_path / f"v{suffix}"), useCompression=True)
        read = read_volume(tmp_path / f"v{suffix}")
        np.testing.assert_array_equal(read.array, random_array)
        np.testing.assert_allclose(read.spacing, image.GetSpacing(), rtol=1e-6)
        np.testing.assert_allclose(read.origin, image.GetOrigin(), rtol=1e-6)
        np.testing.assert_allclose(read.direction, image.GetDirection(), atol=1e-6)
        assert read.path == tmp_path / f"v{suffix}"

    def test_big_endian_nifti(self, tmp_path: Path):
        array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
        header = bytearray(352)
        struct.pack_into(">i", header, 0, 348)
        struct.pack_into(">8h", header, 40, 3, 4, 3, 2, 1, 1, 1, 1)
        struct.pack_into(">2h", header, 70, 4, 16)
        struct.pack_into(">8f", header, 76, 1, 0.5, 1.5, 2.0, 0, 0, 0, 0)
        struct.pack_into(">3f", header, 108, 352, 1, 0)
        struct.pack_into(">2h", header, 252, 0, 1)
        struct.pack_into(">12f", header, 280, -0.5, 0, 0, 0, 0, -1.5, 0, 0, 0, 0, 2, 0)
        header[344:348] = b"n+1\0"
        (tmp_path / "big.nii").write_bytes(bytes(header) + array.astype(">i2").tobytes())
        read = read_volume(tmp_path / "big.nii")
        np.testing.assert_array_equal(read.array, array)
        np.testing.assert_allclose(read.spacing, (0.5, 1.5, 2.0))

    @pytest.mark.parametrize("slope", [2.0, float("nan")])
    def test_scaling_is_applied_and_nan_means_none(
        self, nifti_with: Callable, random_array: np.ndarray, slope: float
    ):
        read = read_volume(nifti_with((SLOPE, "f", (slope,))))
        np.testing.assert_allclose(
            read.array, random_array * (1 if slope != slope else slope), rtol=1e-6
        )

    @pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
    def test_fourth_dimension_of_one_is_dropped(self, tmp_path: Path, suffix: str):
        array = np.arange(24, dtype=np.int16).reshape(1, 2, 3, 4)
        path = tmp_path / f"v{suffix}"
        sitk.WriteImage(sitk.GetImageFromArray(array, isVector=False), str(path))
        np.testing.assert_array_equal(read_volume(path).array, array[0])

    def test_uncompressed_data_named_gz(self, nifti_with: Callable, random_array: np.ndarray):
        path = nifti_with()
        path = path.rename(path.with_suffix(".nii.gz"))
        np.testing.assert_array_equal(read_volume(path).array, random_array)

    @pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    def test_nifti_is_read_and_decompressed_once(self, tmp_path: Path, suffix: str):
        """After that, SimpleITK looks at the header alone, through buffers of a megabyte in all."""
        array = np.random.default_rng(0).integers(0, 60000, (40, 200, 200)).astype(np.uint16)
        path = tmp_path / f"v{suffix}"
        sitk.WriteImage(image_of(array), str(path), useCompression=True)

        def bytes_read() -> int:
            return int(Path("/proc/self/io").read_text().split()[1])

        before = bytes_read()
        read = read_volume(path)
        assert bytes_read() - before < 1.5 * path.stat().st_size
        np.testing.assert_array_equal(read.array, array)

    def test_nifti_voxels_are_not_those_of_a_namesake(self, nifti_with: Callable):
        nifti_with((352, "f", (1.0,)), name="v.nii")
        path = nifti_with((352, "f", (2.0,)), name="v.nii.gz")
        assert read_volume(path).array.flat[0] == 2

    @pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
    @pytest.mark.parametrize(
        "scaling", [(1, 0), (0, 5), (0.1, -1024.3), (float("nan"), 3), (-3, 0)]
    )
    def test_nifti_values_are_those_of_simpleitk(self, tmp_path: Path, dtype: str, scaling: tuple):
        array = np.random.default_rng(0).integers(0, 127, (2, 3, 4)).astype(dtype)
        path = tmp_path / "v.nii"
        sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
        data = bytearray(path.read_bytes())
        struct.pack_into("<2f", data, SLOPE, *scaling)
        path.write_bytes(data)
        expected = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        read = read_volume(path).array
        assert read.dtype == expected.dtype
        np.testing.assert_array_equal(read, expected)

    def test_upper_case_suffix(self, tmp_path: Path, nifti_with: Callable):
        path = nifti_with().rename(tmp_path / "SCAN.NII")
        assert read_volume(path).array.shape == (5, 6, 7)


class TestBadFiles:
    def refused(self, path: Path, kind: type[InputError], *words: str) -> InputError:
        with pytest.raises(kind) as caught:
            read_volume(path)
        assert type(caught.value) is kind
        assert str(path) in str(caught.value)
        for word in words:
            assert word in str(caught.value)
        return caught.value

    def test_missing(self, tmp_path: Path):
        self.refused(tmp_path / "none.nii.gz", VolumeError, "no such file")

    @pytest.mark.parametrize("name", ["scan.png", "scan.dcm", "scan"])
    def test_unknown_format(self, tmp_path: Path, name: str):
        (tmp_path / name).write_bytes(b"some bytes")
        self.refused(tmp_path / name, VolumeError, "unknown format", ".nii.gz", "DICOM")

    @pytest.mark.parametrize("suffix", [*FORMATS, ".mhd", ".nhdr"])
    @pytest.mark.parametrize("content", [b"", b"x" * 700])
    def test_garbage(self, tmp_path: Path, suffix: str, content: bytes, capfd):
        (tmp_path / f"v{suffix}").write_bytes(content)
        self.refused(tmp_path / f"v{suffix}", VolumeError)
        assert capfd.readouterr() == ("", "")

    def test_folder_without_dicom(self, tmp_path: Path):
        (tmp_path / "notes.txt").write_text("nothing here")
        self.refused(tmp_path, VolumeError, "without DICOM")

    @pytest.mark.parametrize("keep", [0.05, 0.5, 0.99])
    @pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha", ".nii.gz"])
    def test_truncated(self, tmp_path: Path, suffix: str, keep: float, capfd):
        array = np.random.default_rng(0).integers(0, 4000, (20, 30, 30)).astype(np.int16)
        path = tmp_path / f"v{suffix}"
        sitk.WriteImage(image_of(array), str(path), useCompression=True)
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
        self.refused(path, VolumeError)
        assert capfd.readouterr() == ("", "")

    def test_truncation_is_named_in_bytes(self, nifti_with: Callable):
        path = nifti_with()
        path.write_bytes(path.read_bytes()[:-8])
        self.refused(path, VolumeError, "1184 bytes", "promises 1192", "truncated")

    @pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
    def test_flipped_bit_in_compressed_data(self, tmp_path: Path, suffix: str):
        array = np.random.default_rng(0).integers(0, 60000, (20, 30, 30)).astype(np.uint16)
        path = tmp_path / f"v{suffix}"
        sitk.WriteImage(image_of(array), str(path), useCompression=True)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
        self.refused(path, VolumeError)

    def test_truncated_data_beside_an_mhd(self, tmp_path: Path, random_array: np.ndarray):
        sitk.WriteImage(image_of(random_array), str(tmp_path / "v.mhd"), useCompression=True)
        (data,) = tmp_path.glob("v.*raw")
        data.write_bytes(data.read_bytes()[:-20])
        self.refused(tmp_path / "v.mhd", VolumeError, "promises")
        data.unlink()
        self.refused(tmp_path / "v.mhd", VolumeError, data.name)

    @pytest.mark.parametrize("name", ["absurd.nii", "absurd.nii.gz"])
    def test_absurd_nifti_dimensions(self, nifti_with: Callable, name: str):
        path = nifti_with((DIM, "4h", (3, 32000, 32000, 32000)), name=name)
        self.refused(path, VolumeError, "promises 131072000000352")

    @pytest.mark.parametrize(("suffix", "old", "new"), [
        (".mha", b"DimSize = 7 6 5", b"DimSize = 3000 3000 3000"),
        (".nrrd", b"sizes: 7 6 5", b"sizes: 3000 3000 3000"),
    ])  # fmt: skip
    def test_absurd_dimensions(
        self, tmp_path: Path, random_array: np.ndarray, suffix: str, old: bytes, new: bytes
    ):
        path = tmp_path / f"v{suffix}"
        sitk.WriteImage(image_of(random_array), str(path), useCompression=True)
        path.write_bytes(path.read_bytes().replace(old, new))
        self.refused(path, VolumeError)

    @pytest.mark.parametrize("dim", [(3, 7, 6, 0), (3, 7, -6, 5), (0, 7, 6, 5), (9, 7, 6, 5)])
    def test_empty_or_impossible_dimensions(self, nifti_with: Callable, dim: tuple):
        self.refused(nifti_with((DIM, "4h", dim)), VolumeError)

    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    def test_data_before_the_header_ends(self, nifti_with: Callable, suffix: str):
        path = nifti_with((108, "f", (float("nan"),)), name="v" + suffix)
        self.refused(path, VolumeError, "vox_offset")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("suffix", FORMATS)
    def test_non_finite_voxel(
        self, tmp_path: Path, random_array: np.ndarray, suffix: str, value: float
    ):
        random_array[3, 2, 1] = value
        sitk.WriteImage(image_of(random_array), str(tmp_path / f"v{suffix}"))
        self.refused(tmp_path / f"v{suffix}", VolumeError, f"{value:g}", "(1, 2, 3)")

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("where", [0, -1])
    def test_non_finite_voxel_in_a_file_of_many_blocks(
        self, tmp_path: Path, dtype: type, where: int
    ):
        array = np.zeros((3, 1000, 1001), dtype)
        array.reshape(-1)[where] = np.nan
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / "v.nii"))
        z, y, x = np.unravel_index(where % array.size, array.shape)
        self.refused(tmp_path / "v.nii", VolumeError, f"({x}, {y}, {z})")

    def test_float64_beyond_float32(self, tmp_path: Path):
        array = np.zeros((2, 3, 4))
        array[1, 2, 3] = 1e300
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / "v.nii"))
        self.refused(tmp_path / "v.nii", VolumeError, "1e+300", "(3, 2, 1)")

    @pytest.mark.parametrize("slope", [float("inf"), 3e38])
    def test_slope_that_makes_voxels_infinite(self, nifti_with: Callable, slope: float):
        self.refused(nifti_with((SLOPE, "f", (slope,))), VolumeError, "inf")

    def test_infinite_intercept(self, nifti_with: Callable):
        self.refused(nifti_with((INTER, "f", (float("-inf"),))), VolumeError, "scl_inter -inf")

    @pytest.mark.parametrize("size", [float("nan"), float("inf"), 0.0, -0.7])
    def test_bad_pixdim(self, nifti_with: Callable, size: float, capfd):
        path = nifti_with((PIXDIM, "f", (size,)))
        self.refused(path, GeometryError, "voxel size", f"{size:g}")
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("size", ["nan", "0", "-2"])
    def test_bad_metaimage_spacing(self, tmp_path: Path, random_array: np.ndarray, size: str):
        path = tmp_path / "v.mha"
        sitk.WriteImage(image_of(random_array), str(path))
        head, tail = path.read_bytes().split(b"ElementSpacing = ")
        path.write_bytes(head + f"ElementSpacing = {size} ".encode() + tail.split(b" ", 1)[1])
        self.refused(path, GeometryError, "ElementSpacing")

    @pytest.mark.parametrize(("old", "new", "words"), [
        (b"NDims = 3", b"NDims = 73", "NDims = 73"),
        (b"DimSize = 7 6 5", b"DimSize = 7 6", "DimSize = 7 6"),
        (b"DimSize = 7 6 5", b"DimSize = 7 0 5", "DimSize = 7 0 5"),
        (b"DimSize = 7 6 5", b"DimSize = 7 6 50", "promises"),
        (b"MET_FLOAT", b"MET_STRANGE", "ElementType"),
        (b"Offset = -11.5", b"Offset = left", "Offset"),
    ])  # fmt: skip
    def test_damaged_metaimage_header(
        self, tmp_path: Path, random_array: np.ndarray, old: bytes, new: bytes, words: str
    ):
        path = tmp_path / "v.mha"
        sitk.WriteImage(image_of(random_array), str(path), useCompression=True)
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new))
        self.refused(path, VolumeError, words)

    @settings(
        max_examples=60,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(st.data())
    def test_any_damaged_byte_is_refused_or_harmless(
        self, tmp_path: Path, random_array: np.ndarray, data: st.DataObject
    ):
        suffix = data.draw(st.sampled_from(FORMATS))
        path = tmp_path / f"v{suffix}"
        sitk.WriteImage(image_of(random_array), str(path), useCompression=True)
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, min(len(content), 400) - 1))
        content[place] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        try:
            volume = read_volume(path)
        except InputError:
            return
        assert volume.array.ndim == 3
        assert np.isfinite(volume.array).all()

    def test_nan_metaimage_offset(self, tmp_path: Path, random_array: np.ndarray):
        path = tmp_path / "v.mha"
        sitk.WriteImage(image_of(random_array), str(path))
        path.write_bytes(path.read_bytes().replace(b"Offset = -11.5", b"Offset = nan"))
        self.refused(path, GeometryError, "Offset")

    def test_zero_nrrd_spacing(self, tmp_path: Path, random_array: np.ndarray):
        path = tmp_path / "v.nrrd"
        sitk.WriteImage(sitk.GetImageFromArray(random_array), str(path))
        path.write_bytes(path.read_bytes().replace(b"(1,0,0)", b"(0,0,0)"))
        self.refused(path, GeometryError, "spacing")

    @pytest.mark.parametrize("offset", [QUATERN, SROW])
    def test_non_finite_transform(self, nifti_with: Callable, offset: int, capfd):
        path = nifti_with((offset, "f", (float("nan"),)))
        self.refused(path, GeometryError, "qform or sform")
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("qform_code", [0, 1])
    def test_sheared_sform(self, nifti_with: Callable, qform_code: int):
        sheared = 0.7, 0.24, 0, 0, 0, 0.8 * 0.9539, 0, 0, 0, 0, 2.5, 0
        path = nifti_with((QFORM_CODE, "h", (qform_code,)), (SROW, "12f", sheared))
        self.refused(path, GeometryError, "sheared")

    def test_sform_of_another_voxel_size(self, nifti_with: Callable):
        path = nifti_with((SROW, "12f", (7, 0, 0, 0, 0, 0.8, 0, 0, 0, 0, 2.5, 0)))
        self.refused(path, GeometryError, "7, 0.8, 2.5", "0.7, 0.8, 2.5")

    @pytest.mark.parametrize(("suffix", "old", "new"), [
        (".mha", b"TransformMatrix = 1 0 0 0 1 0", b"TransformMatrix = 1 0 0 0.3 1 0"),
        (".nrrd", b"(1,0,0) (0,1,0)", b"(1,0,0) (0.3,1,0)"),
    ])  # fmt: skip
    def test_sheared_direction(
        self, tmp_path: Path, random_array: np.ndarray, suffix: str, old: bytes, new: bytes
    ):
        path = tmp_path / f"v{suffix}"
        sitk.WriteImage(sitk.GetImageFromArray(random_array), str(path))
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new))
        self.refused(path, GeometryError, "sheared")

    @pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
    @pytest.mark.parametrize("shape", [(4, 5, 6, 7), (5, 6)])
    def test_other_dimensions_than_three(self, tmp_path: Path, suffix: str, shape: tuple):
        path = tmp_path / f"v{suffix}"
        array = np.zeros(shape, np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(array, isVector=False), str(path))
        self.refused(path, VolumeError, f"{len(shape)}-D", "3-D")

    @pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
    @pytest.mark.parametrize(("dtype", "channels"), [(np.uint8, 3), (np.float32, 2)])
    def test_vector_pixels(self, tmp_path: Path, suffix: str, dtype: type, channels: int):
        path = tmp_path / f"v{suffix}"
        array = np.zeros((4, 5, 6, channels), dtype)
        sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), str(path))
        self.refused(path, VolumeError)

    def test_nifti2(self, tmp_path: Path):
        (tmp_path / "two.nii").write_bytes(struct.pack("<i", 540) + b"n+2\0\r\n\x1a\n" + bytes(600))
        self.refused(tmp_path / "two.nii", VolumeError, "NIfTI-2")

    def test_complex_voxels(self, tmp_path: Path):
        image = sitk.GetImageFromArray(np.zeros((2, 3, 4), np.complex64))
        for suffix in (".nii", ".mha"):
            path = tmp_path / f"v{suffix}"
            try:
                sitk.WriteImage(image, str(path))
            except RuntimeError:
                continue
            self.refused(path, VolumeError)


class TestLabels:
    def label_file(self, tmp_path: Path, array: np.ndarray) -> Path:
        sitk.WriteImage(image_of(array), str(tmp_path / "label.nii.gz"))
        return tmp_path / "label.nii.gz"

    @pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, np.float64, np.int64])
    @pytest.mark.parametrize(("high", "stored"), [(100, np.uint8), (300, np.uint16)])
    def test_integers(self, tmp_path: Path, dtype: type, high: int, stored: type):
        array = np.random.default_rng(1).integers(0, 7, (4, 5, 6))
        array[0, 0, 0] = min(high, np.iinfo(dtype).max) if np.dtype(dtype).kind in "iu" else high
        expected = np.uint8 if array.max() <= 255 else stored
        label = read_label(self.label_file(tmp_path, array.astype(dtype)))
        assert label.array.dtype == expected
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

    def test_present_labels(self):
        array = np.zeros((3, 4, 5), np.uint16)
        array[0, 0, :3] = 4, 300, 2
        assert check_labels(Volume(array)) == [2, 4, 300]
        assert check_labels(Volume(array), {2: "a", 4: "b", 300: "c", 5: "d"}) == [2, 4, 300]

    def test_unknown_labels(self):
        array = np.array([0, 1, 7, 9], np.uint8).reshape(1, 2, 2)
        with pytest.raises(LabelError, match=r"unknown labels 7, 9.*1 liver"):
            check_labels(Volume(array), {1: "liver"})

    def test_empty_mask(self):
        empty = Volume(np.zeros((2, 2, 2), np.uint8))
        with pytest.raises(LabelError, match="empty"):
            check_labels(empty)
        assert check_labels(empty, needed=False) == []


class TestSameGrid:
    def test_header_rounding_is_forgiven(self):
        a = Volume(np.zeros((50, 60, 70)), (0.7, 0.7, 2), (-200.123456, 10, 0))
        b = Volume(np.ones((50, 60, 70)), (0.7000001, 0.7, 2), (-200.1235, 10, 0))
        check_same_grid(a, b)

    @pytest.mark.parametrize("other", [
        Volume(np.zeros((4, 5, 7))), Volume(np.zeros((4, 5, 6)), spacing=(1, 1, 1.1)),
        Volume(np.zeros((4, 5, 6)), origin=(0, 0.5, 0)),
        Volume(np.zeros((4, 5, 6)), direction=(1, 0, 0, 0, -1, 0, 0, 0, 1)),
        Volume(np.zeros((4, 5, 6)), origin=(float("nan"), 0, 0)),
    ])  # fmt: skip
    def test_other_grids(self, other: Volume):
        with pytest.raises(GeometryError):
            check_same_grid(Volume(np.zeros((4, 5, 6))), other)


class TestWriting:
    @pytest.fixture
    def like(self) -> Volume:
        turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, -1]])
        return Volume(
            np.zeros((4, 5, 6), np.int16),
            (0.71, 0.83, 2.5),
            (-123.4375, 17.25, 1009.5),
            tuple(turn.ravel()),
        )

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
        assert image.GetNumberOfComponentsPerPixel() == 3
        assert image.GetDimension() == 3
        stored = np.moveaxis(sitk.GetArrayFromImage(image), -1, 0)
        np.testing.assert_array_equal(stored, array.astype(np.float32))
        np.testing.assert_allclose(image.GetOrigin(), like.origin, rtol=1e-6)

    @pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nii"])
    def test_no_patient_metadata(self, tmp_path: Path, suffix: str):
        image = sitk.GetImageFromArray(np.ones((1, 8, 9), np.int16))
        for tag, value in {
            "0008|0060": "CT",
            "0010|0010": "DOE^JANE",
            "0010|0030": "19700101",
            "0020|0032": "0\\0\\0",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0018|0050": "3",
        }.items():
            image.SetMetaData(tag, value)
        (tmp_path / "series").mkdir()
        sitk.WriteImage(image, str(tmp_path / "series" / "slice.dcm"))
        scan = read_volume(tmp_path / "series")
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

    @pytest.mark.parametrize("suffix", FORMATS)
    def test_failing_writer_keeps_the_old_file(
        self, tmp_path: Path, like: Volume, suffix: str, monkeypatch: pytest.MonkeyPatch
    ):
        path = tmp_path / f"a{suffix}"
        write_volume(path, like.array, like)
        old = path.read_bytes()

        def fail(image: sitk.Image, name: str, **options: bool) -> None:
            Path(name).write_bytes(old[: len(old) // 2])
            raise RuntimeError("sitk::ERROR: no space left")

        monkeypatch.setattr(sitk, "WriteImage", fail)
        with pytest.raises(OutputError, match="no space left"):
            write_volume(path, like.array + 1, like)
        assert path.read_bytes() == old
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("suffix", FORMATS)
    def test_full_disk_keeps_the_old_file(self, tmp_path: Path, suffix: str, capfd):
        """A file-size limit stands for a full disk: the native writer's write fails midway."""
        array = np.random.default_rng(0).integers(0, 60000, (20, 100, 100))
        path = tmp_path / f"a{suffix}"
        write_volume(path, np.zeros_like(array), Volume(array))
        old = path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(OutputError, match="nothing was overwritten"):
                write_volume(path, array, Volume(array))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == old
        assert list(tmp_path.iterdir()) == [path]
        assert capfd.readouterr() == ("", "")


@pytest.mark.data
def test_real_volumes_and_their_labels(test_data: Path):
    for folder in ("ixi_brain_mr", "openkbp_hn_ct", "msd_hippocampus_mr"):
        for path in sorted((test_data / folder / "images").iterdir())[:4]:
            scan = read_volume(path)
            label = read_label(test_data / folder / "labels" / path.name)
            check_same_grid(scan, label)
            assert check_labels(label)
