# SPDX-License-Identifier: Apache-2.0
"""DICOM from files to files: a series annotated by a DICOM segmentation, scans in folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from support.dicom import enhanced, save, segmentation, write_slices

from fastproto.cli import main
from fastproto.data import read_label, read_volume, write_label
from fastproto.data.dataset import labels_of
from fastproto.data.volume import check_same_grid
from fastproto.segmentation import Task

from .conftest import QUICK


@pytest.fixture
def example(phantom: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The phantom's scan as a series, and liver and spine as a segmentation."""
    image, label = (phantom / part / "mr_000.nii.gz" for part in ("images", "labels"))
    scan, truth = read_volume(image), read_label(label).array
    x, y, z = scan.spacing
    stored = np.rint(scan.array / scan.array.max() * 1000).astype("u2")
    heights, elements = np.arange(len(stored)) * z, {"PixelSpacing": [y, x], "Modality": "MR"}
    series = write_slices(tmp_path / "example" / "series", stored, heights, **elements)
    drawn = [(value, k) for value in (1, 5) for k in range(len(truth)) if (truth[k] == value).any()]
    frames = [
        (value, (-20.5, 30.25, heights[k]), (truth[k] == value).astype("u1")) for value, k in drawn
    ]
    names = {1: "Liver", 5: "Spinal column"}
    dataset = segmentation(frames, names, spacing=(y, x))
    return series, save(dataset, tmp_path / "example" / "seg.dcm")


def test_a_segmentation_names_the_organs(program, example, tmp_path, capsys):
    series, label = example
    files = ["--model", program.model, "--image", series, "--label", label]
    task = tmp_path / "organs.task"
    assert main(["learn", *map(str, files), "-o", str(task), *QUICK]) == 0
    assert Task.load(task).labels == {1: "Liver", 5: "Spinal column"}
    out = tmp_path / "out.nii.gz"
    more = ["--example", series, label, *QUICK, "--classes", "spinal column", "--no-overlay"]
    assert program.segment(series, out, *more) == 0
    assert "(Spinal column " in capsys.readouterr().out
    result = read_label(out)
    check_same_grid(read_volume(series), result)
    assert set(np.unique(result.array)) <= {0, 5}
    capsys.readouterr()
    scores = tmp_path / "scores.json"
    for order in ((out, label), (label, out)):
        pair = ["--prediction", str(order[0]), "--truth", str(order[1])]
        assert main(["evaluate", *pair, "--json", str(scores)]) == 0
        rows = {row["label"]: row for row in json.loads(scores.read_text())["rows"]}
        assert rows[5]["dice"] > 0.9
    assert [row["organ"] for row in rows.values()] == ["label 5"]  # of the label map


