# SPDX-License-Identifier: Apache-2.0
"""Orientation, field of view and the way back."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.ndimage import gaussian_filter

from fastproto.data import (
    PreparedVolume,
    Preprocessing,
    Volume,
    open_dataset,
    read_label,
    read_volume,
)
from fastproto.data.geometry import canonical
from fastproto.errors import ArgumentError, GeometryError, LabelError

CT = {"modality": "ct", "mean": 10.0, "std": 100.0}
ALL_ORIENTATIONS = [
    "".join(code)
    for axes in itertools.permutations(["LR", "AP", "IS"])
    for code in itertools.product(*axes)
]


def volume_of(image: sitk.Image) -> Volume:
    return Volume(
        sitk.GetArrayFromImage(image), image.GetSpacing(), image.GetOrigin(), image.GetDirection()
    )


@pytest.fixture
def lps_image() -> sitk.Image:
    """A non-cubic, anisotropic volume in which every corner differs."""
    array = np.random.default_rng(0).normal(50, 80, (9, 20, 16)).astype(np.float32)
    array[:5, :7, :4] += 100
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.9, 1.1, 3.0))
    image.SetOrigin((-30, 12, 700))
    return image


def one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels.long(), classes).permute(0, 3, 1, 2).float()


class TestOrientation:
    @pytest.mark.parametrize("code", ALL_ORIENTATIONS)
    def test_every_stored_orientation_gives_the_same_slices(self, lps_image: sitk.Image, code: str):
        stored = volume_of(sitk.DICOMOrient(lps_image, code))
        lps = volume_of(lps_image)
        seen = canonical(stored)
        np.testing.assert_array_equal(seen.array, lps.array)
        np.testing.assert_allclose(seen.origin, lps.origin, atol=1e-9)
        np.testing.assert_allclose(seen.direction, lps.direction, atol=1e-12)
        assert seen.spacing == lps.spacing
        assert np.shares_memory(seen.array, stored.array)

        prepared = Preprocessing("mr", 32).prepare(stored)
        expected = Preprocessing("mr", 32).prepare(lps)
        torch.testing.assert_close(prepared.images(0, 9), expected.images(0, 9))
        restored = prepared.to_volume_array(np.stack([lps.array, lps.array + 1]))
        np.testing.assert_array_equal(restored, [stored.array, stored.array + 1])
        np.testing.assert_array_equal(prepared.to_canonical(stored.array), lps.array)

    def test_oblique_volume_takes_the_nearest_axes(self, lps_image: sitk.Image):
        transform = sitk.Euler3DTransform((0, 0, 0), 0.3, -0.2, 0.35)
        turn = np.array(transform.GetMatrix()).reshape(3, 3)
        lps_image.SetDirection(turn.ravel())
        stored = sitk.PermuteAxes(sitk.Flip(lps_image, (True, False, True)), (1, 2, 0))
        expected = volume_of(sitk.DICOMOrient(stored, "LPS"))
        seen = canonical(volume_of(stored))
        np.testing.assert_array_equal(seen.array, expected.array)
        np.testing.assert_allclose(seen.direction, expected.direction, atol=1e-12)
        np.testing.assert_allclose(seen.origin, expected.origin, atol=1e-9)

    @pytest.mark.parametrize(("plane", "slice_", "row", "column"), [
        ("axial", 2, 1, 0), ("coronal", 1, 2, 0), ("sagittal", 0, 2, 1),
    ])  # fmt: skip
    def test_planes(self, plane: str, slice_: int, row: int, column: int):
        """The brightest voxel lies at the left, posterior, superior corner (x, y, z maximal)."""
        array = np.zeros((5, 6, 7), np.float32)
        array[-1, -1, -1] = 1
        prepared = Preprocessing("mr", 16, crop=False, plane=plane).prepare(Volume(array))
        sizes = 7, 6, 5
        assert prepared.shape == (sizes[slice_], sizes[row], sizes[column])
        seen = prepared.to_canonical(array)
        assert seen[-1, 0 if row == 2 else -1, -1] == 1  # the head is up
        np.testing.assert_array_equal(prepared.to_volume_array(seen), array)
        seen[1:2] = 7
        assert (array == 7).sum() == seen[0].size


class TestFieldOfView:
    def test_millimetres_keep_their_proportions(self):
        """A disc of 20 mm radius on 1 x 4 mm pixels is a disc in the square image."""
        y, x = np.mgrid[:15, :60]
        disc = np.hypot((y - 7) * 4, x - 29.5) <= 20
        volume = Volume(np.repeat(disc[None].astype(np.float32), 3, axis=0), (1, 4, 2))
        prepared = Preprocessing("mr", 120, crop=False).prepare(volume)
        assert prepared.pixel_size == pytest.approx(0.5)
        inside = prepared.labels(Volume(disc[None].repeat(3, 0).astype(np.uint8), (1, 4, 2)))[1]
        height = int(inside.any(1).sum()) * prepared.pixel_size
        width = int(inside.any(0).sum()) * prepared.pixel_size
        assert height == pytest.approx(40, abs=4.1)
        assert width == pytest.approx(40, abs=1.1)

    def test_resampling_is_bilinear(self):
        """A ramp stays a ramp when it is enlarged."""
        array = np.tile(np.arange(8, dtype=np.float32) * 10, (1, 8, 1))
        images = Preprocessing(**CT, image_size=16, crop=False).prepare(Volume(array)).images(0, 1)
        row = images[0, 0, 5] * 100 + 10
        expected = torch.clamp((torch.arange(16) + 0.5) * 5 - 5, 0, 70)
        torch.testing.assert_close(row, expected, atol=1e-3, rtol=0)

    def test_shrinking_skips_no_pixel(self):
        """Bright single columns must not vanish between the samples."""
        array = np.zeros((1, 64, 64), np.float32)
        array[:, :, ::8] = 160
        images = Preprocessing(**CT, image_size=8, crop=False).prepare(Volume(array)).images(0, 1)
        middle = images[0, 0, :, 1:-1] * 100 + 10
        torch.testing.assert_close(middle, torch.full_like(middle, 20), atol=1e-3, rtol=0)

    @pytest.mark.parametrize("modality", ["ct", "mr"])
    def test_crop_fits_both_legs_and_leaves_the_table(self, modality: str):
        fields = CT if modality == "ct" else {"modality": "mr"}
        air = -1000 if modality == "ct" else 0
        array = np.full((10, 100, 120), air, np.int16)
        array[2:8, 30:70, 40:90] = 40 if modality == "ct" else 500
        array[:, 90, 20:100] = 60 if modality == "ct" else 600
        array[:, 30:70, 60:66] = air  # between the legs
        prepared = Preprocessing(**fields, image_size=60).prepare(Volume(array))
        assert prepared.pixel_size == pytest.approx((50 + 2 * 5) / 60)
        images = prepared.images(4, 5)[0, 0]
        assert (images[10:50, 5:24] > images.min() + 0.5).all()
        assert (images[10:50, 32:55] > images.min() + 0.5).all()
        assert (images[11:49, :4] == images.min()).all()

    @pytest.mark.parametrize("dtype", [np.int16, np.float32])
    def test_without_foreground_the_whole_slice_stays(self, dtype: type):
        empty = Volume(np.full((3, 20, 30), -1000, dtype))
        assert Preprocessing(**CT, image_size=30).prepare(empty).pixel_size == 1

    def test_crop_of_a_large_volume_loses_no_body(self):
        array = np.full((3, 500, 500), -1000, np.int16)
        array[:, 101:399, 203:297] = 0
        prepared = Preprocessing(**CT, image_size=64).prepare(Volume(array))
        seen = prepared.labels(Volume((array == 0).astype(np.uint8)))
        assert (298 + 10) / 64 <= prepared.pixel_size <= (298 + 10 + 8) / 64
        assert not seen[:, [0, -1]].any()
        assert seen[0].any(1).sum() * prepared.pixel_size == pytest.approx(298, abs=6)


class TestLabelsAndBack:
    @pytest.mark.parametrize("code", ["LPS", "PSR", "IRA"])
    @pytest.mark.parametrize(("size", "image_size"), [
        ((30, 48, 40), 96), ((36, 50, 35), 256), ((21, 33, 17), 64),
    ])  # fmt: skip
    @pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
    def test_labels_survive_the_round_trip(
        self, code: str, size: tuple, image_size: int, plane: str
    ):
        blobs = gaussian_filter(np.random.default_rng(0).normal(size=size), 3.0)
        truth = np.digitize(blobs, np.quantile(blobs, [0.5, 0.8])).astype(np.uint8)
        image = sitk.GetImageFromArray(truth)
        image.SetSpacing((1.0, 1.2, 1.7))
        stored = volume_of(sitk.DICOMOrient(image, code))
        scan = dataclasses.replace(stored, array=stored.array * np.float32(100))
        prepared = Preprocessing("mr", image_size, crop=False, plane=plane).prepare(scan)
        labels = prepared.labels(stored)
        assert labels.dtype == torch.uint8
        assert labels.shape == (len(prepared), image_size, image_size)
        middle, end = len(prepared) // 2, len(prepared)
        parts = [
            prepared.restore(one_hot(labels[start:stop], 3), start, stop)
            for start, stop in [(0, middle), (middle, end)]
        ]
        restored = np.concatenate(parts)
        np.testing.assert_allclose(restored.sum(1), 1, atol=1e-5)
        back = prepared.to_volume_array(restored.argmax(1))
        assert (back == stored.array).mean() > 0.99

    def test_outside_the_field_of_view_is_background(self):
        array = np.full((2, 40, 80), -1000, np.int16)
        array[:, 10:30, 30:50] = 50
        prepared = Preprocessing(**CT, image_size=32).prepare(Volume(array))
        ones = torch.zeros(2, 3, 32, 32)
        ones[:, 2] = 1
        restored = prepared.restore(ones, 0, 2)
        assert restored.shape == (2, 3, 40, 80)
        assert (restored[:, 2, 10:30, 30:50] > 0.999).all()
        assert (restored[:, 0, :, :20] == 1).all()
        assert (restored[:, 2, :, :20] == 0).all()
        np.testing.assert_allclose(restored.sum(1), 1, atol=1e-6)
        alone = prepared.restore(ones[:, 2:], 0, 2)
        assert (alone[:, 0, :, :20] == 0).all()

    def test_restored_ramp_is_a_ramp(self):
        volume = Volume(np.zeros((1, 16, 16), np.int16))
        prepared = Preprocessing(**CT, image_size=48, crop=False).prepare(volume)
        ramp = torch.arange(48.0).expand(1, 1, 48, 48)
        restored = prepared.restore(ramp, 0, 1)[0, 0]
        expected = np.arange(16) * 3 + 1
        np.testing.assert_allclose(restored[:, 1:-1], np.tile(expected[1:-1], (16, 1)), atol=1e-4)

    def test_label_stored_with_other_axes(self, lps_image: sitk.Image):
        """A DICOM series and its NIfTI segmentation differ by flips of the same voxels."""
        scan = volume_of(lps_image)
        mask = sitk.Cast(lps_image > 100, sitk.sitkUInt16) * 1000
        prepared = Preprocessing("mr", 32).prepare(scan)
        same = prepared.labels(volume_of(mask))
        flipped = prepared.labels(volume_of(sitk.DICOMOrient(mask, "RSA")))
        assert (same.dtype, same.max()) == (torch.int64, 1000)
        assert torch.equal(same, flipped)

    @pytest.mark.parametrize(("error", "words", "call"), [
        (GeometryError, "grid", lambda p: p.labels(Volume(np.zeros((2, 8, 9), np.uint8)))),
        (GeometryError, "grid",
         lambda p: p.labels(Volume(np.zeros((2, 8, 8), np.uint8), spacing=(1, 1, 2)))),
        (LabelError, "float32", lambda p: p.labels(Volume(np.zeros((2, 8, 8), np.float32)))),
        (LabelError, "-1", lambda p: p.labels(Volume(np.full((2, 8, 8), -1, np.int16)))),
        (ArgumentError, "slices", lambda p: p.restore(torch.zeros(2, 3, 8, 9), 0, 2)),
        (ArgumentError, "slices", lambda p: p.restore(torch.zeros(1, 3, 8, 8), 0, 2)),
        (ArgumentError, "slices", lambda p: p.restore(torch.zeros(2, 8, 8), 0, 2)),
        (ArgumentError, "start, stop", lambda p: p.images(-1, 1)),
        (ArgumentError, "start, stop", lambda p: p.images(1, 3)),
        (ArgumentError, "start, stop", lambda p: p.images(2, 1)),
        (ArgumentError, "array", lambda p: p.to_volume_array(np.zeros((8, 8, 2)))),
    ])  # fmt: skip
    def test_what_does_not_fit_the_volume_is_refused(
        self, error: type[Exception], words: str, call: Callable[[PreparedVolume], object]
    ):
        prepared = Preprocessing("mr", 8).prepare(Volume(np.zeros((2, 8, 8), np.uint8)))
        with pytest.raises(error, match=words):
            call(prepared)


class TestSettings:
    @pytest.mark.parametrize("preprocessing", [
        Preprocessing(**CT, image_size=128, crop=False), Preprocessing("mr", plane="sagittal"),
    ])  # fmt: skip
    def test_dict_round_trip_through_json(self, preprocessing: Preprocessing):
        fields = json.loads(json.dumps(preprocessing.to_dict()))
        assert Preprocessing.from_dict(fields) == preprocessing

    @pytest.mark.parametrize("fields", [
        {}, {"modality": "pet"}, {"modality": "mr", "size": 3}, {"modality": "mr", "image_size": 0},
        {"modality": "mr", "image_size": 2.5}, {"modality": "mr", "plane": "oblique"},
        {"modality": "mr", "mean": 1.0, "std": 1.0}, {"modality": "ct"},
        {"modality": "ct", "mean": 1.0}, {"modality": "ct", "mean": 1.0, "std": 0.0},
        {"modality": "ct", "mean": float("nan"), "std": 1.0},
    ])  # fmt: skip
    def test_unusable_settings(self, fields: dict):
        with pytest.raises(ArgumentError):
            Preprocessing.from_dict(fields)


@pytest.mark.parametrize(("fields", "direction"), [
    (CT, (1, 0, 0, 0, 1, 0, 0, 0, 1)), ({"modality": "mr"}, (0, 0, -1, 1, 0, 0, 0, 1, 0)),
])  # fmt: skip
def test_memory_is_flat_in_the_number_of_slices(fields: dict, direction: tuple):
    """200 slices of 512 x 512 int16 are 100 MB; preparing and iterating takes far less on top."""
    volume = Volume(np.zeros((200, 512, 512), np.int16), direction=direction)
    volume.array[20:180, 100:400, 120:420] = 1000
    tracemalloc.start()
    try:
        prepared = Preprocessing(**fields).prepare(volume)
        for start in range(0, 64, 8):
            prepared.images(start, start + 8)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.shares_memory(prepared.to_canonical(volume.array), volume.array)
    assert held < 3e6
    assert peak < 50e6


@pytest.mark.data
class TestRealScans:
    @pytest.mark.parametrize(("folder", "modality"), [
        ("ixi_brain_mr", "mr"), ("openkbp_hn_ct", "ct"), ("msd_hippocampus_mr", "mr"),
    ])  # fmt: skip
    def test_labels_survive_the_round_trip(self, test_data: Path, folder: str, modality: str):
        dataset = open_dataset(test_data / folder)
        scan, truth = read_volume(dataset.cases[1].image), read_label(dataset.cases[1].label)
        prepared = Preprocessing.fit([scan], modality, 256).prepare(scan)
        labels = prepared.labels(truth)
        classes = max(dataset.labels) + 1
        back = np.empty_like(truth.array)
        canonical_back = prepared.to_canonical(back)
        for start in range(0, len(prepared), 16):
            stop = min(start + 16, len(prepared))
            restored = prepared.restore(one_hot(labels[start:stop], classes), start, stop)
            canonical_back[start:stop] = restored.argmax(1)
        for label in dataset.labels:
            a, b = back == label, truth.array == label
            assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.98

    def test_dicom_series_with_its_nifti_segmentation(self, test_data: Path):
        """The segmentation is stored with rows the other way round: bone must lie on bone."""
        folder = test_data / "dicom" / "totalseg_ct_jpeg2000"
        scan, label = read_volume(folder / "series"), read_label(folder / "seg.nii.gz")
        prepared = Preprocessing.fit([scan], "ct").prepare(scan)
        labels, images = prepared.labels(label), prepared.images(0, len(prepared))[:, 0]
        lines = (folder / "seg_labels.csv").read_text().splitlines()
        bones = [line for line in lines if re.search("vertebrae|rib_|hip_|femur|sacrum", line)]
        numbers = [int(line.split(",")[0]) for line in bones]
        inside = torch.isin(labels, torch.tensor(numbers, dtype=labels.dtype))
        assert inside.any()
        assert torch.isfinite(images).all()
        assert images[inside].mean() > images[(labels > 0) & ~inside].mean() + 0.5
