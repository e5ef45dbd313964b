# SPDX-License-Identifier: Apache-2.0
"""Reports against hand-computed ones: what counts, how it is averaged, how files are paired."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastproto import errors
from fastproto._memory import enough_memory
from fastproto.cli import main
from fastproto.data.geometry import canonical
from fastproto.data.phantom import ORGANS, make_patient, write_phantom
from fastproto.data.volume import Volume, read_label, read_volume, write_volume
from fastproto.evaluation import evaluate_case, evaluate_folder, measure
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


def test_rows_hold_the_metrics_of_each_organ():
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


@pytest.mark.parametrize(
    ("margin", "first", "last"), [(0, 2, 6), (1, 1, 7), (2, 0, 8), (50, 0, 10), (None, 0, 10)]
)
def test_z_margin_counts_the_slices_of_the_organ_in_the_truth(margin, first, last):
    prediction, truth = pair()
    chosen = {1: "liver", 2: "spleen", 3: "kidney"}
    rows = by_organ(evaluate_case(prediction, truth, chosen, z_margin=margin))
    assert [row["label"] for row in rows.values()] == [1, 2, 3]
    assert rows["spleen"]["status"] == "missed"
    assert rows["kidney"]["status"] == ("spurious" if margin is None else "absent")
    row = rows["liver"]
    a, b = (prediction.array == 1)[first:last], (truth.array == 1)[first:last]
    assert row["dice"] == dice(a, b)
    assert row["prediction_ml"] == pytest.approx(a.sum() * 6 / 1000)
    for metric in METRICS:
        assert row[metric.name] == pytest.approx(metric(a, b, SPACING[::-1]))


def test_voxels_to_ignore_do_not_count():
    """As if the prediction ended where they begin."""
    prediction, truth = pair()
    ignored = np.zeros(truth.array.shape, bool)
    ignored[5:, :, 6:] = True
    ignored[1:2, 15:18, 2:4] = True  # all of the spurious kidney
    marked = volume(np.where(ignored, 9, truth.array))
    rows = evaluate_case(prediction, marked, NAMES, nsd_tolerance=1.0, ignore=9)
    cut = volume(np.where(ignored, 0, prediction.array))
    assert str(rows) == str(evaluate_case(cut, marked, NAMES, nsd_tolerance=1.0))
    liver = by_organ(rows)["liver"]
    a, b = ((each.array == 1) & ~ignored for each in (prediction, truth))
    assert liver["dice"] == dice(a, b) != dice(prediction.array == 1, truth.array == 1)
    assert liver["truth_ml"] == pytest.approx(b.sum() * 6 / 1000)
    assert liver["prediction_ml"] == pytest.approx(a.sum() * 6 / 1000)
    assert by_organ(rows)["kidney"]["status"] == "absent"
    with pytest.raises(errors.ArgumentError, match="label 1 among those to measure"):
        evaluate_case(prediction, marked, NAMES, ignore=1)


def test_a_data_set_says_what_to_ignore(tmp_path, capsys):
    """nnU-Net's: what is predicted there is not held against the prediction."""
    prediction, truth = pair()
    marked = np.where(prediction.array == truth.array, truth.array, 4)
    root = tmp_path / "set"
    write_volume(root / "imagesTr" / "a_0000.nii.gz", truth.array, like=truth)
    write_volume(root / "labelsTr" / "a.nii.gz", marked, like=truth)
    write_volume(tmp_path / "predicted" / "a.nii.gz", prediction.array, like=truth)
    labels = {"background": 0, "liver": 1, "spleen": 2, "kidney": 3, "ignore": 4}
    fields = {"channel_names": {"0": "noNorm"}, "labels": labels}  # no modality is needed here
    (root / "dataset.json").write_text(json.dumps(fields))
    for place in (root, root / "labelsTr", root / "labelsTr" / "a.nii.gz"):
        source = tmp_path / "predicted"
        rows = by_organ(evaluate_folder(source, place).rows)
        assert rows.keys() == {"liver", "spleen", "kidney"}
        assert rows["liver"]["dice"] == 1
        assert [rows[organ]["status"] for organ in ("spleen", "kidney")] == ["absent", "absent"]
    chosen = evaluate_folder(source, root, labels={1: "liver", 4: "rest"})  # who asks for it has it
    assert by_organ(chosen.rows)["rest"]["status"] == "missed"
    arguments = ["evaluate", "--prediction", str(source), "--truth", str(root / "labelsTr")]
    (root / "dataset.json").rename(tmp_path / "names.json")
    for labels in (["liver=1", "ignore=4"], [str(tmp_path / "names.json")]):
        assert main([*arguments, "--labels", *labels]) == 0
        liver = next(row for row in capsys.readouterr().out.splitlines() if row[:5] == "liver")
        assert "1.000" in liver


