# SPDX-License-Identifier: Apache-2.0
"""NIfTI: voxels and place as nibabel has them, and both forms in what is written."""

from __future__ import annotations

import gzip
import warnings
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from support.volumes import ARRAY, SHORTS, affine_of, nifti_bytes, refused, write_nifti

from fastproto.data import Volume, read_volume, write_volume
from fastproto.errors import FastprotoWarning, GeometryError, VolumeError

NAN, INF = float("nan"), float("inf")
TURN = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1.0]])
SIZES = (0.7, 0.8, 2.5)


def sform(rotation: np.ndarray, place: tuple = (-11.5, 7.25, 130), sizes: tuple = SIZES) -> dict:
    rows = np.column_stack([rotation * sizes, place])
    return dict(zip(("srow_x", "srow_y", "srow_z"), rows, strict=True)) | {"sform_code": 2}


def qform(b: float, c: float, d: float, place: tuple = (-11.5, 7.25, 130), qfac: int = 1) -> dict:
    names = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
    values = dict(zip(names, (b, c, d, *place), strict=True))
    return values | {"qform_code": 1, "pixdim": [qfac, *SIZES, 0, 0, 0, 0]}


# The half of the angle of TURN has the sine 0.3162.
Q_TURN = qform(0, 0, np.sqrt(0.1))
FORMS = {
    "sform": sform(TURN),
    "sform, mirrored": sform(TURN * (1, 1, -1)),
    "qform": Q_TURN,
    "qform, mirrored": qform(0, 0, np.sqrt(0.1), qfac=-1),
    "qform of half a turn": qform(0.6, 0, 0.8),
    "qform of nearly half a turn": qform(0.6, 0, 0.79999985),
    "both": Q_TURN | sform(TURN),
    "neither": {},
    "both, one apart": qform(0, 0, 1, (57, 51, -48)) | sform(TURN),
    "qform without code": Q_TURN | sform(np.eye(3)) | {"qform_code": 0},
    "sform without code": Q_TURN | sform(np.eye(3)) | {"sform_code": 0},
}


@pytest.fixture(params=FORMS)
def placed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_nifti(tmp_path / "placed.nii.gz", SHORTS, **FORMS[request.param])


