# SPDX-License-Identifier: Apache-2.0
"""Reports against hand-computed ones: what counts, how it is averaged, how files are paired."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastproto.data.phantom import ORGANS, make_patient, write_phantom
from fastproto.data.volume import Volume, write_volume
from fastproto.errors import (
    ArgumentError,
    DatasetError,
    GeometryError,
    InputError,
    LabelError,
    OutputError,
)
from fastproto.evaluation import evaluate_case, evaluate_folder
from fastproto.evaluation.metrics import METRICS, dice

SPACING = (1.5, 1.0, 4.0)  # x, y, z
NAMES = {1: "liver", 2: "spleen", 3: "kidney", 4: "aorta"}


def volume(array: np.ndarray, **geometry: tuple[float, ...]) -> Volume:
    return Volume(**{"array": array.astype(np.uint8), "spacing": SPACING} | geometry)


def pair() -> tuple[Volume, Volume]:
    """Liver overlaps, the spleen is missed, the kidney is spurious, the aorta is in neither."""
    truth, prediction = np.zeros((2, 10, 20, 20))
    truth[2:6, 2:12, 2:12] = 1
    prediction[2:8, 4:12, 2:12] = 1
    truth[3:5, 15:18, 15:18] = 2
    prediction[1:2, 15:18, 2:4] = 3
    return volume(prediction), volume(truth)


def by_organ(rows: list[dict]) -> dict[str, dict]:
    return {row["organ"]: row for row in rows}


def test_rows_hold_the_metrics_of_each_organ() -> None:
    prediction, truth = pair()
    rows = by_organ(evaluate_case(prediction, truth, NAMES, nsd_tolerance=1.0))
    assert list(rows) == list(NAMES.values())
    a, b = prediction.array == 1, truth.array == 1
    liver = rows["liver"]
    assert liver["dice"] == dice(a, b) == pytest.approx(2 * 320 / (400 + 480))
    for metric in METRICS:
        assert liver[metric.name] == pytest.approx(metric(a, b, SPACING[::-1], 1.0))
    assert liver["truth_ml"] == pytest.approx(400 * 6 / 1000)
    assert liver["prediction_ml"] == pytest.approx(480 * 6 / 1000)
    assert [row["status"] for row in rows.values()] == ["measured", "missed", "spurious", "absent"]
    for organ in ("spleen", "kidney"):
        assert rows[organ]["dice"] == rows[organ]["nsd"] == 0
        assert math.isnan(rows[organ]["hd95"])
    assert math.isnan(rows["aorta"]["dice"])


def test_labels_choose_what_is_measured() -> None:
    prediction, truth = pair()
    rows = evaluate_case(prediction, truth, {2: "spleen"})
    assert [row["label"] for row in rows] == [2]


@pytest.mark.parametrize(
    ("margin", "first", "last"), [(0, 2, 6), (1, 1, 7), (2, 0, 8), (50, 0, 10), (None, 0, 10)]
)
def test_z_margin_counts_the_slices_of_the_organ_in_the_truth(
    margin: int | None, first: int, last: int
) -> None:
    prediction, truth = pair()
    row = evaluate_case(prediction, truth, {1: "liver"}, z_margin=margin)[0]
    a, b = (prediction.array == 1)[first:last], (truth.array == 1)[first:last]
    assert row["dice"] == dice(a, b)
    assert row["prediction_ml"] == pytest.approx(a.sum() * 6 / 1000)
    for metric in METRICS:
        assert row[metric.name] == pytest.approx(metric(a, b, SPACING[::-1]))


def test_z_margin_counts_nothing_for_an_organ_absent_in_the_truth() -> None:
    rows = by_organ(evaluate_case(*pair(), NAMES, z_margin=3))
    assert rows["kidney"]["status"] == "absent"
    assert rows["spleen"]["status"] == "missed"


@pytest.mark.parametrize("orientation", ["LPS", "RAI", "PSR", "SAL"])
def test_z_margin_runs_along_the_patient_however_the_axes_are_stored(orientation: str) -> None:
    """The same patient stored differently gives the same numbers, up to the order of sums."""
    _, truth = make_patient(0, shape=(12, 48, 48), orientation=orientation)
    _, reference = make_patient(0, shape=(12, 48, 48), orientation="LPS")
    everywhere = [
        Volume(np.where(v.array == 4, 4, 1).astype(np.uint8), v.spacing, v.origin, v.direction)
        for v in (truth, reference)
    ]
    rows = evaluate_case(everywhere[0], truth, {1: "liver", 4: "left kidney"}, z_margin=1)
    expected = evaluate_case(everywhere[1], reference, {1: "liver", 4: "left kidney"}, z_margin=1)
    slices = np.flatnonzero((reference.array == 1).any(axis=(1, 2)))
    start, stop = max(slices[0] - 1, 0), slices[-1] + 2
    in_range = everywhere[1].array[start:stop]
    voxel_ml = np.prod(reference.spacing) / 1000
    assert rows[0]["prediction_ml"] == pytest.approx(np.sum(in_range == 1) * voxel_ml)
    assert rows[1]["dice"] == 1
    for row, other in zip(rows, expected, strict=True):
        for metric in METRICS:
            assert row[metric.name] == pytest.approx(other[metric.name], abs=1e-6)


def test_other_grids_and_bad_arguments_are_refused() -> None:
    prediction, truth = pair()
    for other in (
        volume(prediction.array[:-1]),
        volume(prediction.array, spacing=(1.5, 1.5, 4.0)),
        volume(prediction.array, origin=(0.0, 0.0, 30.0)),
    ):
        with pytest.raises(GeometryError):
            evaluate_case(other, truth, NAMES)
    with pytest.raises(LabelError):
        evaluate_case(Volume(prediction.array / 2, SPACING), truth, NAMES)
    for labels in ({}, {0: "background"}, {"1": "liver"}):
        with pytest.raises(ArgumentError, match="labels"):
            evaluate_case(prediction, truth, labels)
    for margin in (-1, 1.5):
        with pytest.raises(ArgumentError, match="z_margin"):
            evaluate_case(prediction, truth, NAMES, z_margin=margin)
    with pytest.raises(ArgumentError, match="tolerance"):
        evaluate_case(prediction, truth, NAMES, nsd_tolerance=-1.0)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions for two of three cases; in the second the liver is right and no more."""
    prediction, truth = pair()
    for case in ("a", "b", "c"):
        write_volume(tmp_path / "truth" / f"{case}.nii.gz", truth.array, like=truth)
    right = np.where(truth.array == 1, 1, 0)
    write_volume(tmp_path / "predicted" / "a.nii.gz", prediction.array, like=truth)
    write_volume(tmp_path / "predicted" / "b.nrrd", right, like=truth)
    write_volume(tmp_path / "predicted" / "a_extra.nii.gz", right, like=truth)
    (tmp_path / "predicted" / "a_overlay.png").write_bytes(b"")
    return tmp_path / "predicted", tmp_path / "truth"