@pytest.mark.parametrize("orientation", ["LPS", "RAI", "PSR", "SAL"])
def test_z_margin_runs_along_the_patient_however_the_axes_are_stored(orientation):
    """The same patient stored differently gives the same numbers, up to the order of sums."""
    labels = {1: "liver", 4: "left kidney"}
    _, reference = make_patient(0, shape=(12, 48, 48), orientation="LPS")
    _, truth = make_patient(0, shape=(12, 48, 48), orientation=orientation)
    rows, expected = (
        evaluate_case(
            dataclasses.replace(v, array=np.where(v.array == 4, 4, 1).astype(np.uint8)),
            *(v, labels),
            z_margin=1,
        )
        for v in (truth, reference)
    )
    slices = np.flatnonzero((reference.array == 1).any(axis=(1, 2)))
    counted = reference.array[max(slices[0] - 1, 0) : slices[-1] + 2] != 4
    voxel_ml = np.prod(reference.spacing) / 1000
    assert rows[0]["prediction_ml"] == pytest.approx(np.sum(counted) * voxel_ml)
    assert rows[1]["dice"] == 1
    for row, other in zip(rows, expected, strict=True):
        for metric in METRICS:
            assert row[metric.name] == pytest.approx(other[metric.name], abs=1e-6)


@pytest.mark.parametrize("orientation", ["RAS", "PSR", "SAL"])
def test_the_same_voxels_in_other_axes_are_compared(orientation):
    _, truth = make_patient(0, shape=(12, 48, 48), orientation="LPS")
    _, other = make_patient(0, shape=(12, 48, 48), orientation=orientation)
    labels = {1: "liver", 4: "left kidney"}
    shift = np.roll(truth.array, 1, axis=2)
    expected = evaluate_case(dataclasses.replace(truth, array=shift), truth, labels)
    moved = dataclasses.replace(other, array=np.zeros_like(other.array))
    canonical(moved).array[...] = canonical(dataclasses.replace(truth, array=shift)).array
    assert evaluate_case(moved, truth, labels) == expected
    assert [row["dice"] for row in evaluate_case(other, truth, labels)] == [1, 1]
    elsewhere = dataclasses.replace(other, origin=tuple(np.add(other.origin, (0, 0, 30))))
    with pytest.raises(errors.GeometryError, match="30 mm away"):
        evaluate_case(elsewhere, truth, labels)


@pytest.mark.data
def test_a_result_on_a_real_series_and_its_label_map(test_data, tmp_path):
    """The series is stored from the front, the label map from the back."""
    folder = test_data / "dicom" / "totalseg_ct_jpeg2000"
    scan, truth = read_volume(folder / "series"), read_label(folder / "seg.nii.gz")
    assert not np.allclose(scan.direction, truth.direction)
    result = dataclasses.replace(scan, array=np.zeros(scan.array.shape, np.uint8))
    canonical(result).array[...] = canonical(truth).array
    write_volume(tmp_path / "result.nii.gz", result.array, like=scan)
    report = evaluate_folder(tmp_path / "result.nii.gz", folder / "seg.nii.gz")
    assert len(report.rows) == 31
    assert report.overall() == {"dice": 1, "hd95": 0, "assd": 0, "nsd": 1}


