# SPDX-License-Identifier: Apache-2.0
"""The phantom: a valid data set, reproducible, anatomically in place, varied, and not trivial."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import center_of_mass

from fastproto.cli import main
from fastproto.data.dataset import open_dataset
from fastproto.data.phantom import ORGANS, make_patient, write_phantom
from fastproto.data.phantom_image import bias_field
from fastproto.data.volume import Volume, check_same_grid, read_label, read_volume
from fastproto.errors import ArgumentError, OutputError
from fastproto.evaluation.metrics import dice

SMALL = (12, 48, 48)


def centroid_lps(label: Volume, value: int) -> np.ndarray:
    """Centre of an organ in mm, LPS."""
    index = np.array(center_of_mass(label.array == value))[::-1]
    matrix = np.reshape(label.direction, (3, 3)) * np.array(label.spacing)
    return np.array(label.origin) + matrix @ index


def organ_means(image: Volume, label: Volume) -> dict[str, float]:
    return {name: float(image.array[label.array == v].mean()) for v, name in ORGANS.items()}


@pytest.mark.parametrize("modality", ["ct", "mr"])
def test_writes_a_data_set_that_reads_back(tmp_path: Path, modality: str) -> None:
    folder = write_phantom(tmp_path / "set", patients=2, modality=modality, seed=4, shape=SMALL)
    opened = open_dataset(folder)
    assert (opened.modality, opened.labels) == (modality, ORGANS)
    assert [case.id for case in opened.cases] == [f"{modality}_000", f"{modality}_001"]
    assert sorted(p.name for p in folder.iterdir()) == ["dataset.json", "images", "labels"]
    assert json.loads((folder / "dataset.json").read_text())["labels"]["0"] == "background"
    for index, case in enumerate(opened.cases):
        image, label = read_volume(case.image), read_label(case.label)
        check_same_grid(image, label)
        assert image.array.shape == SMALL
        made, made_label = make_patient(index, modality=modality, seed=4, shape=SMALL)
        check_same_grid(image, made)
        np.testing.assert_array_equal(image.array, made.array)
        np.testing.assert_array_equal(label.array, made_label.array)


def test_a_patient_depends_on_seed_and_index_alone() -> None:
    image, label = make_patient(3, seed=1, shape=SMALL)
    again, again_label = make_patient(3, seed=1, shape=SMALL)
    np.testing.assert_array_equal(image.array, again.array)
    np.testing.assert_array_equal(label.array, again_label.array)
    for name in ("origin", "spacing", "direction"):
        assert getattr(image, name) == getattr(again, name)
    for other in (make_patient(4, seed=1, shape=SMALL), make_patient(3, seed=2, shape=SMALL)):
        assert dice(label.array > 0, other[1].array > 0) < 0.97
        assert image.spacing != other[0].spacing
        assert image.origin != other[0].origin


def test_ct_and_mr_of_one_patient_show_the_same_anatomy() -> None:
    ct, ct_label = make_patient(0, modality="ct", shape=SMALL)
    mr, mr_label = make_patient(0, modality="mr", shape=SMALL)
    check_same_grid(ct, mr)
    np.testing.assert_array_equal(ct_label.array, mr_label.array)
    assert abs(np.corrcoef(ct.array.ravel(), mr.array.ravel())[0, 1]) < 0.9


@pytest.mark.parametrize("shape", [(8, 32, 32), (24, 64, 64)])
def test_every_patient_has_every_organ(shape: tuple[int, int, int]) -> None:
    for index in range(12):
        _, label = make_patient(index, seed=9, shape=shape)
        assert set(np.unique(label.array)) == {0, *ORGANS}


def test_organs_vary_in_size_and_shape() -> None:
    labels = [make_patient(index, shape=(24, 64, 64))[1] for index in range(8)]
    for value in ORGANS:
        ml = [np.sum(label.array == value) * np.prod(label.spacing) / 1000 for label in labels]
        assert max(ml) > 1.15 * min(ml)
        overlaps = [dice(labels[0].array == value, other.array == value) for other in labels[1:]]
        assert np.mean(overlaps) < 0.85


@pytest.mark.parametrize("orientation", [None, "LPS", "PSR"])
def test_organs_lie_where_they_belong(orientation: str | None) -> None:
    for index in range(2):
        image, label = make_patient(index, shape=(24, 64, 64), orientation=orientation)
        place = {name: centroid_lps(label, value) for value, name in ORGANS.items()}
        left, back, up = np.eye(3)
        assert place["right kidney"] @ left + 50 < place["left kidney"] @ left
        assert place["liver"] @ left + 50 < place["spleen"] @ left
        assert place["aorta"] @ back + 10 < place["spine"] @ back
        assert place["stomach"] @ back < place["spleen"] @ back
        assert place["psoas muscles"] @ up < place["liver"] @ up < place["lungs"] @ up
        letters = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.direction)
        assert letters == (orientation or ("LPS", "RAS")[index])
        assert not np.allclose(np.abs(image.direction), np.abs(np.rint(image.direction)))
        assert np.abs(image.origin).min() > 0.1


def test_stored_orientation_changes_no_voxel_in_space() -> None:
    image, label = make_patient(0, shape=SMALL, orientation="LPS")
    turned, turned_label = make_patient(0, shape=SMALL, orientation="PSR")
    np.testing.assert_array_equal(np.sort(image.array, None), np.sort(turned.array, None))
    for value in ORGANS:
        np.testing.assert_allclose(
            centroid_lps(label, value), centroid_lps(turned_label, value), atol=1e-3
        )


def test_spacing_is_that_of_a_body_at_any_size() -> None:
    for shape in (SMALL, (48, 128, 128)):
        image, _ = make_patient(2, shape=shape)
        x, y, z = np.array(image.spacing) * shape[::-1]
        assert 300 < x < 450
        assert x == pytest.approx(y)
        assert 200 < z < 280
        assert image.spacing[2] > 1.3 * image.spacing[0]


def test_ct_intensities_are_plausible() -> None:
    for index in range(4):
        image, label = make_patient(index, modality="ct", shape=(24, 64, 64))
        means = organ_means(image, label)
        assert image.array[:, :3].mean() == pytest.approx(-1000, abs=30)
        assert means["lungs"] < -600
        assert 50 < means["liver"] < 150
        assert means["gallbladder"] < means["liver"] - 25
        assert means["spine"] > means["psoas muscles"] + 30
        air = image.array[:, :3].astype(float)
        assert 5 < air.std() < 25


def test_mr_intensities_are_plausible_with_rician_noise() -> None:
    gains = []
    for index in range(4):
        image, label = make_patient(index, modality="mr", shape=(24, 64, 64))
        air = image.array[:, :3].astype(float)
        assert image.array.min() >= 0
        # Rayleigh distribution, which Rician noise is where there is no signal.
        assert air.mean() / air.std() == pytest.approx(1.913, rel=0.06)
        means = organ_means(image, label)
        assert means["aorta"] < means["liver"] < means["spleen"] < means["gallbladder"]
        gains.append(means["spine"])
    assert max(gains) > 1.5 * min(gains)


def test_bias_field_is_smooth_and_not_constant() -> None:
    for seed in range(4):
        field = bias_field(np.random.default_rng(seed), (24, 64, 64))
        assert 0.4 < field.min() < field.max() < 2.5
        assert field.max() > 1.15 * field.min()
        assert max(np.abs(np.diff(field, axis=axis)).max() for axis in range(3)) < 0.06


@pytest.mark.parametrize("modality", ["ct", "mr"])
def test_intensity_alone_does_not_tell_the_organs_apart(modality: str) -> None:
    """Assigning each voxel to the organ with the nearest mean fails, but beats chance."""
    image, label = make_patient(1, modality=modality, shape=(24, 64, 64))
    means = np.array(list(organ_means(image, label).values()))
    nearest = np.abs(image.array[..., None] - means).argmin(-1) + 1
    recall = [np.mean(nearest[label.array == value] == value) for value in ORGANS]
    assert 0.3 < np.mean(recall) < 0.8
    overlaps = [dice(nearest == value, label.array == value) for value in ORGANS]
    assert np.mean(overlaps) < 0.55


@pytest.mark.parametrize(("options", "subject"), [
    ({"patients": 0}, "patients"), ({"modality": "pet"}, "modality"), ({"seed": -1}, "seed"),
    ({"shape": (4, 128, 128)}, "shape"), ({"shape": (48, 128)}, "shape"),
    ({"orientation": "LRS"}, "orientation"), ({"orientation": "axial"}, "orientation"),
])  # fmt: skip
def test_bad_arguments_are_named(tmp_path: Path, options: dict, subject: str) -> None:
    with pytest.raises(ArgumentError) as error:
        write_phantom(tmp_path / "set", **options)
    assert error.value.subject == subject
    assert not (tmp_path / "set").exists()


def test_replaces_a_phantom_but_nothing_else(tmp_path: Path) -> None:
    folder = write_phantom(tmp_path / "set", patients=2, shape=(8, 32, 32))
    write_phantom(folder, patients=1, modality="mr", shape=(8, 32, 32))
    assert [case.id for case in open_dataset(folder).cases] == ["mr_000"]
    assert [p.name for p in (folder / "labels").iterdir()] == ["mr_000.nii.gz"]
    (folder / "images" / ".partial-x.nii.gz").write_bytes(b"of a killed process")
    (folder / "results").mkdir()
    write_phantom(folder, patients=1, shape=(8, 32, 32))
    assert [p.name for p in (folder / "images").iterdir()] == ["ct_000.nii.gz"]
    assert (folder / "results").is_dir()


@pytest.mark.parametrize(("files", "found"), [
    ({"dataset.json": "{}"}, "other files"),
    ({"dataset.json": "no JSON"}, "other files"),
    ({"dataset.json": '["fastproto phantom"]'}, "other files"),
    ({"dataset.json": '{"name": "better than \\"fastproto phantom\\"", "cases": []}'}, "other"),
    ({"dataset.json": '{"generator": "fastproto phantom"}'}, "other files"),
    ({"scan.nii.gz": "mine"}, "other files"),
    ({"images/ct_000.nii.gz": "mine"}, "other files"),
    (
        {
            "dataset.json": '{"generator": "fastproto phantom", "cases": ["ct_000"]}',
            "images/ct_000.nii.gz": "synthetic",
            "images/ct_001.nii.gz": "mine",
            "labels/drawn.nii.gz": "mine",
        },
        "somebody added ct_001.nii.gz, drawn.nii.gz",
    ),
])  # fmt: skip
def test_what_it_did_not_make_stays(tmp_path: Path, files: dict, found: str, capsys) -> None:
    folder = tmp_path / "mine"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    assert main(["phantom", "--out", str(folder), "--patients", "1"]) == 2
    assert f"{folder}: found a" in (said := capsys.readouterr().err)
    assert found in said
    left = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert left == files
    with pytest.raises(OutputError, match="found a file;"):
        write_phantom(folder / next(iter(files)), patients=1, shape=(8, 32, 32))