def test_report_averages_over_patients_and_organs(folders: tuple[Path, Path]) -> None:
    report = evaluate_folder(*folders, labels=NAMES)
    organs = by_organ(report.per_organ())
    first = 2 * 320 / (400 + 480)
    assert organs["liver"]["dice"]["mean"] == pytest.approx((first + 1) / 2)
    assert organs["liver"]["dice"]["std"] == pytest.approx(np.std([first, 1], ddof=1))
    assert [organs["spleen"][key] for key in ("n", "missed", "spurious")] == [2, 2, 0]
    assert [organs["kidney"][key] for key in ("n", "missed", "spurious")] == [1, 0, 1]
    assert organs["aorta"]["n"] == 0
    assert organs["spleen"]["dice"]["mean"] == 0
    assert math.isnan(organs["spleen"]["hd95"]["mean"])
    assert math.isnan(organs["kidney"]["dice"]["std"])
    patients = {entry["case"]: entry for entry in report.per_patient()}
    assert list(patients) == ["a", "b"]
    assert patients["a"]["dice"]["mean"] == pytest.approx(first / 3)
    assert patients["b"]["dice"]["mean"] == pytest.approx(1 / 2)
    assert report.overall()["dice"] == pytest.approx(((first + 1) / 2 + 0 + 0) / 3)
    assert report.not_predicted == ["c"]
    assert report.not_compared == ["a_extra"]
    assert report.spacing == {"a": SPACING, "b": SPACING}


