# SPDX-License-Identifier: Apache-2.0
"""``segment`` from files to files, with an untrained model."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from fastproto.cli import main
from fastproto.cli.segment import FORMATS
from fastproto.data import read_label, read_volume
from fastproto.data.phantom import make_patient
from fastproto.data.volume import LABELS_WRITABLE, check_same_grid, write_volume
from fastproto.nn import FewShotUNet
from fastproto.segmentation import Task
from fastproto.segmentation.postprocess import uncertainty

from .conftest import CHOSEN, QUICK, Program, save_model


@pytest.fixture
def scan(phantom) -> Path:
    return phantom / "images" / "mr_001.nii.gz"


def test_a_folder_gets_label_maps_and_pictures(results):
    folder, _ = results
    assert sorted(path.name for path in folder.glob("mr_001*")) == [
        "mr_001-probabilities", "mr_001.nii.gz", "mr_001.png"
    ]  # fmt: skip
    assert len(list(folder.iterdir())) == 3 * 3


def test_one_scan_with_everything(program, task_file, scan, tmp_path, capsys):
    output = tmp_path / "results" / "organs.nii.gz"
    options = ["--probabilities", "--uncertainty", "--threads", "1", "--batch-size", "3"]
    assert program.segment(scan, output, "--task", task_file, *options) == 0
    result = read_label(output)
    check_same_grid(read_volume(scan), result)
    assert set(np.unique(result.array)) <= {0, 1, 5}
    folder = output.parent / "organs-probabilities"
    assert sorted(path.name for path in folder.iterdir()) == ["1-liver.nii.gz", "5-spine.nii.gz"]
    organs = [read_volume(folder / name) for name in ("1-liver.nii.gz", "5-spine.nii.gz")]
    assert organs[0].array.dtype == np.float32
    doubt = read_volume(output.parent / "organs-uncertainty.nii.gz")
    for volume in (*organs, doubt):
        check_same_grid(result, volume)
    np.testing.assert_allclose(
        doubt.array, uncertainty([volume.array for volume in organs]), atol=1e-5
    )
    assert 0 <= doubt.array.min() <= doubt.array.max() <= np.log2(3) + 1e-5
    with Image.open(output.parent / "organs.png") as picture:
        assert picture.width == 4 * 256
    assert " ml, " in capsys.readouterr().out


def test_a_report_has_every_scan_of_the_command(program, task_file, phantom, tmp_path, capsys):
    scans = tmp_path / "scans"
    shutil.copytree(phantom / "images", scans, ignore=lambda *_: ["mr_000.nii.gz"])
    (scans / "broken.nii.gz").write_bytes(b"no scan")
    report = tmp_path / "report.html"
    arguments = ["--task", task_file, "--no-overlay", "--report"]
    assert program.segment(scans, tmp_path / "out", *arguments, report) == 2  # one is broken
    assert f"{report}: 0." in capsys.readouterr().out
    text = report.read_text("utf-8")
    assert "Results in 2 scans" in text
    assert "<strong>broken</strong>" in text
    for name in Task.load(task_file).labels.values():
        assert f">{name}</th>" in text
    assert program.segment(scans, tmp_path / "out", *arguments, tmp_path / "report.txt") == 2
    assert "ending in .html" in capsys.readouterr().err


def test_an_organ_of_unusual_size_is_told(
    program, task_file, scan, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch
):
    task = Task.load(task_file)
    drawn = {task.labels[value]: f"{size:.1f} ml" for value, size in task.millilitres.items()}
    for unusual, told in ((1.0, True), (1e6, False)):
        monkeypatch.setattr("fastproto.cli.segment.UNUSUAL", unusual)
        assert program.segment(scan, tmp_path / "organs.nii.gz", "--task", task_file) == 0
        said = capsys.readouterr().err
        for name, size in drawn.items():
            assert (f"(in the annotated scan {size})" in said and f" {name}: " in said) == told


def test_the_backend_is_forced_and_files_are_left_out(program, task_file, scan, tmp_path, capsys):
    options = ["--task", task_file, "--uncertainty", "--no-overlay", "--backend"]
    assert program.segment(scan, tmp_path / "out", *options, "reference") == 0
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["mr_001-uncertainty.nii.gz", "mr_001.nii.gz"]  # no probabilities
    assert program.segment(scan, tmp_path / "out", *options, "abacus") == 2
    assert "'abacus'" in capsys.readouterr().err


def test_a_task_of_another_model_is_refused(program, task_file, scan, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    FewShotUNet(encoder="resnet18", temperature=0.1).save(other, {})
    program = dataclasses.replace(program, model=other)
    assert program.segment(scan, tmp_path / "out.nii.gz", "--task", task_file) == 2
    assert "another model" in capsys.readouterr().err


def test_examples_are_learned_on_the_spot_as_by_learn(
    program, task_file, results, phantom, tmp_path, capsys, monkeypatch
):
    """And the model is told by its weights once, not once per scan: it reads all of them."""
    other = [part.replace("mr_000", "mr_001") for part in program.example]
    shutil.copytree(phantom / "images", tmp_path / "scans", ignore=lambda *_: ["mr_000.nii.gz"])
    task = tmp_path / "other.task"
    assert Program(program.model, other).learn(task, *CHOSEN) == 0
    scan = phantom / "images" / "mr_002.nii.gz"
    tasks = ["--task", task_file, "--task", task, "--probabilities"]
    assert program.segment(scan, tmp_path / "a", *tasks) == 0
    counted = []
    whole = FewShotUNet.fingerprint
    monkeypatch.setattr(FewShotUNet, "fingerprint", lambda model: counted.append(1) or whole(model))
    examples = ["--example", *program.example, "--example", *other, *CHOSEN]
    capsys.readouterr()
    options = [*examples, "--probabilities", "--no-overlay"]
    assert program.segment(tmp_path / "scans", tmp_path / "b", *options) == 0
    assert f"learning from {program.example[0]}" in capsys.readouterr().out
    assert len(counted) == results[1] == 1
    for name in ("mr_002.nii.gz", "mr_002-probabilities/1-liver.nii.gz"):
        a, b = (read_volume(tmp_path / run / name).array for run in "ab")
        assert np.array_equal(a, b)
    assert not np.array_equal(a, read_volume(results[0] / name).array)  # of one task


def test_a_task_given_twice_counts_once(program, task_file, results, scan, tmp_path, monkeypatch):
    monkeypatch.chdir(task_file.parent)
    options = ["--task", task_file, "--task", task_file.name, "--no-overlay"]
    with mock.patch.object(Task, "load", wraps=Task.load) as load:
        assert program.segment(scan, tmp_path / "out.nii.gz", *options) == 0
    assert load.call_count == 1


def test_doubts_about_organs_and_registration_are_told(
    program, phantom, scan, tmp_path, monkeypatch, capsys
):
    def fail(*_, **__):
        raise RuntimeError("itk says much\nno overlap")

    task = tmp_path / "organs.task"
    assert program.learn(task, *CHOSEN, "--prior", "affine") == 0
    assert Task.load(task).atlas.kind == "affine"
    capsys.readouterr()
    monkeypatch.setattr("fastproto.segmentation.predict.ABSENT", -1.0)
    assert program.segment(scan, tmp_path / "out.nii.gz", "--task", task) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("fastproto.segmentation.predict.ABSENT", 1.1)
    monkeypatch.setattr("fastproto.segmentation.prior.align_affine", fail)
    assert program.segment(scan, tmp_path / "out.nii.gz", "--task", task) == 0
    *absent, alone = capsys.readouterr().err.splitlines()
    assert absent == [
        f"fastproto: warning: {scan}: {name} is probably not in this scan"
        for name in ("liver", "spine")
    ]
    assert "only body boxes were compared (no overlap)" in alone


def test_a_failing_scan_stops_neither_the_folder_nor_loses_an_old_result(
    program, task_file, results, phantom, tmp_path, capsys
):
    scans, out = tmp_path / "scans", tmp_path / "results"
    shutil.copytree(phantom / "images", scans)
    damaged = scans / "mr_001.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    (scans / "notes.txt").write_text("not a scan")
    out.mkdir()
    for number in (0, 1):
        (out / f"mr_00{number}.nii.gz").write_bytes(b"older")
    assert program.segment(scans, out, "--task", task_file, "--no-overlay") == 2
    assert sorted(path.name for path in out.iterdir()) == [f"mr_00{n}.nii.gz" for n in range(3)]
    assert (out / "mr_001.nii.gz").read_bytes() == b"older"
    for name in ("mr_000.nii.gz", "mr_002.nii.gz"):
        assert (out / name).read_bytes() == (results[0] / name).read_bytes()
    errors = capsys.readouterr().err
    assert "mr_001.nii.gz" in errors
    assert "Traceback" not in errors
    assert errors.endswith("fastproto: 1 of 3 scans failed\n")


def test_shards_share_a_folder_and_write_what_one_run_does(
    program, task_file, results, phantom, tmp_path, capsys
):
    """Also where the scans' names decide on each other's, and with more parts than scans."""
    scans, out = tmp_path / "scans", tmp_path / "results"
    scans.mkdir()
    for number in range(3):
        name = f"mr_00{number}"
        shutil.copy(phantom / "images" / f"{name}.nii.gz", scans / f"{name}_0000.nii.gz")
    written = []
    for part in (2, 1, 3, 4):
        options = ["--task", task_file, "--no-overlay", "--shard", f"{part}/4"]
        assert program.segment(scans, out, *options) == 0
        written.append(len(list(out.iterdir())))
    assert written == [1, 2, 3, 3]
    assert "no scan for part 4 of 4, as there are 3" in capsys.readouterr().out
    shutil.rmtree(out)
    for part, names in ((1, [0, 2]), (2, [0, 1, 2])):
        options = ["--task", task_file, "--no-overlay", "--shard", f"{part}/2"]
        assert program.segment(scans, out, *options) == 0
        assert sorted(path.name for path in out.iterdir()) == [f"mr_00{n}.nii.gz" for n in names]
    for path in out.iterdir():
        assert path.read_bytes() == (results[0] / path.name).read_bytes()


@pytest.mark.parametrize("shard", ["0/4", "5/4", "3", "1/0", "a/b", "1/2/3", "-1/4"])
def test_a_part_is_counted_from_one(shard, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["segment", "--task", "t", "-i", "scans", "-o", "out", f"--shard={shard}"])
    assert caught.value.code == 2
    assert f"found '{shard}'; allowed: I/N with I from 1 to N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to find"),
        (["--task", "t", "--example", "a.nii", "b.nii"], "task files and annotated scans"),
        (
            ["--task", "t", "--labels", "liver=1"],
            "--labels: found options of an example",
        ),
        (["--task", "t", "--adapt", "5", "--slices", "3"], "--slices, --adapt: found"),
    ],
)
def test_segment_needs_one_source(arguments, message, capsys):
    files = ["--model", "run", "-i", "scan.nii", "-o", "out.nii"]
    assert main(["segment", *files, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::fastproto.errors.FastprotoWarning")
def test_a_scan_of_another_modality_needs_force(program, task_file, tmp_path, capsys):
    image, label = make_patient(1, shape=(24, 96, 96))
    for name, volume in (("image", image), ("label", label)):
        write_volume(tmp_path / f"{name}.nii.gz", volume.array, like=volume)
    write_volume(tmp_path / "constant.nii.gz", 0 * image.array, like=image)
    ct, output = str(tmp_path / "image.nii.gz"), tmp_path / "out.nii.gz"
    options = ["--task", task_file, "--prior", "box", "--no-overlay"]
    for scan, words in ((ct, "values of a CT"), (tmp_path / "constant.nii.gz", "one value")):
        assert program.segment(scan, output, *options) == 2
        assert words in capsys.readouterr().err
        assert not output.exists()
    report = tmp_path / "report.html"
    assert program.segment(ct, output, *options, "--force", "--report", report) == 0
    assert output.exists()
    assert "as forced" in report.read_text("utf-8")

    other = dataclasses.replace(program, example=[ct, str(tmp_path / "label.nii.gz")])
    assert other.learn(tmp_path / "organs.task", *CHOSEN) == 2
    assert "values of a CT" in capsys.readouterr().err
    assert not (tmp_path / "organs.task").exists()
    assert other.learn(tmp_path / "organs.task", *CHOSEN, "--force") == 0
    assert Task.load(tmp_path / "organs.task").preprocessing.modality == "mr"


@pytest.mark.data
@pytest.mark.filterwarnings("ignore::fastproto.errors.FastprotoWarning")
def test_a_real_dicom_series(program, test_data, tmp_path):
    series = test_data / "dicom" / "torchio_small" / "series"
    volume = read_volume(series)
    label = np.zeros(volume.array.shape, dtype=np.uint8)
    label[:, 3:9, 3:9] = 1
    write_volume(tmp_path / "label.nii.gz", label, like=volume)
    # An MR, and its files say that it is a CT.
    example = ["--example", series, tmp_path / "label.nii.gz", *QUICK, "--force"]
    assert program.segment(series.parent, tmp_path / "results", *example) == 0
    check_same_grid(volume, read_label(tmp_path / "results" / "series.nii.gz"))


@pytest.mark.data
def test_a_dicom_series_with_a_nifti_annotation_in_other_axes(program, test_data, tmp_path):
    folder = test_data / "dicom" / "totalseg_ct_jpeg2000"
    model = save_model(tmp_path / "model.safetensors", "ct", mean=20.0, std=80.0)
    series, annotation = folder / "series", folder / "seg.nii.gz"
    value = int(read_label(annotation).array.max())
    example = ["--example", series, annotation, *QUICK, "--labels", f"organ={value}"]
    out = tmp_path / "out.nii.gz"
    assert program.segment(series, out, *example, "--model", model) == 0
    result = read_label(out)
    check_same_grid(read_volume(series), result)
    assert set(np.unique(result.array)) <= {0, value}


def test_results_for_3d_slicer_teach_again(program, task_file, phantom, tmp_path, capsys):
    """A folder of .seg.nrrd; one of them, as an annotation, names the organs."""
    options = ["--task", task_file, "--no-overlay"]
    assert program.segment(phantom / "images", tmp_path, *options, "--format", "seg.nrrd") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"mr_00{number}.seg.nrrd" for number in range(3)
    ]
    result = tmp_path / "mr_000.seg.nrrd"
    plain = tmp_path / "plain" / "mr_000.nii.gz"
    assert program.segment(phantom / "images" / "mr_000.nii.gz", plain, *options) == 0
    np.testing.assert_array_equal(read_label(result).array, read_label(plain).array)
    task = tmp_path / "again.task"
    assert program.learn(task, *QUICK, label=result) == 0
    assert Task.load(task).labels == {1: "liver", 5: "spine"}
    assert main(["evaluate", "--prediction", str(tmp_path), "--truth", str(phantom)]) == 0
    assert "liver" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("r.dcm", [], "found a scan that is no DICOM series"),
        ("r", ["--format", "dcm"], "found a scan that is no DICOM series"),
        ("r.nii.gz", ["--format", "seg.nrrd"], "--format: found seg.nrrd for the file"),
        ("r.seg.nrrd.gz", [], "a folder, or a file ending in"),
    ],
)
def test_formats_that_do_not_go_together(
    program, task_file, phantom, tmp_path, capsys, output, options, message
):
    scan = phantom / "images" / "mr_000.nii.gz"
    assert program.segment(scan, tmp_path / output, "--task", task_file, *options) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_every_format_of_label_maps_can_be_chosen():
    assert {f".{ending}" for ending in FORMATS} == set(LABELS_WRITABLE)