def test_a_folder_that_nnunet_wrote(folders, tmp_path):
    predicted, truth = folders
    names = {"background": 0, **{name: value for value, name in NAMES.items()}}
    fields = {"channel_names": {"0": "CT"}, "labels": names, "file_ending": ".nii.gz"}
    for folder in folders:
        fields["training"] = [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]
        (folder / "dataset.json").write_text(json.dumps(fields), encoding="utf-8")
        for name in ("plans.json", "predict_from_raw_data_args.json", "a.npz", "a.pkl"):
            (folder / name).write_text("{}", encoding="utf-8")
    report = evaluate_folder(predicted, truth)
    plain = evaluate_folder(predicted / "a.nii.gz", truth / "a.nii.gz", labels=NAMES)
    assert str(report.rows[:4]) == str([row | {"case": "a"} for row in plain.rows])
    assert report.not_predicted == ["c"]
    (truth / "dataset.json").unlink()
    assert str(evaluate_folder(predicted, truth, labels=NAMES).rows) == str(report.rows)


def test_cases_with_unusable_files_are_named(folders):
    predicted, truth = folders
    (predicted / "a.nii.gz").write_bytes(b"no image")
    shifted = volume(np.zeros((10, 20, 20)), origin=(0.0, 0.0, 30.0))
    write_volume(predicted / "c.nii.gz", shifted.array, like=shifted)
    for labels in (NAMES, None):
        report = evaluate_folder(predicted, truth, labels=labels)
        assert {row["case"] for row in report.rows} == {"b"}
        assert list(report.failed) == ["a", "c"]
        assert "a.nii.gz" in report.failed["a"]
        assert "30 mm away" in report.failed["c"]
    (truth / "a.nii.gz").unlink()
    (truth / "a.nii.gz").symlink_to("/proc/self/mem")  # whose beginning nobody can read
    (truth / "dataset.json").write_text('{"labels": {"liver": 1}}')
    report = evaluate_folder(predicted, truth)
    assert list(report.failed) == ["a", "c"]
    assert {row["organ"] for row in report.rows} == {"liver"}
    (truth / "b.nii.gz").write_bytes(b"no image")
    with pytest.raises(errors.InputError, match=r"b\.nii\.gz|a\.nii\.gz"):  # nothing is left
        evaluate_folder(predicted, truth)


def test_a_case_that_memory_does_not_hold_is_named(folders, monkeypatch):
    """Whether reading says so, or what comes after it."""

    def short(like):
        if like.name.endswith("a.nii.gz"):
            raise MemoryError("Unable to allocate 7.00 GiB for an array")
        return canonical(like)

    monkeypatch.setattr(measure, "canonical", short)
    assert "7.00 GiB were wanted" in evaluate_folder(*folders).failed["a"]
    monkeypatch.undo()

    def read(path, like=None):
        with enough_memory(path):
            return short(read_label(path, like=like))

    monkeypatch.setattr(measure, "read_label", read)
    report = evaluate_folder(*folders)
    assert "a.nii.gz: found too little memory" in report.failed["a"]
    assert {row["case"] for row in report.rows} == {"b"}


def test_what_is_ignored_needs_no_named_label(folders):
    """It is an argument, or the one name in a ``dataset.json``."""
    predicted, truth = folders
    report = evaluate_folder(predicted, truth, ignore=2)
    assert {row["label"] for row in report.rows} == {1}
    (truth / "dataset.json").write_text('{"labels": {"background": 0, "ignore": 2}}')
    assert str(evaluate_folder(predicted, truth).rows) == str(report.rows)
    shutil.copytree(truth, truth / "labels")
    (truth / "images").mkdir()
    for case in "abc":
        (truth / f"{case}.nii.gz").rename(truth / "images" / f"{case}.nii.gz")
    fields = {"labels": {"background": 0, "ignore": 2}, "cases": ["a", "b", "c"]}
    (truth / "dataset.json").write_text(json.dumps(fields))
    assert str(evaluate_folder(predicted, truth).rows) == str(report.rows)
    with pytest.raises(errors.LabelError, match="no voxel above 0 other than 1"):
        evaluate_folder(predicted / "b.nrrd", predicted / "b.nrrd", ignore=1)


