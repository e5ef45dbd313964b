# SPDX-License-Identifier: Apache-2.0
"""MetaImage: what SimpleITK read wrongly without an error, and headers of every kind."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from support.volumes import SHORTS, refused, text_header

from fastproto.data import Volume, read_volume, write_volume
from fastproto.errors import FastprotoWarning, GeometryError, VolumeError

HEADER = {
    "ObjectType": "Image", "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False", "TransformMatrix": "0 1 0 0 0 -1 -1 0 0", "Offset": "-11.5 7.25 130",
    "CenterOfRotation": "1 2 3", "AnatomicalOrientation": "RAI", "ElementSpacing": "0.7 0.8 2.5",
    "DimSize": "7 6 5", "ElementType": "MET_SHORT",
}  # fmt: skip
RAW = SHORTS.tobytes()
PACKED = zlib.compress(RAW)


def write_mha(path: Path, data: bytes = RAW, file: str = "LOCAL", **fields: str | None) -> Path:
    header = text_header(HEADER, fields, " = ") + f"ElementDataFile = {file}\n"
    path.write_bytes(header.encode() + data)
    return path


def check(path: Path, array: np.ndarray = SHORTS) -> None:
    volume = read_volume(path)
    assert volume.array.dtype == array.dtype
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.spacing, (0.7, 0.8, 2.5), rtol=1e-9)
    np.testing.assert_allclose(volume.origin, (-11.5, 7.25, 130), rtol=1e-9)
    assert volume.direction == (0, 0, -1, 1, 0, 0, 0, -1, 0)


class TestData:
    @pytest.fixture(autouse=True)
    def _no_warnings(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield

    def test_as_they_come(self, tmp_path: Path):
        path = write_mha(tmp_path / "v.mha")
        check(path)
        image = sitk.ReadImage(str(path))  # places them alike
        assert image.GetDirection() == read_volume(path).direction
        check(write_mha(path, SHORTS.astype(">i2").tobytes(), BinaryDataByteOrderMSB="True"))
        check(
            write_mha(
                path,
                SHORTS.astype(">i2").tobytes(),
                BinaryDataByteOrderMSB=None,
                ElementByteOrderMSB="true",
            )
        )
        check(write_mha(path, RAW, ElementType="MET_SHORT_ARRAY", ElementNumberOfChannels="1"))
        check(write_mha(path, b"header" + RAW, HeaderSize="6"))
        check(write_mha(path, b"header" + RAW, HeaderSize="-1"))
        double = SHORTS.astype("f8")
        check(write_mha(path, double.tobytes(), ElementType="MET_DOUBLE"), double)

    @pytest.mark.parametrize("size", [None, str(len(PACKED)), str(len(PACKED) // 3), "0", "9999"])
    def test_compressed_whatever_size_is_said(self, tmp_path: Path, size: str | None, capfd):
        """Where it was missing or too small, most voxels were made up."""
        fields = {"CompressedData": "True", "CompressedDataSize": size}
        check(write_mha(tmp_path / "v.mha", PACKED, **fields))
        (tmp_path / "v.zraw").write_bytes(PACKED)
        check(write_mha(tmp_path / "v.mhd", b"", "v.zraw", **fields))
        assert capfd.readouterr() == ("", "")

    def test_compressed_and_damaged(self, tmp_path: Path):
        for data, words in (
            (PACKED[:-9], "no end"), (PACKED[:40] + b"xyz" + PACKED[43:], "damaged"),
            (zlib.compress(RAW[:-2]), "found 418 bytes"), (zlib.compress(RAW + b"12"), "2 bytes"),
            (RAW, "damaged"),
        ):  # fmt: skip
            refused(write_mha(tmp_path / "v.mha", data, CompressedData="True"), VolumeError, words)

    @pytest.mark.parametrize("extra", [348, 1, -1, -300])
    def test_of_another_size_are_refused(self, tmp_path: Path, extra: int):
        data = (bytes(max(extra, 0)) + RAW)[: len(RAW) + extra]
        words = f"found {len(data)} bytes of voxels", "promises 420"
        refused(write_mha(tmp_path / "v.mha", data), VolumeError, *words)
        (tmp_path / "v.raw").write_bytes(data)
        refused(write_mha(tmp_path / "v.mhd", b"", "v.raw"), VolumeError, *words)

    @pytest.mark.parametrize(("slope", "offset"), [("1", "-1024"), ("0.5", None), (None, "3.25")])
    def test_intensity_function(self, tmp_path: Path, slope: str | None, offset: str | None):
        name = "ElementToIntensityFunction"
        fields = {f"{name}Slope": slope, f"{name}Offset": offset}
        expected = SHORTS * np.float32(slope or 1) + np.float32(offset or 0)
        check(write_mha(tmp_path / "v.mha", **fields), expected)
        packed = {"CompressedData": "True", **fields}
        check(write_mha(tmp_path / "v.mha", PACKED, **packed), expected)

    @pytest.mark.parametrize("unit", ["mm", "cm", "um"])
    def test_units(self, tmp_path: Path, unit: str):
        scale = {"mm": 1, "cm": 10, "um": 1e-3}[unit]
        fields = {"ElementSpacing": (0.7, 0.8, 2.5), "Offset": (-11.5, 7.25, 130)}
        texts = {key: " ".join(str(v / scale) for v in values) for key, values in fields.items()}
        check(write_mha(tmp_path / "v.mha", DistanceUnits=unit, **texts))

    @pytest.mark.parametrize(("fields", "kind", "words"), [
        ({"NDims": "73"}, VolumeError, "NDims = 73"),
        ({"DimSize": "7 6"}, VolumeError, "DimSize = 7 6"),
        ({"DimSize": "7 0 5"}, VolumeError, "DimSize = 7 0 5"),
        ({"DimSize": "3000 3000 3000"}, VolumeError, "promises 54000000000"),
        ({"ElementType": "MET_STRANGE"}, VolumeError, "ElementType = MET_STRANGE"),
        ({"ElementNumberOfChannels": "3"}, VolumeError, "3 values per voxel"),
        ({"BinaryData": "False"}, VolumeError, "voxels written as text"),
        ({"HeaderSize": "-2"}, VolumeError, "HeaderSize = -2"),
        ({"HeaderSize": "-1", "CompressedData": "True"}, VolumeError, "HeaderSize = -1"),
        ({"HeaderSizePerSlice": "8"}, VolumeError, "HeaderSizePerSlice = 8"),
        ({"ElementToIntensityFunctionSlope": "0"}, VolumeError, "Function 0 and 0"),
        ({"ElementToIntensityFunctionOffset": "nan"}, VolumeError, "Function 1 and nan"),
        ({"Offset": "left"}, VolumeError, "Offset = left"),
        ({"Offset": "1_0 0 0"}, VolumeError, "Offset = 1_0 0 0"),
        ({"Offset": "0 0"}, VolumeError, "allowed: 3 numbers"),
        ({"Offset": "nan 0 0"}, GeometryError, "Offset"),
        ({"ElementSpacing": None}, GeometryError, "no ElementSpacing"),
        *(({"ElementSpacing": f"{size} 1 1"}, GeometryError, f"ElementSpacing {size}, 1, 1")
          for size in ("nan", "0", "-2")),
        ({"ElementSpacing": "1e-4 1e-4 1e-3"}, GeometryError, "in metres"),
        ({"TransformMatrix": "1 0 0 0.3 1 0 0 0 1"}, GeometryError, "sheared"),
        ({"TransformMatrix": "nan 0 0 0 1 0 0 0 1"}, GeometryError, "sheared"),
        ({"DistanceUnits": "inch"}, GeometryError, "DistanceUnits = inch"),
    ])  # fmt: skip
    def test_header_that_is_refused(self, tmp_path: Path, fields: dict, kind: type, words: str):
        refused(write_mha(tmp_path / "v.mha", **fields), kind, words)

    @pytest.mark.parametrize("file", ["LIST", "LIST 2", "slice%03d.raw 1 5 1"])
    def test_in_several_files_are_refused(self, tmp_path: Path, file: str):
        refused(write_mha(tmp_path / "v.mhd", b"", file), VolumeError, "several files")

    def test_data_file_that_is_missing(self, tmp_path: Path):
        refused(write_mha(tmp_path / "v.mhd", b"", "v.raw"), VolumeError, "v.raw", "No such file")


def test_what_the_header_leaves_out(tmp_path: Path):
    path = write_mha(tmp_path / "v.mha", Offset=None, TransformMatrix=None)
    with pytest.warns(FastprotoWarning, match="Offset 0 and straight axes are assumed"):
        volume = read_volume(path)
    assert volume.origin == (0, 0, 0)
    assert volume.direction == (1, 0, 0, 0, 1, 0, 0, 0, 1)


def test_other_bytes_after_the_compressed_data(tmp_path: Path):
    path = write_mha(tmp_path / "v.mha", PACKED + b"trailing", CompressedData="True")
    with pytest.warns(FastprotoWarning, match="after the end of its compressed data"):
        check(path)


def test_what_is_written_says_its_size(tmp_path: Path):
    """ITK makes up voxels where CompressedDataSize is not right."""
    write_volume(tmp_path / "v.mha", SHORTS, Volume(SHORTS))
    header, _, data = (tmp_path / "v.mha").read_bytes().partition(b"LOCAL\n")
    assert f"CompressedDataSize = {len(data)}\n".encode() in header
    assert zlib.decompress(data) == RAW
