# SPDX-License-Identifier: Apache-2.0
"""NRRD: headers of every kind, written here as text, and what pynrrd reads of ours."""

from __future__ import annotations

import gzip
import warnings
from pathlib import Path

import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from support.volumes import SHORTS, affine_of, refused, text_header

from fastproto.data import Volume, read_volume, write_volume
from fastproto.errors import FastprotoWarning, GeometryError, VolumeError

HEADER = {
    "type": "short", "dimension": "3", "sizes": "7 6 5", "endian": "little", "encoding": "raw",
    "space": "left-posterior-superior", "space directions": "(0.7,0,0) (0,0.8,0) (0,0,2.5)",
    "space origin": "(-11.5,7.25,130)",
}  # fmt: skip
SPACINGS = {
    "space": None,
    "space directions": None,
    "space origin": None,
    "spacings": "0.7 0.8 2.5",
}
RAW = SHORTS.tobytes()
SEGMENT = "Segment0_ID:=a\nSegment1_ID:=b\n"


def write_nrrd(path: Path, data: bytes = RAW, more: str = "", **fields: str | None) -> Path:
    given = {name.replace("_", " "): value for name, value in fields.items()}
    header = "NRRD0005\n# a comment\n" + text_header(HEADER, given, ": ") + more + "\n"
    path.write_bytes(header.encode() + data)
    return path


def check(path: Path, origin: tuple = (-11.5, 7.25, 130), axes: tuple = (1, 1, 1)) -> None:
    """The voxels, their size, and an origin and axes in LPS."""
    volume = read_volume(path)
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, SHORTS)
    np.testing.assert_allclose(volume.spacing, (0.7, 0.8, 2.5), rtol=1e-9)
    np.testing.assert_allclose(volume.origin, origin, rtol=1e-9)
    np.testing.assert_array_equal(np.reshape(volume.direction, (3, 3)), np.diag(axes))


