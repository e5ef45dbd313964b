# SPDX-License-Identifier: Apache-2.0
"""``register``, ``segment`` and ``evaluate`` from files to files, with an untrained model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastproto.cli import main
from fastproto.cli.segment import find_scans, plan_outputs, stem
from fastproto.data import Preprocessing, read_label, read_volume
from fastproto.data.volume import check_same_grid, write_volume
from fastproto.errors import ArgumentError, VolumeError
from fastproto.nn import FewShotUNet
from fastproto.segmentation import Task

ORGANS = ["liver=1", "spine=5"]


@pytest.fixture
def support(phantom) -> list[str]:
    case = "mr_000.nii.gz"
    return [str(phantom / "images" / case), str(phantom / "labels" / case)]


@pytest.fixture
def task_file(model_file, support, tmp_path) -> Path:
    path = tmp_path / "organs.task"
    register(model_file, support, path)
    return path


def register(model_file: Path, support: list[str], path: Path) -> None:
    files = ["--model", str(model_file), "--image", support[0], "--label", support[1]]
    options = ["--labels", *ORGANS, "--slices", "3"]
    assert main(["register", *files, *options, "-o", str(path)]) == 0


def segment(model_file: Path, task_file: Path, source: object, output: object, *more: str) -> int:
    files = ["--model", str(model_file), "--task", str(task_file)]
    return main(["segment", *files, "-i", str(source), "-o", str(output), *more])


def test_register_lists_what_it_learned(model_file, support, tmp_path, capsys):
    path = tmp_path / "organs.task"
    register(model_file, support, path)
    task = Task.load(path)
    assert task.labels == {1: "liver", 5: "spine"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{path}: ")
    names = ("background", "liver", "spine")
    for line, name, count in zip(lines[1:], names, task.prototypes.counts()[0], strict=True):
        assert name in line
        assert f" {count} prototypes" in line


def test_register_takes_a_table_and_a_choice(model_file, support, phantom, tmp_path, capsys):
    image, label = support
    arguments = ["register", "--model", str(model_file.parent), "--image", image, "--label", label]
    arguments += ["-o", str(tmp_path / "all.task")]
    table = ["--labels", str(phantom / "dataset.json")]
    assert main([*arguments, *table]) == 0
    assert len(Task.load(tmp_path / "all.task").labels) >= 6
    assert main([*arguments, *table, "--classes", "Spine", "1"]) == 0
    assert Task.load(tmp_path / "all.task").labels == {1: "liver", 5: "spine"}
    assert main([*arguments, "--classes", "5"]) == 0
    assert Task.load(tmp_path / "all.task").labels == {5: "label 5"}
    assert main([*arguments, "--classes", "spine"]) == 2
    assert main([*arguments, "--labels", "heart=99"]) == 2
    assert "no voxel of label 99" in capsys.readouterr().err


def test_register_refuses_unnamed_labels_of_a_table(model_file, support, tmp_path, capsys):
    (tmp_path / "organs.json").write_text('{"liver": 1}')
    image, label = support
    arguments = ["--model", str(model_file), "--image", image, "--label", label]
    arguments += ["--labels", str(tmp_path / "organs.json"), "-o", str(tmp_path / "organs.task")]
    assert main(["register", *arguments]) == 2
    assert "unknown label" in capsys.readouterr().err
    assert not (tmp_path / "organs.task").exists()


def test_segment_one_scan_with_everything(model_file, task_file, phantom, tmp_path, capsys):
    scan = phantom / "images" / "mr_001.nii.gz"
    output = tmp_path / "results" / "organs.nii.gz"
    options = ["--probabilities", "--overlay", "--threads", "1", "--batch-size", "3"]
    assert segment(model_file, task_file, scan, output, *options) == 0
    result = read_label(output)
    check_same_grid(read_volume(scan), result)
    assert set(np.unique(result.array)) <= {0, 1, 5}
    folder = output.parent / "organs-probabilities"
    assert sorted(path.name for path in folder.iterdir()) == ["1-liver.nii.gz", "5-spine.nii.gz"]
    liver = read_volume(folder / "1-liver.nii.gz")
    assert liver.array.dtype == np.float32
    check_same_grid(result, liver)
    with Image.open(output.parent / "organs.png") as picture:
        assert picture.width == 4 * 256
    assert " ml, " in capsys.readouterr().out


def test_segment_registers_on_the_spot_like_register(
    model_file, task_file, support, phantom, tmp_path
):
    scan = phantom / "images" / "mr_002.nii.gz"
    assert segment(model_file, task_file, scan, tmp_path / "a.nii.gz") == 0
    image, label = support
    arguments = ["--support-image", image, "--support-label", label, "--labels", *ORGANS]
    arguments += ["--slices", "3", "-i", str(scan), "-o", str(tmp_path / "b.nii.gz")]
    assert main(["segment", "--model", str(model_file), *arguments]) == 0
    a, b = (read_label(tmp_path / name).array for name in ("a.nii.gz", "b.nii.gz"))
    assert np.array_equal(a, b)


def test_a_failing_scan_does_not_stop_the_folder(model_file, task_file, phantom, tmp_path, capsys):
    scans = tmp_path / "scans"
    shutil.copytree(phantom / "images", scans)
    damaged = scans / "mr_001.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    (scans / "notes.txt").write_text("not a scan")
    assert segment(model_file, task_file, scans, tmp_path / "results") == 2
    written = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert written == ["mr_000.nii.gz", "mr_002.nii.gz"]
    errors = capsys.readouterr().err
    assert "mr_001.nii.gz" in errors
    assert "Traceback" not in errors
    assert errors.endswith("fastproto: 1 of 3 scans failed\n")


def test_segment_refuses_a_task_of_another_model(task_file, phantom, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    FewShotUNet(encoder="resnet18", temperature=0.1).save(other, {})
    scan = phantom / "images" / "mr_001.nii.gz"
    assert segment(other, task_file, scan, tmp_path / "out.nii.gz") == 2
    assert "another model" in capsys.readouterr().err


def test_an_old_result_survives_a_failure(model_file, task_file, phantom, tmp_path):
    output = tmp_path / "out.nii.gz"
    assert segment(model_file, task_file, phantom / "images" / "mr_001.nii.gz", output) == 0
    before = output.read_bytes()
    damaged = tmp_path / "damaged.nii.gz"
    damaged.write_bytes((phantom / "images" / "mr_001.nii.gz").read_bytes()[:2000])
    assert segment(model_file, task_file, damaged, output) == 2
    assert output.read_bytes() == before
    assert segment(model_file, task_file, phantom / "images" / "mr_001.nii.gz", output) == 0
    assert output.read_bytes() == before


def test_backend_is_forced(model_file, task_file, phantom, tmp_path, capsys):
    scan = phantom / "images" / "mr_001.nii.gz"
    output = tmp_path / "out.nii.gz"
    assert segment(model_file, task_file, scan, output, "--backend", "reference") == 0
    assert segment(model_file, task_file, scan, output, "--backend", "abacus") == 2
    assert "'abacus'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "neither a task file nor an annotated scan"),
        (["--support-image", "a.nii"], "neither a task file nor an annotated scan"),
        (["--task", "t", "--support-image", "a.nii"], "a task file and an annotated scan"),
        (["--task", "t", "--labels", "liver=1"], "given with --task"),
    ],
)
def test_segment_needs_one_source(arguments, message, capsys):
    files = ["--model", "run", "-i", "scan.nii", "-o", "out.nii"]
    assert main(["segment", *files, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_evaluate_prints_and_writes_the_report(phantom, tmp_path, capsys):
    truth = phantom / "labels" / "mr_000.nii.gz"
    arguments = ["--truth", str(truth), "--labels", *ORGANS]
    arguments += ["--json", str(tmp_path / "scores.json")]
    assert main(["evaluate", "--prediction", str(truth), *arguments]) == 0
    text = capsys.readouterr().out
    assert "liver" in text
    assert "Dice" in text
    report = json.loads((tmp_path / "scores.json").read_text())
    assert {row["organ"] for row in report["rows"]} == {"liver", "spine"}
    assert all(row["dice"] == 1 for row in report["rows"])
    assert main(["evaluate", "--prediction", str(truth), *arguments, "--tolerance", "-1"]) == 2


def test_evaluate_a_folder_of_results(model_file, task_file, phantom, tmp_path, capsys):
    results = tmp_path / "results"
    assert segment(model_file, task_file, phantom / "images", results, "--probabilities") == 0
    capsys.readouterr()
    arguments = ["--prediction", str(results), "--truth", str(phantom), "--labels", *ORGANS]
    assert main(["evaluate", *arguments, "--z-margin", "0"]) == 0
    assert "mr_002" in capsys.readouterr().out


def test_find_scans(tmp_path):
    for name in ("b.nii.gz", "a.NRRD", "c.mha", ".hidden.nii", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "slice1").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.pdf").write_bytes(b"%PDF")
    names = [path.name for path in find_scans(tmp_path)]
    assert names == ["a.NRRD", "b.nii.gz", "c.mha", "series"]
    assert find_scans(tmp_path / "series") == [tmp_path / "series"]
    assert find_scans(tmp_path / "b.nii.gz") == [tmp_path / "b.nii.gz"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(VolumeError, match="no image file and no DICOM series"):
        find_scans(tmp_path / "empty")


def test_plan_outputs(tmp_path):
    scan, series = tmp_path / "scan.nii.gz", tmp_path / "series.1"
    file, folder = tmp_path / "out.nrrd", tmp_path / "out"
    assert plan_outputs(scan, [scan], file) == [(scan, file)]
    assert plan_outputs(scan, [scan], folder) == [(scan, folder / "scan.nii.gz")]
    assert plan_outputs(tmp_path, [scan, series], folder) == [
        (scan, folder / "scan.nii.gz"),
        (series, folder / "series.1.nii.gz"),
    ]
    with pytest.raises(ArgumentError, match="scans of a folder"):
        plan_outputs(tmp_path, [scan, series], file)
    with pytest.raises(ArgumentError, match=r"out\.mhd"):
        plan_outputs(scan, [scan], tmp_path / "out.mhd")
    with pytest.raises(ArgumentError, match="overwrite"):
        plan_outputs(scan, [scan], scan)
    with pytest.raises(ArgumentError, match="overwrite"):
        plan_outputs(tmp_path, [scan], tmp_path)
    with pytest.raises(ArgumentError, match="overwrite"):
        plan_outputs(tmp_path, [scan, tmp_path / "scan.mha"], folder)


def test_stem():
    assert stem(Path("a/b.v2.nii.gz")) == "b.v2"
    assert stem(Path("a/B.MHA")) == "B"
    assert stem(Path("a/1.2.840")) == "1.2.840"


@pytest.mark.data
def test_real_dicom_series(model_file, test_data, tmp_path):
    series = test_data / "dicom" / "torchio_small" / "series"
    volume = read_volume(series)
    label = np.zeros(volume.array.shape, dtype=np.uint8)
    label[:, 3:9, 3:9] = 1
    write_volume(tmp_path / "label.nii.gz", label, like=volume)
    support = ["--support-image", str(series), "--support-label", str(tmp_path / "label.nii.gz")]
    arguments = ["--model", str(model_file), *support, "-i", str(series.parent)]
    assert main(["segment", *arguments, "-o", str(tmp_path / "results"), "--overlay"]) == 0
    check_same_grid(volume, read_label(tmp_path / "results" / "series.nii.gz"))


@pytest.mark.data
def test_dicom_series_with_a_nifti_annotation_in_other_axes(test_data, tmp_path):
    folder = test_data / "dicom" / "totalseg_ct_jpeg2000"
    preprocessing = Preprocessing("ct", image_size=64, mean=20.0, std=80.0)
    model = tmp_path / "model.safetensors"
    FewShotUNet(encoder="resnet18").save(model, {"preprocessing": preprocessing.to_dict()})
    series, annotation = folder / "series", folder / "seg.nii.gz"
    value = int(read_label(annotation).array.max())
    support = ["--support-image", str(series), "--support-label", str(annotation)]
    out = tmp_path / "out.nii.gz"
    arguments = ["segment", "--model", str(model), *support, "--labels", f"organ={value}"]
    assert main([*arguments, "-i", str(series), "-o", str(out)]) == 0
    result = read_label(out)
    check_same_grid(read_volume(series), result)
    assert set(np.unique(result.array)) <= {0, value}


def test_names_of_results(tmp_path):
    blob = tmp_path / "blob_of_a_long_key.nii.gz"
    blob.touch()
    links = [tmp_path / f"case{n}_0000.nii.gz" for n in (1, 2)]
    for link in links:
        link.symlink_to(blob)
    jobs = plan_outputs(tmp_path, links, tmp_path / "results")
    assert [target.name for _, target in jobs] == ["case1.nii.gz", "case2.nii.gz"]
    with pytest.raises(ArgumentError, match=r"OUT\.NII\.GZ"):
        plan_outputs(blob, [blob], tmp_path / "OUT.NII.GZ")