def test_segments_count_by_their_names_in_an_evaluation(phantom, example, tmp_path, capsys):
    """Numbered from 1 they are not the values of the truth's organs."""
    series, _ = example
    scan, truth = read_volume(series), tmp_path / "truth"
    array = read_label(phantom / "labels" / "mr_000.nii.gz").array
    truth.mkdir()
    for case in ("series", "other"):
        write_label(truth / f"{case}.nii.gz", array, like=scan)
    organs = ["--truth", str(truth), "--labels", "liver=1", "spine=5"]
    results, scores = tmp_path / "results", tmp_path / "scores.json"
    results.mkdir()

    def dice(names: dict[int, str], *options: str) -> dict[str, float]:
        x, y, z = scan.spacing
        frames = [
            (number, (-20.5, 30.25, z * k), (array[k] == value).astype("u1"))
            for number, value in enumerate(names, start=1)
            for k in range(len(array))
            if (array[k] == value).any()
        ]
        titles = dict(enumerate(names.values(), start=1))
        save(segmentation(frames, titles, spacing=(y, x)), results / "series.dcm")
        command = ["evaluate", "--prediction", str(results), "--json", str(scores), *options]
        assert main(command) == 2  # one is not predicted
        return {row["organ"]: row["dice"] for row in json.loads(scores.read_text())["rows"]}

    assert dice({1: "Liver", 5: "spine"}, *organs) == {"liver": 1, "spine": 1}
    assert "segments" not in capsys.readouterr().err
    assert dice({5: "spine", 2: "fat"}, *organs) == {"liver": 0, "spine": 1}
    assert "segments that the truth does not name are left out: fat" in capsys.readouterr().err
    assert dice({1: "Leber"}, *organs)["liver"] == 1
    assert "by their numbers, not by their names: 'Leber' as liver" in capsys.readouterr().err
    whole = (results / "series.dcm").read_bytes()
    for left in (len(whole) // 2, 500):
        (results / "other.dcm").write_bytes(whole[:left])
        assert main(["evaluate", "--prediction", str(results), *organs]) == 2
        assert "other.dcm" in capsys.readouterr().out


def test_one_series_of_the_annotated_folder(program, example, task_file, tmp_path, capsys):
    series, label = example
    for path in [*series.iterdir()]:
        other = dcmread(path)
        other.SeriesInstanceUID, other.PixelData = "1.2.4", bytes(len(other.PixelData))
        other.save_as(series / f"other-{path.name}")
    more = ["--example", series, label, *QUICK, "--classes", "spinal column", "--no-overlay"]
    out = tmp_path / "out.nii.gz"
    assert program.segment(series, out, "--series", "1.2.3", *more) == 2
    assert "found 2 series" in capsys.readouterr().err
    both = ["--series", "1.2.3", "--example-series", "1.2.3"]
    assert program.segment(series, out, *both, *more) == 0
    assert read_label(out).array.any()
    assert program.segment(series, out, *both, "--task", task_file) == 2
    assert "--example-series: found options of an example" in capsys.readouterr().err


def test_one_scan_in_a_folder_may_have_a_file_as_its_result(program, example, tmp_path, task_file):
    series, segmentation_file = example
    above = tmp_path / "patients"
    above.mkdir()
    series.rename(above / "patient")
    stack = read_volume(above / "patient").array.astype("u2")
    scan = tmp_path / "example" / "scan.dcm"
    save(enhanced(stack, [(0, 0, 4 * z) for z in range(12)], Modality="MR"), scan)
    assert segmentation_file.parent == scan.parent
    for source, read in ((above, above / "patient"), (scan, scan), (scan.parent, scan)):
        out = tmp_path / f"{source.name}.nii.gz"
        assert program.segment(source, out, "--task", task_file, "--no-overlay") == 0
        check_same_grid(read_volume(read), read_label(out))


def test_the_result_is_a_segmentation_of_the_series(program, example, tmp_path, task_file, capsys):
    pytest.importorskip("highdicom")
    series, _ = example
    for path in series.iterdir():
        header = dcmread(path)
        header.FrameOfReferenceUID, header.PatientID = "1.2.77", "p7"
        header.save_as(path)
    plain, out = tmp_path / "plain.nii.gz", tmp_path / "out.dcm"
    options = ["--task", task_file, "--uncertainty"]
    assert program.segment(series, plain, *options) == 0
    assert program.segment(series, out, *options) == 0
    names = ("out.dcm", "out.png", "out-uncertainty.nii.gz", "plain.nii.gz")
    assert all((tmp_path / name).is_file() for name in names)
    assert labels_of(out).names == {1: "liver", 2: "spine"}  # 1 and 5 of the task
    found, expected = read_label(out, like=read_volume(series)).array, read_label(plain).array
    assert set(np.unique(expected)) <= {0, 1, 5}
    assert expected.any()
    np.testing.assert_array_equal(found, np.where(expected == 5, 2, expected))
    dataset = dcmread(out)
    assert (dataset.PatientID, dataset.FrameOfReferenceUID) == ("p7", "1.2.77")
    # It lies beside the scans, and is none.
    above = tmp_path / "example"
    assert program.segment(above, above / "out", *options, "--format", "dcm") == 0
    assert [path.name for path in (above / "out").glob("*.dcm")] == ["series.dcm"]
    dataset.save_as(series / "seg.dcm")
    capsys.readouterr()
    assert program.segment(series, tmp_path / "again.dcm", *options) == 0


def test_a_series_to_which_no_segmentation_can_refer(program, example, tmp_path, task_file, capsys):
    pytest.importorskip("highdicom")
    out = tmp_path / "out.dcm"
    assert program.segment(example[0], out, "--task", task_file) == 2
    assert "found no FrameOfReferenceUID" in capsys.readouterr().err
    assert not out.exists()