def forms(path: Path) -> list:
    header = nibabel.load(path).header
    names = ["qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "pixdim", "xyzt_units"]
    names += ["quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"]
    return [header[name].tolist() for name in names]


@pytest.mark.filterwarnings("ignore::fastproto.errors.FastprotoWarning")
class TestPlace:
    def test_is_that_of_nibabel(self, placed: Path):
        expected = nibabel.load(placed).affine
        np.testing.assert_allclose(affine_of(read_volume(placed)), expected, atol=2e-5)

    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    def test_a_result_has_both_forms_as_they_were(self, placed: Path, suffix: str):
        scan = read_volume(placed)
        result = placed.with_name(f"result{suffix}")
        write_volume(result, scan.array > 0, like=replace(scan, array=scan.array > 0))
        assert forms(result) == forms(placed)
        image, label = (sitk.ReadImage(str(path)) for path in (placed, result))
        assert image.GetOrigin() == label.GetOrigin()
        assert image.GetDirection() == label.GetDirection()
        again = read_volume(result)
        assert (again.spacing, again.origin) == (scan.spacing, scan.origin)

    def test_a_result_on_another_grid_has_forms_of_its_own(self, placed: Path):
        other = replace(read_volume(placed), spacing=(1.0, 2.0, 3.0), origin=(4.0, 5.0, 6.0))
        path = placed.with_name("result.nii")
        write_volume(path, other.array, like=other)
        np.testing.assert_allclose(nibabel.load(path).affine, affine_of(other), atol=1e-6)

    def test_a_big_endian_file(self, tmp_path: Path):
        good = nibabel.Nifti1Image(SHORTS.T, np.diag([-0.5, -1.5, 2, 1]))
        header = good.header.as_byteswapped(">")
        path, result = tmp_path / "big.nii", tmp_path / "result.nii"
        nibabel.Nifti1Image(SHORTS.T.astype(">i2"), good.affine, header).to_filename(path)
        assert path.read_bytes()[:4] == b"\0\0\1\x5c"
        read = read_volume(path)
        np.testing.assert_array_equal(read.array, SHORTS)
        np.testing.assert_allclose(affine_of(read), good.affine)
        write_volume(result, read.array, like=read)
        assert forms(result) == forms(path)

    def test_written_without_a_nifti_file(self, tmp_path: Path):
        """By both forms, for nibabel and for SimpleITK, mirrored or not."""
        path = tmp_path / "v.nii.gz"
        for sign in (1, -1):
            direction = tuple((TURN @ [[0, 0, 1], [sign, 0, 0], [0, -1, 0]]).ravel())
            like = Volume(SHORTS, SIZES, (-11.5, 7.25, 130.0), direction)
            write_volume(path, SHORTS, like)
            header = nibabel.load(path).header
            assert (header["qform_code"], header["sform_code"]) == (1, 1)
            assert header.get_xyzt_units()[0] == "mm"
            for affine in (header.get_qform(), header.get_sform(), affine_of(read_volume(path))):
                np.testing.assert_allclose(affine, affine_of(like), atol=2e-5)
            image = sitk.ReadImage(str(path))
            np.testing.assert_allclose(image.GetDirection(), direction, atol=1e-6)
            np.testing.assert_allclose(image.GetSpacing(), SIZES, atol=1e-6)
            np.testing.assert_allclose(image.GetOrigin(), like.origin, atol=1e-6)

    def test_a_quaternion_longer_than_1_by_rounding(self, tmp_path: Path):
        """As (0.6, 0, 0.8): half a turn. nibabel refuses it, ITK does not."""
        path = write_nifti(tmp_path / "v.nii", SHORTS, **qform(0.6003, 0, 0.8004))
        axes = affine_of(read_volume(path))[:3, :3] / SIZES
        expected = [[-0.28, 0, 0.96], [0, -1, 0], [0.96, 0, 0.28]]
        np.testing.assert_allclose(axes, expected, atol=1e-6)

    @pytest.mark.parametrize("shear", [1e-5, 3e-4, 9e-4])
    def test_sheared_by_rounding(self, tmp_path: Path, shear: float):
        """ITK refuses such axes, or takes the qform, here 30 mm off."""
        rotation = TURN + shear * np.array([[0, 1, 0], [0, 0, 0], [0, 0, 0]])
        fields = sform(rotation) | qform(0, 0, np.sqrt(0.1), (-11.5, 37.25, 130))
        path, result = tmp_path / "v.nii", tmp_path / "result.nii"
        write_nifti(path, SHORTS, **fields)
        scan = read_volume(path)
        axes = np.reshape(scan.direction, (3, 3))
        np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)
        np.testing.assert_allclose(affine_of(scan), nibabel.load(path).affine, atol=3e-3)
        sitk.Image(2, 2, 2, sitk.sitkUInt8).SetDirection(scan.direction)
        write_volume(result, scan.array, like=scan)
        assert forms(result) == forms(path)

    @pytest.mark.parametrize(("unit", "scale"), [(0, 1), (1, 1000), (2, 1), (3, 0.001), (10, 1)])
    def test_unit_of_length(self, tmp_path: Path, unit: int, scale: float):
        rotation, sizes = np.diag([-1, -1, 1]), np.array(SIZES) / scale
        place = np.array([-11.5, 7.25, 130]) / scale
        pixdim = [1, *sizes, 0, 0, 0, 0]
        both = qform(0, 0, 1, tuple(place)) | sform(rotation, tuple(place), tuple(sizes))
        for fields in (both, both | {"sform_code": 0}):
            path = write_nifti(
                tmp_path / "v.nii", ARRAY, **fields | {"pixdim": pixdim}, xyzt_units=unit
            )
            volume = read_volume(path)
            np.testing.assert_allclose(volume.spacing, SIZES, rtol=1e-6)
            np.testing.assert_allclose(volume.origin, (11.5, -7.25, 130), rtol=1e-6)
            result = tmp_path / "result.nii"
            write_volume(result, volume.array, like=volume)
            assert forms(result) == forms(path)