class TestData:
    @pytest.fixture(autouse=True)
    def _no_warnings(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield

    def test_as_they_come(self, tmp_path: Path):
        check(write_nrrd(tmp_path / "v.nrrd"))
        check(write_nrrd(tmp_path / "z.nrrd", gzip.compress(RAW), encoding="gzip"))
        check(write_nrrd(tmp_path / "b.nrrd", SHORTS.astype(">i2").tobytes(), endian="big"))
        check(write_nrrd(tmp_path / "t.nrrd", type="signed short int", more="type:=of the mask\n"))

    def test_in_a_file_of_their_own(self, tmp_path: Path):
        (tmp_path / "some.raw").write_bytes(RAW)
        (tmp_path / "some.raw.gz").write_bytes(gzip.compress(b"before" + RAW))
        (tmp_path / "headed.raw").write_bytes(b"a line\nanother\n1234" + RAW)
        path = tmp_path / "v.nhdr"
        check(write_nrrd(path, b"", data_file="some.raw"))
        check(write_nrrd(path, b"", datafile="some.raw.gz", encoding="gz", byteskip="6"))
        check(write_nrrd(path, b"", datafile="headed.raw", line_skip="2", byte_skip="4"))
        check(write_nrrd(path, b"", datafile="headed.raw", byte_skip="-1"))
        refused(write_nrrd(path, b"", datafile="headed.raw"), VolumeError, "19 bytes are too many")
        refused(write_nrrd(path, b"", datafile="none.raw"), VolumeError, "none.raw", "No such file")

    def test_in_no_file(self, tmp_path: Path):
        path = write_nrrd(tmp_path / "v.nrrd", b"", data_file="/dev/zero", line_skip="1")
        with pytest.raises(VolumeError, match="/dev/zero: found a device, pipe or folder"):
            read_volume(path)

    @pytest.mark.parametrize("extra", [348, 1, -1, -300])
    @pytest.mark.parametrize("encoding", ["raw", "gzip"])
    def test_of_another_size_are_refused(self, tmp_path: Path, extra: int, encoding: str):
        data = (bytes(max(extra, 0)) + RAW)[: len(RAW) + extra]
        data = gzip.compress(data) if encoding == "gzip" else data
        path = write_nrrd(tmp_path / "v.nrrd", data, encoding=encoding)
        refused(path, VolumeError, f"found {len(RAW) + extra} bytes of voxels", "promises 420")

    @pytest.mark.parametrize(("fields", "words"), [
        ({"encoding": "ascii"}, "encoding ascii"), ({"encoding": "hex"}, "encoding hex"),
        ({"encoding": "bzip2"}, "encoding bzip2"), ({"type": "block"}, "type block"),
        ({"endian": None}, "endian missing"), ({"old min": "0"}, "quantized"),
        ({"data file": "LIST"}, "several files"), ({"data file": "s%03d.raw 1 5 1"}, "several"),
        ({"sizes": "7 6"}, "sizes [7, 6]"), ({"sizes": "7 6 0"}, "sizes [7, 6, 0]"),
        ({"sizes": "7 6 five"}, "sizes 7 6 five"), ({"dimension": "4"}, "dimension [4]"),
        ({"Sizes": "7 6 5"}, "Sizes twice"), ({"space unit": '"cm"'}, "'space unit: \"cm\"'"),
        *(({"line skip": lines, "byte skip": skip}, f"line skip [{lines}] and byte skip [{skip}]")
          for lines, skip in (("-1", "0"), ("0", "-2"), ("", "0"))),
        ({"line skip": "999999999999"}, "found 0 bytes"),
        ({"data file": "a\0b"}, "file name 'a\\x00b'"),
    ])  # fmt: skip
    def test_that_are_not_read(self, tmp_path: Path, fields: dict, words: str):
        refused(write_nrrd(tmp_path / "v.nrrd", **fields), VolumeError, words)


class TestPlace:
    @pytest.mark.parametrize(("space", "x", "y"), [
        ("left-posterior-superior", 1, 1), ("LPS", 1, 1), ("right-anterior-superior", -1, -1),
        ("RAS", -1, -1), ("left-anterior-superior", 1, -1), ("LAS", 1, -1),
    ])  # fmt: skip
    def test_spaces(self, tmp_path: Path, space: str, x: int, y: int):
        path = write_nrrd(tmp_path / "v.nrrd", space=space)
        check(path, (-11.5 * x, 7.25 * y, 130), (x, y, 1))

    @pytest.mark.parametrize(("unit", "scale"), [
        ("mm", 1), ("", 1), ("cm", 10), ("m", 1000), ("um", 1e-3), ("µm", 1e-3), ("micron", 1e-3),
    ])  # fmt: skip
    def test_units(self, tmp_path: Path, unit: str, scale: float):
        x, y, z = (size / scale for size in (0.7, 0.8, 2.5))
        fields = {
            "space": "right-anterior-superior",
            "space units": f'"{unit}" "{unit}" "{unit}"',
            "space directions": f"({x!r},0,0) (0,{y!r},0) (0,0,{z!r})",
            "space origin": f"({11.5 / scale!r},{-7.25 / scale!r},{130 / scale!r})",
        }
        check(write_nrrd(tmp_path / "v.nrrd", **fields), axes=(-1, -1, 1))
        fields = SPACINGS | {"spacings": f"{x!r} {y!r} {z!r}", "units": f'"{unit}" ' * 3}
        path = write_nrrd(tmp_path / "v.nrrd", **fields)
        with pytest.warns(FastprotoWarning, match="superior axes and an origin of 0"):
            check(path, (0, 0, 0))

    @pytest.mark.parametrize(("fields", "words"), [
        ({"space units": '"inch" "inch" "inch"'}, "lengths in 'inch'"),
        ({"space units": '"mm" "mm" m"'}, "lengths in"),
        ({"space directions": None}, "no voxel sizes"),
        (SPACINGS | {"spacings": "nan 1 1"}, "spacing nan, 1, 1"),
        (SPACINGS | {"spacings": "1 1"}, "of 2 axes"),
        (SPACINGS | {"spacings": "1 1 0"}, "spacing 1, 1, 0"),
        (SPACINGS | {"spacings": "1 1 x"}, "spacings 1 1 x"),
        (SPACINGS | {"axis mins": "0 0 0"}, "axis mins"),
        ({"space directions": "(1,0,0) (0,1,0)"}, "of 2 axes"),
        ({"space directions": "(1,0,0) (0,1,0) none"}, "2-D"),
        ({"space directions": "(1,0) (0,1) (0,0)"}, "a vector of 3 numbers"),
        ({"space directions": "(1,0,0) 2(0,1,0) (0,0,1)"}, "'2(0,1,0)'"),
        ({"space units": "cubits cubits cubits"}, "lengths in 'cubits'"),
        ({"space origin": "(1,2. 5,3)"}, "'(1,2. 5,3)'"),
        ({"space directions": "(1,0,0) (0,1,0) (0,0,0)"}, "spacing 1, 1, 0"),
        ({"space directions": "(1,0,0) (0.1,1,0) (0,0,1)"}, "sheared"),
        ({"space directions": "(7e-4,0,0) (0,8e-4,0) (0,0,2.5e-3)"}, "in metres"),
        ({"space directions": "(700,0,0) (0,800,0) (0,0,2500)"}, "in micrometres"),
        ({"space": "up-down-left"}, "space up-down-left"),
        ({"space origin": "(nan,0,0)"}, "NaN or Inf in space origin"),
    ])  # fmt: skip
    def test_that_is_refused(self, tmp_path: Path, fields: dict, words: str):
        kind = VolumeError if words.endswith("-D") else GeometryError
        refused(write_nrrd(tmp_path / "v.nrrd", **fields), kind, words)

    def test_units_without_a_name(self, tmp_path: Path):
        path = write_nrrd(tmp_path / "v.nrrd", space_units='"" "" ""')
        with pytest.warns(FastprotoWarning, match="names no unit of length: mm are assumed"):
            check(path)

    def test_spacings_in_a_space(self, tmp_path: Path):
        fields = SPACINGS | {"space": "RAS", "space origin": "(11.5,-7.25,130)"}
        with pytest.warns(FastprotoWarning, match="place the voxels: ras axes are assumed"):
            check(write_nrrd(tmp_path / "v.nrrd", **fields), axes=(-1, -1, 1))

    def test_space_without_names(self, tmp_path: Path):
        path = write_nrrd(tmp_path / "v.nrrd", space=None, space_dimension="3")
        with pytest.warns(FastprotoWarning, match="left-posterior-superior axes are assumed"):
            check(path)


class TestAxes:
    @pytest.mark.parametrize("slices", [1, 5])
    def test_one_value_per_voxel(self, tmp_path: Path, slices: int):
        """An axis of size 1 beside those in space, wherever it stands, and one in space."""
        four = {"dimension": "4", "kinds": "list domain domain domain"}
        array, vectors = SHORTS[:slices], HEADER["space directions"]
        for sizes, directions in (
            (f"1 7 6 {slices}", f"none {vectors}"), (f"7 6 {slices} 1", f"{vectors} none"),
        ):  # fmt: skip
            path = write_nrrd(
                tmp_path / "v.seg.nrrd", array.tobytes(), SEGMENT,
                **four, sizes=sizes, space_directions=directions,
            )  # fmt: skip
            volume = read_volume(path)
            np.testing.assert_array_equal(volume.array, array)
            assert volume.spacing == pytest.approx((0.7, 0.8, 2.5))

    def test_several_values_per_voxel(self, tmp_path: Path):
        four = {"dimension": "4", "sizes": "2 7 6 5"}
        four["space_directions"] = f"none {HEADER['space directions']}"
        path = write_nrrd(tmp_path / "v.nrrd", RAW * 2, **four)
        refused(path, VolumeError, "4-D image of 7 x 6 x 5 x 2")
        path = write_nrrd(tmp_path / "v.seg.nrrd", RAW * 2, SEGMENT, **four)
        refused(path, VolumeError, "2 segments in overlapping layers", "label map")


class TestWriting:
    LIKE = Volume(
        SHORTS, (0.7, 0.8, 2.5), (-11.5, 7.25, 130.0), (0, 0, -1, 1, 0, 0, 0, -1, 0)
    )  # fmt: skip

    def test_as_pynrrd_reads_it(self, tmp_path: Path):
        write_volume(tmp_path / "v.nrrd", SHORTS, self.LIKE)
        array, header = nrrd.read(str(tmp_path / "v.nrrd"), index_order="C")
        np.testing.assert_array_equal(array, SHORTS)
        assert header["space"] == "left-posterior-superior"
        axes = affine_of(self.LIKE)[:3, :3] * [[-1], [-1], [1]]
        np.testing.assert_allclose(header["space directions"].T, axes)
        np.testing.assert_allclose(header["space origin"], self.LIKE.origin)

    @pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nii"])
    def test_as_simpleitk_reads_it(self, tmp_path: Path, suffix: str):
        write_volume(tmp_path / f"v{suffix}", SHORTS, self.LIKE)
        image = sitk.ReadImage(str(tmp_path / f"v{suffix}"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), SHORTS)
        np.testing.assert_allclose(image.GetSpacing(), self.LIKE.spacing, rtol=1e-6)
        np.testing.assert_allclose(image.GetOrigin(), self.LIKE.origin, rtol=1e-6)
        np.testing.assert_allclose(image.GetDirection(), self.LIKE.direction, atol=1e-6)
