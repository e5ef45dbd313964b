# SPDX-License-Identifier: Apache-2.0
"""Reading NIfTI, NRRD and MetaImage; every kind of bad file is written here and must be refused."""

from __future__ import annotations

import gzip
import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.volumes import ARRAY, refused

from fastproto.data import read_volume
from fastproto.errors import GeometryError, InputError, ResourceError, VolumeError

FORMATS = [".nii.gz", ".nii", ".nrrd", ".mha"]
LARGE = np.random.default_rng(0).integers(0, 60000, (40, 200, 200)).astype(np.uint16)
NAN, INF = float("nan"), float("inf")


def write(path: Path, array: np.ndarray, **kwargs: bool) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(array, **kwargs), str(path), useCompression=True)
    return path


class TestGoodFiles:
    @pytest.mark.parametrize("suffix", [*FORMATS, ".mhd", ".nhdr"])
    def test_array_and_geometry(self, tmp_path: Path, suffix: str):
        path = tmp_path / f"v{suffix}"
        image = sitk.GetImageFromArray(ARRAY)
        image.SetSpacing((0.7, 0.8, 2.5))
        image.SetOrigin((-11.5, 7.25, 130.0))
        image.SetDirection((0, 0, -1, 1, 0, 0, 0, -1, 0))
        sitk.WriteImage(image, str(path), useCompression=True)
        read = read_volume(path)
        np.testing.assert_array_equal(read.array, ARRAY)
        np.testing.assert_allclose(read.spacing, (0.7, 0.8, 2.5), rtol=1e-6)
        np.testing.assert_allclose(read.origin, (-11.5, 7.25, 130.0), rtol=1e-6)
        np.testing.assert_allclose(read.direction, (0, 0, -1, 1, 0, 0, 0, -1, 0), atol=1e-6)
        assert read.path == path

    @pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
    def test_fourth_dimension_of_one_is_dropped(self, tmp_path: Path, suffix: str):
        array = np.arange(24, dtype=np.int16).reshape(1, 2, 3, 4)
        path = write(tmp_path / f"v{suffix}", array, isVector=False)
        np.testing.assert_array_equal(read_volume(path).array, array[0])

    @pytest.mark.parametrize("suffix", FORMATS)
    @pytest.mark.parametrize("scaled", [False, True])
    def test_memory_of_one_volume_is_enough(self, tmp_path: Path, suffix: str, scaled: bool):
        """The array, and some MB: neither the file's bytes nor unscaled voxels lie beside it."""
        array = np.zeros((40, 600, 600), np.int16)
        path = write(tmp_path / f"v{suffix}", array)
        if scaled and suffix != ".nrrd":
            content = path.read_bytes()
            content = gzip.decompress(content) if suffix == ".nii.gz" else content
            slope = np.array([2, 1], "<f4").tobytes()
            function = b"ElementToIntensityFunctionOffset = 1\nElementDataFile"
            content = (
                content.replace(b"ElementDataFile", function)
                if suffix == ".mha"
                else content[:112] + slope + content[120:]
            )
            path.write_bytes(content)
        tracemalloc.start()
        try:
            volume = read_volume(path)
            assert tracemalloc.get_traced_memory()[1] < volume.array.nbytes + 24e6
        finally:
            tracemalloc.stop()


class TestBadFiles:
    def test_missing(self, tmp_path: Path):
        refused(tmp_path / "none.nii.gz", VolumeError, "no such file")

    @pytest.mark.parametrize("name", ["scan.png", "scan.dcm", "scan"])
    def test_unknown_format(self, tmp_path: Path, name: str):
        (tmp_path / name).write_bytes(b"some bytes")
        refused(tmp_path / name, VolumeError, "unknown format", ".nii.gz", "DICOM")

    @pytest.mark.parametrize(("name", "word"), [
        ("scan.hdr", "Analyze"), ("scan.img", "Analyze"), ("SCAN.IMG.GZ", "Analyze"),
        ("orig.mgz", "mri_convert"), ("orig.mgh", "mri_convert"),
    ])  # fmt: skip
    def test_formats_to_convert(self, tmp_path: Path, name: str, word: str):
        (tmp_path / name).write_bytes(b"some bytes")
        refused(tmp_path / name, VolumeError, "unknown format", word, ".nii.gz")

    @pytest.mark.parametrize("suffix", [*FORMATS, ".mhd", ".nhdr"])
    @pytest.mark.parametrize(("content", "words"), [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
         ("a Git LFS pointer", "git lfs pull")),
        (b"/annex/objects/SHA256E-s12345--4d7a.nii.gz\n", ("git-annex pointer", "annex get")),
    ])  # fmt: skip
    def test_pointers_to_content(self, tmp_path: Path, suffix: str, content: bytes, words: tuple):
        (tmp_path / f"v{suffix}").write_bytes(content)
        refused(tmp_path / f"v{suffix}", VolumeError, *words)

    def test_pointer_in_place_of_the_data(self, tmp_path: Path):
        path = write(tmp_path / "v.mhd", ARRAY)
        (tmp_path / "v.zraw").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(VolumeError, match="git lfs pull") as caught:
            read_volume(path)
        assert caught.value.subject == str(tmp_path / "v.zraw")

    @pytest.mark.parametrize(("size", "word"), [
        (1e-4, "metres"), (0.009, "metres"), (100.1, "micrometres"), (700, "micrometres"),
    ])  # fmt: skip
    @pytest.mark.parametrize("suffix", FORMATS)
    def test_implausible_voxel_sizes(self, tmp_path: Path, suffix: str, size: float, word: str):
        image = sitk.GetImageFromArray(ARRAY)
        image.SetSpacing((1, 1, size))
        sitk.WriteImage(image, str(tmp_path / f"v{suffix}"))
        words = "voxels of 0.01 to 100 mm", f"probably in {word}"
        refused(tmp_path / f"v{suffix}", GeometryError, *words)

    @pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for the memory")
    @pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
    def test_more_than_memory_holds(self, tmp_path: Path, suffix: str):
        path = write(tmp_path / f"v{suffix}", np.zeros((500, 1000, 1000), np.uint8))
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 250_000_000, hard))
        try:
            with pytest.raises(ResourceError, match="too little memory: 500 MB") as caught:
                read_volume(path)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        assert "export" not in str(caught.value)

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
        promised = f"promises {LARGE[:20, :30, :30].nbytes}" if suffix == ".nii" else ""
        refused(path, VolumeError, "truncated", promised)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
    def test_flipped_bits_in_compressed_data(self, tmp_path: Path, suffix: str):
        path = write(tmp_path / f"v{suffix}", LARGE[:20, :30, :30])
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
        refused(path, VolumeError)

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