class TestWarnings:
    def test_forms_that_disagree(self, tmp_path: Path):
        rotation = np.diag([1.0, 1, 1])
        fields = sform(rotation, (0, 0, 0)) | qform(0, 0, 0, (3, 0, 4))
        path = write_nifti(tmp_path / "v.nii", ARRAY, **fields)
        with pytest.warns(FastprotoWarning, match=r"v\.nii: .*sform and qform .* 5 mm apart"):
            read_volume(path)

    def test_no_orientation(self, tmp_path: Path):
        path = write_nifti(tmp_path / "v.nii", ARRAY)
        with pytest.warns(FastprotoWarning, match="nothing about orientation"):
            read_volume(path)

    @pytest.mark.parametrize("name", ["v.nii", "V.NII"])
    def test_gzip_without_gz(self, tmp_path: Path, name: str):
        (tmp_path / name).write_bytes(gzip.compress(nifti_bytes(SHORTS, **Q_TURN)))
        with pytest.warns(FastprotoWarning, match=r"gzip-compressed: call it \.nii\.gz"):
            volume = read_volume(tmp_path / name)
        np.testing.assert_array_equal(volume.array, SHORTS)

    @pytest.mark.parametrize("tail", [b"<html>done</html>", b"\0\0\0x", b"\x1f"])
    def test_bytes_after_the_compressed_data(self, tmp_path: Path, tail: bytes):
        path = write_nifti(tmp_path / "v.nii.gz", SHORTS, **Q_TURN)
        path.write_bytes(path.read_bytes() + tail)
        with pytest.warns(FastprotoWarning, match="after the end of its compressed data"):
            volume = read_volume(path)
        np.testing.assert_array_equal(volume.array, SHORTS)

    @pytest.mark.parametrize("fields", [Q_TURN, Q_TURN | sform(TURN), sform(TURN)])
    def test_none_for_good_files(self, tmp_path: Path, fields: dict):
        """Also without for bgzip's many streams, padding, extensions and slopes of 0 or NaN."""
        plain = nifti_bytes(SHORTS, **fields)
        contents = {
            "a.nii.gz": gzip.compress(plain),
            "b.nii.gz": b"".join(
                gzip.compress(plain[i : i + 99]) for i in range(0, len(plain), 99)
            ),
            "c.nii.gz": gzip.compress(plain) + bytes(700),
            "uncompressed.nii.gz": plain,
            "EXTENDED.NII": nifti_bytes(SHORTS, extension=b"x" * 4097, **fields),
            "d.nii": nifti_bytes(SHORTS, scl_slope=NAN, scl_inter=NAN, **fields),
            "e.nii": nifti_bytes(SHORTS, scl_slope=0, scl_inter=7, **fields),
        }
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                volume = read_volume(tmp_path / name)
            assert volume.array.dtype == np.int16
            np.testing.assert_array_equal(volume.array, SHORTS)


