# SPDX-License-Identifier: Apache-2.0
"""Reading NIfTI, NRRD and MetaImage; every kind of bad file is written here and must be refused."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastproto.data import read_volume
from fastproto.errors import GeometryError, InputError, VolumeError

FORMATS = [".nii.gz", ".nii", ".nrrd", ".mha"]
ARRAY = np.random.default_rng(0).normal(100, 30, (5, 6, 7)).astype(np.float32)
LARGE = np.random.default_rng(0).integers(0, 60000, (40, 200, 200)).astype(np.uint16)
DIM, PIXDIM, OFFSET, SLOPE, INTER = 40, 80, 108, 112, 116
FORM_CODES, QUATERN, SROW = 252, 256, 280
SHEARED = 0.7, 0.24, 0, 0, 0, 0.8 * 0.9539, 0, 0, 0, 0, 2.5, 0
NAN, INF = float("nan"), float("inf")


def write(path: Path, array: np.ndarray, **kwargs: bool) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(array, **kwargs), str(path), useCompression=True)
    return path


def patched_nifti(path: Path, *patches: tuple[int, str, tuple]) -> Path:
    """A good file, turned and anisotropic, but for these bytes; compressed as its name says."""
    image = sitk.GetImageFromArray(ARRAY)
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((-11.5, 7.25, 130.0))
    image.SetDirection((0, 0, -1, 1, 0, 0, 0, -1, 0))
    good = path.with_name("good.nii")
    sitk.WriteImage(image, str(good))
    data = bytearray(good.read_bytes())
    for offset, code, values in patches:
        struct.pack_into("<" + code, data, offset, *values)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def refused(path: Path, kind: type[InputError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        read_volume(path)
    assert type(caught.value) is kind
    for word in (str(path), *words):
        assert word in str(caught.value)


class TestGoodFiles:
    @pytest.mark.parametrize("suffix", [*FORMATS, ".mhd", ".nhdr"])
    def test_array_and_geometry(self, tmp_path: Path, suffix: str):
        path = tmp_path / f"v{suffix}"
        image = sitk.ReadImage(str(patched_nifti(tmp_path / "source.nii")))
        sitk.WriteImage(image, str(path), useCompression=True)
        read = read_volume(path)
        np.testing.assert_array_equal(read.array, ARRAY)
        np.testing.assert_allclose(read.spacing, (0.7, 0.8, 2.5), rtol=1e-6)
        np.testing.assert_allclose(read.origin, (-11.5, 7.25, 130.0), rtol=1e-6)
        np.testing.assert_allclose(read.direction, (0, 0, -1, 1, 0, 0, 0, -1, 0), atol=1e-6)
        assert read.path == path

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

    @pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
    def test_fourth_dimension_of_one_is_dropped(self, tmp_path: Path, suffix: str):
        array = np.arange(24, dtype=np.int16).reshape(1, 2, 3, 4)
        path = write(tmp_path / f"v{suffix}", array, isVector=False)
        np.testing.assert_array_equal(read_volume(path).array, array[0])

    @pytest.mark.parametrize("name", ["uncompressed.nii.gz", "SCAN.NII"])
    def test_nifti_under_unusual_names(self, tmp_path: Path, name: str):
        path = patched_nifti(tmp_path / "v.nii").rename(tmp_path / name)
        np.testing.assert_array_equal(read_volume(path).array, ARRAY)

    @pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    def test_nifti_is_read_and_decompressed_once(self, tmp_path: Path, suffix: str):
        """After that, SimpleITK looks at the header alone, through buffers of a megabyte in all."""
        path = write(tmp_path / f"v{suffix}", LARGE)

        def bytes_read() -> int:
            return int(Path("/proc/self/io").read_text().split()[1])

        before = bytes_read()
        read = read_volume(path)
        assert bytes_read() - before < 1.5 * path.stat().st_size
        np.testing.assert_array_equal(read.array, LARGE)

    def test_nifti_voxels_are_not_those_of_a_namesake(self, tmp_path: Path):
        patched_nifti(tmp_path / "v.nii", (352, "f", (1.0,)))
        path = patched_nifti(tmp_path / "v.nii.gz", (352, "f", (2.0,)))
        assert read_volume(path).array.flat[0] == 2

    @pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
    @pytest.mark.parametrize("scaling", [(1, 0), (0, 5), (0.1, -1024.3), (NAN, 3), (-3, 0)])
    def test_nifti_values_are_those_of_simpleitk(self, tmp_path: Path, dtype: str, scaling: tuple):
        array = np.random.default_rng(0).integers(0, 127, (2, 3, 4)).astype(dtype)
        path = write(tmp_path / "v.nii", array)
        data = bytearray(path.read_bytes())
        struct.pack_into("<2f", data, SLOPE, *scaling)
        path.write_bytes(data)
        expected = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        read = read_volume(path).array
        assert read.dtype == expected.dtype
        np.testing.assert_array_equal(read, expected)


class TestBadFiles:
    def test_missing(self, tmp_path: Path):
        refused(tmp_path / "none.nii.gz", VolumeError, "no such file")

    @pytest.mark.parametrize("name", ["scan.png", "scan.dcm", "scan"])
    def test_unknown_format(self, tmp_path: Path, name: str):
        (tmp_path / name).write_bytes(b"some bytes")
        refused(tmp_path / name, VolumeError, "unknown format", ".nii.gz", "DICOM")

    @pytest.mark.parametrize("suffix", [*FORMATS, ".mhd", ".nhdr"])
    @pytest.mark.parametrize("content", [b"", b"x" * 700])
    def test_garbage(self, tmp_path: Path, suffix: str, content: bytes, capfd):
        (tmp_path / f"v{suffix}").write_bytes(content)
        refused(tmp_path / f"v{suffix}", VolumeError)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("keep", [0.05, 0.5, 0.99])
    @pytest.mark.parametrize("suffix", FORMATS)
    def test_truncated(self, tmp_path: Path, suffix: str, keep: float, capfd):
        path = write(tmp_path / f"v{suffix}", LARGE[:20, :30, :30])
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[: int(keep * size)])
        in_bytes = f"found {int(keep * size)} bytes of data where the header promises {size}"
        refused(path, VolumeError, "truncated", *[in_bytes] * (suffix == ".nii"))
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
    def test_flipped_bits_in_compressed_data(self, tmp_path: Path, suffix: str):
        path = write(tmp_path / f"v{suffix}", LARGE[:20, :30, :30])
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
        refused(path, VolumeError)

    def test_truncated_data_beside_an_mhd(self, tmp_path: Path):
        path = write(tmp_path / "v.mhd", ARRAY)
        (data,) = tmp_path.glob("v.*raw")
        data.write_bytes(data.read_bytes()[:-20])
        refused(path, VolumeError, "promises")
        data.unlink()
        refused(path, VolumeError, data.name)

    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    @pytest.mark.parametrize(("patch", "kind", "words"), [
        ((0, "i", (540,)), VolumeError, "NIfTI-2"),
        ((DIM, "4h", (3, 32000, 32000, 32000)), VolumeError, "promises 131072000000352"),
        *(((DIM, "4h", dim), VolumeError, "")
          for dim in [(3, 7, 6, 0), (3, 7, -6, 5), (0, 7, 6, 5), (9, 7, 6, 5)]),
        ((OFFSET, "f", (NAN,)), VolumeError, "vox_offset"),
        ((SLOPE, "f", (INF,)), VolumeError, "scl_slope inf"),
        ((SLOPE, "f", (3e38,)), VolumeError, "a voxel of inf"),
        ((INTER, "f", (-INF,)), VolumeError, "scl_inter -inf"),
        *(((PIXDIM, "f", (size,)), GeometryError, f"voxel size (pixdim) {size:g}")
          for size in (NAN, INF, 0.0, -0.7)),
        ((QUATERN, "f", (NAN,)), GeometryError, "qform"),
        ((SROW, "f", (NAN,)), GeometryError, "sform"),
        ((SROW, "12f", SHEARED), GeometryError, "sheared"),
        ((FORM_CODES, "2h6f12f", (0, 2, *[0] * 6, *SHEARED)), GeometryError, "sheared"),
        ((SROW, "12f", (7, 0, 0, 0, 0, 0.8, 0, 0, 0, 0, 2.5, 0)),
         GeometryError, "7, 0.8, 2.5; allowed: the voxel size of the header, 0.7, 0.8, 2.5"),
    ])  # fmt: skip
    def test_damaged_nifti_header(
        self, tmp_path: Path, suffix: str, patch: tuple, kind: type[InputError], words: str, capfd
    ):
        refused(patched_nifti(tmp_path / f"v{suffix}", patch), kind, words)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(("suffix", "old", "new", "kind", "words"), [
        (".mha", b"NDims = 3", b"NDims = 73", VolumeError, "NDims = 73"),
        (".mha", b"DimSize = 7 6 5", b"DimSize = 7 6", VolumeError, "DimSize = 7 6"),
        (".mha", b"DimSize = 7 6 5", b"DimSize = 7 0 5", VolumeError, "DimSize = 7 0 5"),
        (".mha", b"DimSize = 7 6 5", b"DimSize = 7 6 50", VolumeError, "promises"),
        (".mha", b"DimSize = 7 6 5", b"DimSize = 3000 3000 3000", VolumeError, "promises"),
        (".mha", b"MET_FLOAT", b"MET_STRANGE", VolumeError, "ElementType"),
        (".mha", b"Offset = 0", b"Offset = left", VolumeError, "Offset"),
        (".mha", b"Offset = 0", b"Offset = nan", GeometryError, "Offset"),
        (".mha", b"ElementSpacing = 1", b"ElementSpacing = nan", GeometryError, "ElementSpacing"),
        (".mha", b"ElementSpacing = 1", b"ElementSpacing = 0", GeometryError, "ElementSpacing"),
        (".mha", b"ElementSpacing = 1", b"ElementSpacing = -2", GeometryError, "ElementSpacing"),
        (".mha", b"Matrix = 1 0 0 0", b"Matrix = 1 0 0 0.3", GeometryError, "sheared"),
        (".nrrd", b"sizes: 7 6 5", b"sizes: 3000 3000 3000", VolumeError, ""),
        (".nrrd", b"(1,0,0)", b"(0,0,0)", GeometryError, "spacing"),
        (".nrrd", b"(1,0,0) (0,1,0)", b"(1,0,0) (0.3,1,0)", GeometryError, "sheared"),
    ])  # fmt: skip
    def test_damaged_text_header(
        self, tmp_path: Path, suffix: str, old: bytes, new: bytes, kind: type, words: str
    ):
        path = write(tmp_path / f"v{suffix}", ARRAY)
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new))
        refused(path, kind, words)

    @pytest.mark.parametrize(("suffix", "dtype", "shape", "where", "value"), [
        *((suffix, "f4", (5, 6, 7), 139, value)
          for suffix in FORMATS for value in (NAN, INF, -INF)),
        # Files of many blocks, then what only float64 holds.
        *((".nii", dtype, (3, 1000, 1001), where, NAN)
          for dtype in ("f4", "f8") for where in (0, 3003000 - 1)),
        (".nii", "f8", (2, 3, 4), 23, 1e300),
    ])  # fmt: skip
    def test_voxel_that_is_not_finite_in_float32(
        self, tmp_path: Path, suffix: str, dtype: str, shape: tuple, where: int, value: float
    ):
        array = np.zeros(shape, dtype)
        array.flat[where] = value
        z, y, x = map(int, np.unravel_index(where, shape))
        path = write(tmp_path / f"v{suffix}", array)
        refused(path, VolumeError, f"{value:g}", f"(x, y, z) = ({x}, {y}, {z})")

    @pytest.mark.parametrize(("suffix", "shape", "dtype", "vector", "words"), [
        *((suffix, *image) for suffix in (".nii.gz", ".nrrd", ".mha") for image in [
            ((4, 5, 6, 7), "i2", False, ("4-D", "3-D")), ((5, 6), "i2", False, ("2-D", "3-D")),
            ((4, 5, 6, 3), "u1", True, ()), ((4, 5, 6, 2), "f4", True, ()),
        ]),
        *((suffix, (2, 3, 4), "c8", False, ()) for suffix in (".nii", ".mha")),
    ])  # fmt: skip
    def test_no_scalar_volume(
        self, tmp_path: Path, suffix: str, shape: tuple, dtype: str, vector: bool, words: tuple
    ):
        path = write(tmp_path / f"v{suffix}", np.zeros(shape, dtype), isVector=vector)
        refused(path, VolumeError, *words)

    @settings(
        max_examples=60,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(st.data())
    def test_any_damaged_byte_is_refused_or_harmless(self, tmp_path: Path, data: st.DataObject):
        path = write(tmp_path / f"v{data.draw(st.sampled_from(FORMATS))}", ARRAY)
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
