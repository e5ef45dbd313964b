# SPDX-License-Identifier: Apache-2.0
"""The values of DICOM pixels are slope * stored + intercept; pydicom is the independent reader."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from pydicom import dcmread, dcmwrite
from pydicom.pixels import apply_modality_lut
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
)
from support.dicom import compress, new, pixels, save, write_slices

from fastproto.data import read_volume
from fastproto.errors import FastprotoWarning, VolumeError

HEIGHTS = range(3)
DEPTHS = [("u1", 8), ("u2", 10), ("u2", 12), ("u2", 16), ("i2", 12), ("i2", 16), ("i1", 8)]


def random_stack(dtype: str, bits: int) -> np.ndarray:
    """The extremes of these bits, and numbers between them."""
    low, high = (0, 2**bits - 1) if dtype[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    stack = np.random.default_rng(0).integers(low, high, (3, 64, 72), endpoint=True)
    stack[:, 0, :2] = low, high
    return stack.astype(dtype)


def by_pydicom(folder: Path) -> np.ndarray:
    datasets = [dcmread(path) for path in sorted(folder.iterdir())]
    return np.stack([apply_modality_lut(dataset.pixel_array, dataset) for dataset in datasets])


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("dtype", "bits"), DEPTHS)
def test_photometric_interpretation_is_for_displays(
    tmp_path: Path, dtype: str, bits: int, photometric: str
):
    stack = random_stack(dtype, bits)
    rescaling = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    write_slices(tmp_path, stack, HEIGHTS, bits, PhotometricInterpretation=photometric, **rescaling)
    array = read_volume(tmp_path).array
    np.testing.assert_array_equal(array, stack.astype(int) - 1024)
    np.testing.assert_array_equal(array, by_pydicom(tmp_path))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("dtype", "bits"), DEPTHS)
@pytest.mark.parametrize("method", ["rle", "jpeg", "j2k"])
def test_compressed(
    tmp_path: Path,
    method: str,
    dtype: str,
    bits: int,
    photometric: str,
    capfd: pytest.CaptureFixture,
):
    stack = random_stack(dtype, bits)
    write_slices(
        tmp_path, stack, HEIGHTS, bits, PhotometricInterpretation=photometric, RescaleSlope=2,
        RescaleIntercept=-7,
    )  # fmt: skip
    compress(tmp_path, method)
    np.testing.assert_array_equal(read_volume(tmp_path).array, 2 * stack.astype(int) - 7)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_other_transfer_syntaxes(tmp_path: Path, syntax: str):
    stack = random_stack("i2", 12)
    write_slices(tmp_path / "slices", stack, HEIGHTS, 12)
    for path in (tmp_path / "slices").iterdir():
        dataset = new()
        dataset.update({element.tag: element for element in dcmread(path)})
        dataset.file_meta.TransferSyntaxUID = syntax
        if big := syntax == ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes()
        dataset["PixelData"].VR = "OW"
        implicit = syntax == ImplicitVRLittleEndian
        encoding = {"implicit_vr": implicit, "little_endian": not big, "force_encoding": True}
        dcmwrite(path, dataset, **encoding)
    np.testing.assert_array_equal(read_volume(tmp_path / "slices").array, stack)


@pytest.mark.parametrize("high", [11, 13, 15])
@pytest.mark.parametrize("dtype", ["u2", "i2"])
def test_unused_bits_hold_overlays(tmp_path: Path, dtype: str, high: int):
    """12 bits at any place of a word, and something else around them."""
    stack = random_stack(dtype, 12)
    words = (stack.view("u2") & 0xFFF) << (high - 11)
    noise = np.random.default_rng(1).integers(0, 2**16, stack.shape).astype("u2")
    words |= noise & np.uint16(0xFFFF ^ (0xFFF << (high - 11)))
    write_slices(tmp_path, words.view(dtype), HEIGHTS, 12, HighBit=high)
    np.testing.assert_array_equal(read_volume(tmp_path).array, stack)


def test_every_slice_has_its_own_rescaling(tmp_path: Path):
    """As in PET."""
    stack = random_stack("u2", 16)
    write_slices(
        tmp_path, stack, HEIGHTS, Modality="PT", RescaleSlope=lambda z: 0.37 * (z + 1),
        RescaleIntercept=lambda z: -z,
    )  # fmt: skip
    array = read_volume(tmp_path).array
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, by_pydicom(tmp_path), rtol=1e-6)


@pytest.mark.parametrize(("elements", "words"), [
    ({"RescaleSlope": 0, "RescaleIntercept": 0}, "RescaleSlope 0 and"),
    ({"RescaleIntercept": -1024}, "RescaleSlope nan and RescaleIntercept -1024"),
    ({"HighBit": 4107}, "16 bits up to bit 4107 in words of 16"),
    ({"BitsStored": 17}, "'Bits Stored' value of '17'"),
    ({"ModalityLUTSequence": [new(LUTExplanation="film")]}, "Modality LUT"),
    ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour"),
    ({"PixelData": b"\0" * 9214}, "damaged or truncated"),
    ({"PixelData": None}, "truncated"),
    ({"BitsStored": None}, "no size of a grey image"),
])  # fmt: skip
def test_refused(tmp_path: Path, elements: dict, words: str):
    write_slices(tmp_path, random_stack("u2", 16), HEIGHTS, **elements)
    with pytest.raises(VolumeError, match=words):
        read_volume(tmp_path)


def test_a_map_that_is_no_hounsfield_units_is_named(tmp_path: Path):
    write_slices(tmp_path, random_stack("u2", 16), HEIGHTS, RescaleType="Z_EFF")
    with pytest.warns(FastprotoWarning, match="RescaleType Z_EFF: the values are not HU"):
        read_volume(tmp_path)


def test_a_file_without_preamble(tmp_path: Path):
    stack = random_stack("u2", 16)
    for z, stored in enumerate(stack):
        place = {"ImagePositionPatient": [0, 0, z], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        dataset = new(**pixels(stored), PixelSpacing=[1, 1], **place)
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        path = save(dataset, tmp_path / str(z))
        data = path.read_bytes()
        path.write_bytes(
            data[data.index(b"\x08\x00\x16\x00") :].replace(
                b"\x08\x00\x16\x00", b"\x08\x00\x05\x00", 1
            )
        )
    np.testing.assert_array_equal(read_volume(tmp_path).array, stack)


@pytest.mark.parametrize("method", ["jpeg", "j2k"])
def test_what_other_threads_say_meanwhile_is_no_damage(
    tmp_path: Path, method: str, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Only what is said each time that a file is decoded counts, and addresses do not."""
    stack, read, calls = random_stack("u2", 12), SimpleITK.ReadImage, iter(range(99))

    def noisy(*args: Any, **kwargs: Any) -> SimpleITK.Image:
        os.write(2, line % (next(calls), b"\n"))
        return read(*args, **kwargs)

    write_slices(tmp_path, stack, HEIGHTS, 12)
    compress(tmp_path, method)
    monkeypatch.setattr(SimpleITK, "ReadImage", noisy)
    line = b"%d it/s%s"
    np.testing.assert_array_equal(read_volume(tmp_path).array, stack)
    assert capfd.readouterr().err == "".join(f"{number} it/s\n" for number in range(6))
    line = b"Warning (0x55e%07d): premature end%s"
    with pytest.raises(VolumeError, match=r"damaged compressed pixels \(Warning \(0x\): premature"):
        read_volume(tmp_path)
    monkeypatch.setattr(sys, "stderr", None)
    line = b"%d it/s%s"
    np.testing.assert_array_equal(read_volume(tmp_path).array, stack)