class TestVoxels:
    @pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
    @pytest.mark.parametrize("scaling", [(1, 0), (0, 5), (0.1, -1024.3), (1, -1024), (-3, 0)])
    def test_are_those_of_nibabel(self, tmp_path: Path, dtype: str, scaling: tuple):
        array = np.random.default_rng(0).integers(0, 127, (2, 3, 4)).astype(dtype)
        image = nibabel.Nifti1Image(array.T, np.eye(4), dtype=array.dtype)
        path = tmp_path / "v.nii"
        image.to_filename(path)
        content = bytearray(path.read_bytes())
        content[112:120] = np.array(scaling, "<f4").tobytes()
        path.write_bytes(content)
        read, expected = read_volume(path).array, np.asanyarray(nibabel.load(path).dataobj).T
        scaled = scaling not in ((1, 0), (0, 5))
        assert read.dtype == (np.float32 if scaled and array.dtype.kind != "f" else dtype)
        np.testing.assert_allclose(read, expected, rtol=1e-6, atol=1e-4)

    @pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    def test_are_read_once(self, tmp_path: Path, suffix: str):
        large = np.random.default_rng(0).integers(0, 60000, (40, 200, 200)).astype(np.uint16)
        path = write_nifti(tmp_path / f"v{suffix}", large, **Q_TURN)

        def bytes_read() -> int:
            return int(Path("/proc/self/io").read_text().split()[1])

        before = bytes_read()
        read = read_volume(path)
        assert bytes_read() - before < 1.1 * path.stat().st_size
        np.testing.assert_array_equal(read.array, large)

    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    @pytest.mark.parametrize("extra", [b"\7" * 100, b"\0"])
    def test_that_are_too_many_are_refused(self, tmp_path: Path, suffix: str, extra: bytes):
        data = extra + SHORTS.tobytes()
        path = write_nifti(tmp_path / f"v{suffix}", SHORTS, data=data, **Q_TURN)
        refused(path, VolumeError, f"promises {SHORTS.nbytes}", f"{len(extra)} bytes are too many")

    @pytest.mark.parametrize("damage", ["cut", "checksum"])
    def test_of_a_damaged_stream_are_refused(self, tmp_path: Path, damage: str):
        path = write_nifti(tmp_path / "v.nii.gz", SHORTS, **Q_TURN)
        content = path.read_bytes()
        path.write_bytes(
            content[:-9] if damage == "cut" else content[:-8] + bytes(4) + content[-4:]
        )
        refused(path, VolumeError, "damaged, truncated")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("fields", "kind", "words"), [
    ({"sizeof_hdr": 540}, VolumeError, "NIfTI-2"),
    ({"magic": b""}, VolumeError, "Analyze"),
    ({"magic": b"ni1"}, VolumeError, "two-file NIfTI"),
    ({"magic": b"xyz"}, VolumeError, "no NIfTI header"),
    ({"dim": [3, 32000, 32000, 32000, 1, 1, 1, 1]}, VolumeError, "promises 131072000000000"),
    *(({"dim": [*dim, 1, 1, 1, 1]}, VolumeError, "")
      for dim in [(3, 7, 6, 0), (3, 7, -6, 5), (0, 7, 6, 5), (9, 7, 6, 5)]),
    ({"vox_offset": NAN}, VolumeError, "vox_offset"),
    ({"vox_offset": 352.5}, VolumeError, "vox_offset"),
    ({"vox_offset": 3e38}, VolumeError, ""),
    ({"scl_slope": INF}, VolumeError, "scl_slope inf"),
    ({"scl_slope": 3e38}, VolumeError, "a voxel of inf"),
    ({"scl_inter": -INF}, VolumeError, "scl_inter -inf"),
    ({"scl_inter": NAN}, VolumeError, "scl_inter nan"),
    *(({"pixdim": [1, size, 0.8, 2.5, 0, 0, 0, 0]}, GeometryError, f"(pixdim) {size:g}")
      for size in (NAN, INF, 0.0, -0.7)),
    ({"quatern_b": NAN}, GeometryError, "qform"),
    ({"quatern_b": 2}, GeometryError, "qform whose quaternion has the length 2"),
    ({"srow_x": [NAN, 0, 0, 0]}, GeometryError, "sform"),
    ({"srow_x": [0, 0, 0, 0]}, GeometryError, "sform"),
    (sform(TURN @ [[1, 0.3, 0], [0, 0.9539, 0], [0, 0, 1]]), GeometryError, "sheared"),
    (sform(TURN @ [[1, 0.002, 0], [0, 1, 0], [0, 0, 1]]), GeometryError, "sheared"),
    (sform(TURN, sizes=(7, 0.8, 2.5)),
     GeometryError, "7, 0.8, 2.5; allowed: the voxel size of the header, 0.7, 0.8, 2.5"),
    ({"sform_code": 6}, GeometryError, "qform_code 1 and sform_code 6"),
    ({"qform_code": -1}, GeometryError, "qform_code -1"),
    ({"xyzt_units": 5}, GeometryError, "unit of length 5"),
    # Millimetres that claim to be metres or micrometres.
    ({"xyzt_units": 1}, GeometryError, "700, 800, 2500 mm"),
    ({"xyzt_units": 3}, GeometryError, "0.0007, 0.0008, 0.0025 mm"),
])  # fmt: skip
def test_damaged_header(tmp_path: Path, suffix: str, fields: dict, kind: type, words: str, capfd):
    fields = Q_TURN | sform(TURN) | fields
    refused(write_nifti(tmp_path / f"v{suffix}", ARRAY, **fields), kind, words)
    assert capfd.readouterr() == ("", "")