def test_other_grids_and_bad_arguments_are_refused():
    prediction, truth = pair()
    array = prediction.array
    for other, labels, options, error, message in (
        (volume(array[:-1]), NAMES, {}, errors.GeometryError, "voxels"),
        (volume(array, spacing=(1.5, 1.5, 4.0)), NAMES, {}, errors.GeometryError, "voxels"),
        (volume(array, origin=(0.0, 0.0, 30.0)), NAMES, {}, errors.GeometryError, "voxels"),
        (Volume(array / 2, SPACING), NAMES, {}, errors.LabelError, "integers"),
        (prediction, {}, {}, errors.ArgumentError, "labels"),
        (prediction, {0: "background"}, {}, errors.ArgumentError, "labels"),
        (prediction, {"1": "liver"}, {}, errors.ArgumentError, "labels"),
        (prediction, NAMES, {"z_margin": -1}, errors.ArgumentError, "z_margin"),
        (prediction, NAMES, {"z_margin": 1.5}, errors.ArgumentError, "z_margin"),
        (prediction, NAMES, {"nsd_tolerance": -1.0}, errors.ArgumentError, "tolerance"),
    ):
        with pytest.raises(error, match=message):
            evaluate_case(other, truth, labels, **options)


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


def test_report_averages_over_patients_and_organs(folders):
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
    text = report.to_text()
    lines = text.splitlines()
    liver, spleen = (
        next(line for line in lines if line.startswith(organ)) for organ in ("liver", "spleen")
    )
    assert "0.864 ± 0.193" in liver
    assert spleen.split()[1:5] == ["2", "2", "0", "0.000"]
    assert any(line.startswith("mean of organs") for line in lines)
    assert "every slice" in lines[0]
    for words in ("NSD @ 2 mm", "no prediction for: c", "no truth for: a_extra"):
        assert words in text
    assert "nan" not in text


def test_json_is_complete_and_strict(folders, tmp_path):
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
    with pytest.raises(errors.OutputError):
        report.write_json(tmp_path)


def test_labels_without_a_name_and_files_of_any_name(folders):
    report = evaluate_folder(*folders, labels={1: "liver", 2: "spleen"})
    assert report.unknown_labels == {"a": [3]}
    assert "a: the prediction has labels without a name: 3" in report.to_text()
    unnamed = evaluate_folder(*folders)  # the labels of the truth
    assert [entry["organ"] for entry in unnamed.per_organ()] == ["label 1", "label 2"]
    predicted, truth = folders
    report = evaluate_folder(predicted / "a_extra.nii.gz", truth / "a.nii.gz", labels=NAMES)
    assert [row["case"] for row in report.rows] == ["a_extra"] * 4
    assert by_organ(report.rows)["liver"]["dice"] == 1
    one = evaluate_folder(predicted / "a.nii.gz", truth, labels=NAMES)
    assert {row["case"] for row in one.rows} == {"a"}


def test_a_data_set_names_its_organs(tmp_path):
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


def test_labels_that_nobody_has_are_named_beside_those_there_are(folders):
    words = r"found no voxel of 9 gallbladder; allowed: labels of .*truth: 1, 2\."
    with pytest.raises(errors.LabelError, match=words):
        evaluate_folder(*folders, labels={9: "gallbladder"})


def test_nothing_to_compare_is_an_error(folders, tmp_path):
    predicted, truth = folders
    empty, bad, twice = (tmp_path / name for name in ("empty", "bad", "twice"))
    for folder in (empty, bad, twice):
        folder.mkdir()
    (bad / "a.nii.gz").write_bytes(b"no image")
    for name in ("b.nii.gz", "b.nrrd"):
        shutil.copy(predicted / "b.nrrd", twice / name)
    blank = volume(np.zeros((10, 20, 20)))
    write_volume(tmp_path / "blank.nii.gz", blank.array, like=blank)
    for prediction, true, error, message in (
        (tmp_path / "nowhere", truth, errors.DatasetError, "nowhere"),
        (empty, truth, errors.DatasetError, "no label map"),
        (twice, truth, errors.DatasetError, "two files for b"),
        (truth / "a.nii.gz", tmp_path / "blank.nii.gz", errors.LabelError, "no voxel above 0"),
        (bad, truth, errors.InputError, r"a\.nii\.gz"),
    ):
        with pytest.raises(error, match=message):
            evaluate_folder(prediction, true)
