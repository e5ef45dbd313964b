# SPDX-License-Identifier: Apache-2.0
"""Enhanced CT and MR: one file with a position for every frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.dicom import STRAIGHT, compress, enhanced, groups, save, write_slices

from fastproto.data import read_volume
from fastproto.errors import GeometryError, VolumeError

STACK = np.random.default_rng(0).integers(0, 4000, (5, 64, 72)).astype("u2")
ORDER = [3, 0, 4, 1, 2]  # of the frames in the file
UPWARDS = [(-20.5, 30.25, -3 + 2.5 * z) for z in range(5)]


@pytest.mark.parametrize("method", [None, "rle", "jpeg", "j2k"])
def test_values_order_and_geometry(tmp_path: Path, method: str | None):
    """Frames in any order, each with its rescaling."""
    rescaling = [(1 + index, -1024 - index) for index in range(5)]
    dataset = enhanced(
        STACK[ORDER], [UPWARDS[z] for z in ORDER], [rescaling[z] for z in ORDER],
        PhotometricInterpretation="MONOCHROME1",
    )  # fmt: skip
    path = save(dataset, tmp_path / "scan")
    if method:
        compress(tmp_path, method)
    for source in (path, tmp_path):
        volume = read_volume(source)
        slope, intercept = np.array(rescaling).T[:, :, None, None]
        np.testing.assert_array_equal(volume.array, STACK * slope + intercept)
        np.testing.assert_allclose(volume.spacing, (0.7, 0.9, 2.5))
        np.testing.assert_allclose(volume.origin, (-20.5, 30.25, -3))
        np.testing.assert_allclose(volume.direction, np.eye(3).ravel())
        assert volume.path == source


def test_oblique_frames_and_shared_rescaling(tmp_path: Path):
    row, column = np.array([0.8, 0.6, 0]), np.array([0, 0, -1.0])
    normal = np.cross(row, column)
    dataset = enhanced(STACK, [5 + 1.5 * z * normal for z in range(5)], axes=[[*row, *column]] * 5)
    item = {"RescaleSlope": 0.5, "RescaleIntercept": 0, "RescaleType": "US"}
    shared = dataset.SharedFunctionalGroupsSequence[0]
    shared.update(groups(PixelValueTransformationSequence=item))
    volume = read_volume(save(dataset, tmp_path / "scan.dcm"))
    np.testing.assert_array_equal(volume.array, STACK / 2)
    assert volume.spacing[2] == pytest.approx(1.5)
    expected = np.stack([row, column, normal], axis=1).ravel()
    np.testing.assert_allclose(volume.direction, expected, atol=1e-9)


def test_a_series_of_several_files(tmp_path: Path):
    """The upper half in one, the lower in the other."""
    save(enhanced(STACK[3:], UPWARDS[3:]), tmp_path / "a")
    save(enhanced(STACK[:3], UPWARDS[:3]), tmp_path / "b")
    np.testing.assert_array_equal(read_volume(tmp_path).array, STACK)


SIDEWAYS = (0, 1, 0, 0, 0, -1)


@pytest.mark.parametrize(("positions", "options", "kind", "words"), [
    ([UPWARDS[z] for z in (0, 1, 3, 4)], {}, VolumeError,
     r"a gap of 5\.00 mm .*\(scan frame 2, scan frame 3\)"),
    ([UPWARDS[z] for z in (0, 1, 2, 2)], {}, VolumeError,
     r"two slices at .*\(scan frame 3, scan frame 4\).*single phase, echo or stack"),
    (UPWARDS[:4], {"axes": [STRAIGHT] * 2 + [SIDEWAYS] * 2}, GeometryError,
     r"different orientation \(scan frame 1, scan frame 3\)"),
    (UPWARDS[:3], {}, VolumeError, "3 positions for 4 frames"),
    ([(0, 0.5 * z, z) for z in range(4)], {}, GeometryError, "gantry tilt"),
    (UPWARDS[:4], {"PerFrameFunctionalGroupsSequence": None}, VolumeError,
     "0 positions for 4 frames"),
    (UPWARDS[:4], {"PixelData": bytes(4 * 64 * 72 * 2 - 2)}, VolumeError, "damaged or truncated"),
])  # fmt: skip
def test_refused(tmp_path: Path, positions: list, options: dict, kind: type, words: str):
    path = save(enhanced(STACK[:4], positions, **options), tmp_path / "scan")
    with pytest.raises(kind, match=words):
        read_volume(path)


def test_a_frame_that_lost_its_rescaling(tmp_path: Path):
    """Its values would be wrong by the intercept."""
    scan = enhanced(STACK[:4], UPWARDS[:4], rescaling=[(1, -1024)] * 4)
    del scan.PerFrameFunctionalGroupsSequence[2].PixelValueTransformationSequence
    path = save(scan, tmp_path / "scan")
    with pytest.raises(
        VolumeError, match=r"rescale slope and intercept and without \(scan frame 3\)"
    ):
        read_volume(path)


def test_one_slice_is_no_scan(tmp_path: Path):
    write_slices(tmp_path, STACK, range(5))
    with pytest.raises(VolumeError, match=r"single slice.*Name the folder"):
        read_volume(tmp_path / "IM00")