def test_json_is_complete_and_strict(folders: tuple[Path, Path], tmp_path: Path) -> None:
    report = evaluate_folder(*folders, labels=NAMES, nsd_tolerance=3.0, z_margin=1)
    report.write_json(tmp_path / "report.json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert set(content["definitions"]) == {"dice", "hd95", "assd", "nsd"}
    assert "MONAI" in content["definitions"]["hd95"]
    assert content["nsd_tolerance_mm"] == 3.0
    assert content["z_margin"] == 1
    assert content["spacing_xyz_mm"]["a"] == list(SPACING)
    assert set(content["versions"]) >= {"fastproto", "numpy", "scipy", "SimpleITK"}
    assert len(content["rows"]) == 8
    assert content["rows"][1]["hd95"] is None
    assert content["organs"][0]["dice"]["mean"] == report.per_organ()[0]["dice"]["mean"]
    with pytest.raises(OutputError):
        report.write_json(tmp_path)


def test_text_shows_organs_patients_definitions_and_gaps(folders: tuple[Path, Path]) -> None:
    text = evaluate_folder(*folders, labels=NAMES).to_text()
    lines = text.splitlines()
    liver = next(line for line in lines if line.startswith("liver"))
    assert "0.864 ± 0.193" in liver
    spleen = next(line for line in lines if line.startswith("spleen"))
    assert spleen.split()[1:5] == ["2", "2", "0", "0.000"]
    assert any(line.startswith("mean of organs") for line in lines)
    assert "NSD @ 2 mm" in text
    assert "every slice" in lines[0]
    assert "no prediction for: c" in text
    assert "no truth for: a_extra" in text
    assert "nan" not in text


def test_unknown_labels_are_reported(folders: tuple[Path, Path]) -> None:
    report = evaluate_folder(*folders, labels={1: "liver", 2: "spleen"})
    assert report.unknown_labels == {"a": [3]}
    assert "a: the prediction has labels without a name: 3" in report.to_text()


def test_without_names_the_labels_of_the_truth_are_measured(folders: tuple[Path, Path]) -> None:
    report = evaluate_folder(*folders)
    assert [entry["organ"] for entry in report.per_organ()] == ["label 1", "label 2"]


def test_single_files_are_compared_whatever_their_names(folders: tuple[Path, Path]) -> None:
    predicted, truth = folders
    report = evaluate_folder(predicted / "a_extra.nii.gz", truth / "a.nii.gz", labels=NAMES)
    assert [row["case"] for row in report.rows] == ["a_extra"] * 4
    assert by_organ(report.rows)["liver"]["dice"] == 1
    one = evaluate_folder(predicted / "a.nii.gz", truth, labels=NAMES)
    assert {row["case"] for row in one.rows} == {"a"}


def test_a_data_set_names_its_organs(tmp_path: Path) -> None:
    root = write_phantom(tmp_path / "set", patients=2, shape=(8, 32, 32))
    shutil.copytree(root / "labels", tmp_path / "predicted")
    for truth in (root, root / "labels"):
        report = evaluate_folder(tmp_path / "predicted", truth)
        assert {row["organ"] for row in report.rows} == set(ORGANS.values())
        assert report.overall() == {"dice": 1, "hd95": 0, "assd": 0, "nsd": 1}
    single = evaluate_folder(tmp_path / "predicted/ct_000.nii.gz", root / "labels/ct_000.nii.gz")
    assert len(single.rows) == len(ORGANS)
    chosen = evaluate_folder(tmp_path / "predicted", root, labels={2: "spleen"})
    assert {row["organ"] for row in chosen.rows} == {"spleen"}
    assert not chosen.unknown_labels


def test_nothing_to_compare_is_an_error(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predicted, truth = folders
    with pytest.raises(DatasetError):
        evaluate_folder(tmp_path / "nowhere", truth)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DatasetError):
        evaluate_folder(empty, truth)
    shutil.copy(truth / "a.nii.gz", predicted / "b.nii.gz")
    with pytest.raises(DatasetError, match=r"two files for b"):
        evaluate_folder(predicted, truth)
    blank = np.zeros((10, 20, 20))
    write_volume(tmp_path / "blank.nii.gz", blank.astype(np.uint8), like=volume(blank))
    with pytest.raises(LabelError):
        evaluate_folder(truth / "a.nii.gz", tmp_path / "blank.nii.gz")
    (empty / "a.nii.gz").write_bytes(b"no image")
    with pytest.raises(InputError):
        evaluate_folder(empty, truth)
