# SPDX-License-Identifier: Apache-2.0
"""Clipping and normalising CT and MR."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastproto.data import Preprocessing, Volume, read_volume
from fastproto.data.intensity import check_intensities, guess_modality, upper_value
from fastproto.data.phantom import make_patient
from fastproto.errors import ArgumentError, FastprotoWarning, VolumeError


def test_ct_is_clipped_and_normalised_and_padded_with_air():
    array = np.tile(np.array([-1000, -125, 10, 110, 275, 3000], np.int16), (1, 10, 1))
    images = Preprocessing("ct", 10, 10.0, 100.0, crop=False).prepare(Volume(array)).images(0, 1)
    expected = torch.tensor([-1.35, -1.35, -1.35, -1.35, 0, 1, 2.65, 2.65, -1.35, -1.35])
    torch.testing.assert_close(images[0, 0], expected.expand(10, 10))


def test_mr_zscore_after_clipping_the_top():
    array = np.random.default_rng(0).gamma(2, 100, (20, 30, 40)).astype(np.float32)
    array[3, 4, 5] = 1.7e6
    clipped = np.minimum(array, np.quantile(array, 0.995, method="inverted_cdf"))
    expected = (clipped - clipped.mean(dtype=float)) / clipped.std(dtype=float)
    images = Preprocessing("mr", 40, crop=False).prepare(Volume(array)).images(0, 20)
    inside = images[:, 0, 5:35, :].numpy()
    np.testing.assert_allclose(inside, expected, atol=1e-4)


@pytest.mark.parametrize("value", [0, -3, 1234.567])
def test_constant_mr_becomes_zero(value: float):
    array = np.full((3, 10, 7), value, np.float32)
    images = Preprocessing("mr", 16).prepare(Volume(array)).images(0, 3)
    assert torch.equal(images, torch.zeros(3, 1, 16, 16))


def test_fit_is_mean_and_deviation_of_all_clipped_voxels():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-1024, 2000, (4, 5, 6)).astype(np.int16) for _ in range(3)]
    arrays.append(rng.normal(0, 200, (7, 8, 9)).astype(np.float32))
    pooled = np.clip(np.concatenate([a.ravel() for a in arrays]).astype(float), -125, 275)
    fitted = Preprocessing.fit((Volume(a) for a in arrays), "ct", 64, plane="coronal")
    assert fitted.mean == pytest.approx(pooled.mean())
    assert fitted.std == pytest.approx(pooled.std())
    assert (fitted.image_size, fitted.plane) == (64, "coronal")
    assert Preprocessing.fit(iter([]), "mr", 64) == Preprocessing("mr", 64)


@pytest.mark.parametrize("volumes", [[], [Volume(np.full((3, 3, 3), 5000))]])
def test_fit_needs_a_spread(volumes: list[Volume]):
    with pytest.raises(ArgumentError, match="volumes"):
        Preprocessing.fit(volumes, "ct")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=60),
    st.floats(0.01, 1),
)
def test_upper_value_is_the_quantile(values: list[float], fraction: float):
    array = np.array(values, np.float32).reshape(1, 1, -1)
    expected = np.quantile(array, fraction, method="inverted_cdf")
    assert upper_value(array, fraction) == expected


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64])
def test_upper_value_of_other_types_and_many_blocks(dtype: type):
    array = np.random.default_rng(0).integers(0, 200, (12, 400, 500)).astype(dtype)
    array = array[:, ::-1].transpose(2, 0, 1)
    assert upper_value(array, 0.995) == np.quantile(array, 0.995, method="inverted_cdf")


Change = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def scans() -> dict[str, np.ndarray]:
    """One patient in CT and in MR, and a CT of fat and soft tissue without any air."""
    scans = {m: make_patient(3, modality=m)[0].array for m in ("ct", "mr")}
    rng = np.random.default_rng(0)
    scans["crop"] = rng.choice([-110, 0, 50, 300], (20, 30, 30), p=[0.3, 0.1, 0.5, 0.1])
    scans["crop"] += rng.normal(0, 20, (20, 30, 30)).astype(np.int64)
    return scans


def plus(offset: float) -> Change:
    return lambda array: array + offset


def times(factor: float) -> Change:
    return lambda array: array * factor


def clipped(low: float, high: float) -> Change:
    return lambda array: array.clip(low, high)


def from_0_to(top: float) -> Change:
    return lambda array: top * (array - array.min()) / np.ptp(array)


def z_score(array: np.ndarray) -> np.ndarray:
    return (array - array.mean()) / array.std()


def padded(value: int) -> Change:
    """As scanners fill what lies beyond their round field of view."""

    def pad(array: np.ndarray) -> np.ndarray:
        rows, columns = np.ogrid[-1 : 1 : array.shape[1] * 1j, -1 : 1 : array.shape[2] * 1j]
        return np.where(rows**2 + columns**2 > 1, value, array)

    return pad


def constant(array: np.ndarray) -> np.ndarray:
    return np.full(array.shape, 7)


@pytest.mark.parametrize(
    ("scan", "modality", "change"),
    [
        *(("ct", "ct", plus(offset)) for offset in (0, 24, -24)),
        *(("ct", "ct", padded(value)) for value in (-1024, -2000, -3024)),
        *(("ct", "ct", clipped(*w)) for w in ((-125, 275), (-200, 300), (-1000, 1000))),
        ("crop", "ct", plus(0)),
        *(("mr", "mr", times(factor)) for factor in (0.1, 1, 1000)),
        *(("mr", "mr", change) for change in (z_score, from_0_to(1), from_0_to(255), plus(-100))),
    ],
)
def test_scans_that_a_model_of_their_modality_takes(scans, scan, modality, change):
    array = change(scans[scan])
    for tag in (None, "OT", modality.upper()):
        check_intensities(Volume(array, modality=tag), modality)


NOT_HU = "a CT whose numbers are not Hounsfield units"


@pytest.mark.parametrize("modality", ["ct", "mr"])
@pytest.mark.parametrize(
    ("scan", "change", "words"),
    [
        ("ct", plus(1024), rf"{NOT_HU} \(air at \S+, soft tissue at \S+\)"),
        ("ct", plus(-1024), NOT_HU),
        ("ct", from_0_to(1), rf"{NOT_HU} \(air at 0\S*, soft tissue at 0.7"),
        ("ct", from_0_to(255), NOT_HU),
        ("ct", z_score, NOT_HU),
        ("ct", constant, r"one value everywhere \(7\)"),
        ("mr", constant, r"one value everywhere \(7\)"),
    ],
)
def test_numbers_that_no_model_was_trained_on(scans, scan, change, words, modality):
    volume = Volume(change(scans[scan]))
    with pytest.raises(VolumeError, match=words):
        check_intensities(volume, modality)
    with pytest.raises(VolumeError, match=words):  # as `learn` does
        check_intensities(volume, guess_modality(volume))
    with pytest.warns(FastprotoWarning, match=words):
        check_intensities(volume, modality, force=True)


@pytest.mark.parametrize(
    ("scan", "change", "modality", "words"),
    [
        ("ct", plus(0), "mr", "the values of a CT: air at -1000"),
        ("ct", padded(-3024), "mr", "the values of a CT: air at -1000"),
        ("crop", plus(0), "mr", "the values of a CT: fat about -100"),
        ("mr", plus(0), "ct", "values from"),
        ("mr", times(0.1), "ct", "none of them of air or fat"),
        ("mr", z_score, "ct", "none of them of air or fat"),
        ("ct", clipped(0, 255), "ct", "none of them of air or fat"),  # as pictures for a display
        ("crop", plus(1024), "ct", "hardly any of fat or soft tissue"),
    ],
)
def test_scans_of_the_other_modality(scans, scan, change, modality, words):
    with pytest.raises(VolumeError, match=words):
        check_intensities(Volume(change(scans[scan])), modality)


@pytest.mark.parametrize(("tag", "modality"), [("MR", "ct"), ("PT", "ct"), ("CT", "mr")])
def test_what_dicom_says_counts(scans, tag, modality):
    with pytest.raises(VolumeError, match=f"a scan of DICOM modality {tag}"):
        check_intensities(Volume(scans[modality], modality=tag), modality)
    assert guess_modality(Volume(scans["mr"], modality="CT")) == "ct"
    assert guess_modality(Volume(scans["ct"], modality="MR")) == "mr"


def test_a_ct_within_one_organ_has_neither_air_nor_fat():
    rng = np.random.default_rng(0)
    liver = Volume(rng.normal(100, 15, (20, 20, 20)))
    check_intensities(liver, "ct")
    noisy = rng.normal(35, 25, (20, 20, 20)).clip(0)
    check_intensities(Volume(noisy, modality="CT"), "ct")
    with pytest.raises(VolumeError, match="none of them of air or fat"):
        check_intensities(Volume(noisy), "ct")  # or an MR


def test_the_modality_is_guessed(scans):
    for scan, modality in (("ct", "ct"), ("crop", "ct"), ("mr", "mr")):
        for tag in (None, "PT", "OT"):
            assert guess_modality(Volume(scans[scan], modality=tag)) == modality
    for change in (z_score, times(1000), plus(-100)):
        assert guess_modality(Volume(change(scans["mr"]))) == "mr"


@pytest.mark.data
def test_real_scans_are_told_apart(test_data):
    paths = [(path, "mr") for path in sorted(test_data.glob("*_mr/images/*.nii.gz"))]
    paths += [(path, "ct") for path in sorted(test_data.glob("openkbp_hn_ct*/images/*.nii.gz"))]
    examples = ("ct_whole", "ct_small", "mr_small")
    paths += [(test_data / f"totalseg_examples/{name}.nii.gz", name[:2]) for name in examples]
    paths += [(test_data / "dicom/totalseg_ct_jpeg2000/series", "ct")]
    for path, modality in paths:
        volume = read_volume(path)
        for each in (volume, dataclasses.replace(volume, modality=None)):
            assert guess_modality(each) == modality, path
            check_intensities(each, modality)
            with pytest.raises(VolumeError):
                check_intensities(each, "mr" if modality == "ct" else "ct")
    odd = read_volume(test_data / "dicom/torchio_small/series")  # an MR that says it is a CT
    for modality, words in (("ct", "values from 0 to 696"), ("mr", "DICOM modality CT")):
        with pytest.raises(VolumeError, match=words):
            check_intensities(odd, modality)
