# SPDX-License-Identifier: Apache-2.0
"""``learn``, ``segment`` and ``evaluate`` from files to files, with an untrained model."""

from __future__ import annotations

import inspect
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastproto.segmentation
from fastproto.cli import main
from fastproto.cli.segment import find_scans, plan_outputs, stem
from fastproto.data import Preprocessing, read_label, read_volume
from fastproto.data.volume import check_same_grid, write_volume
from fastproto.errors import ArgumentError, VolumeError
from fastproto.nn import FewShotUNet
from fastproto.segmentation import Task
from fastproto.segmentation.learn import AUTO_STEPS
from fastproto.segmentation.postprocess import uncertainty
from fastproto.segmentation.predict import BATCH

ORGANS = ["liver=1", "spine=5"]
QUICK = ["--adapt", "0", "--prior", "box", "--slices", "3"]


@pytest.fixture
def example(phantom) -> list[str]:
    case = "mr_000.nii.gz"
    return [str(phantom / "images" / case), str(phantom / "labels" / case)]


@pytest.fixture
def task_file(model_file, example, tmp_path) -> Path:
    path = tmp_path / "organs.task"
    assert learn(model_file, example, path) == 0
    return path


def learn(model_file: Path, example: list[str], path: Path, *more: str) -> int:
    files = ["--model", str(model_file), "--image", example[0], "--label", example[1]]
    return main(["learn", *files, "--labels", *ORGANS, *QUICK, "-o", str(path), *more])


def segment(model_file: Path, task_file: Path, source: object, output: object, *more: str) -> int:
    files = ["--model", str(model_file), "--task", str(task_file)]
    return main(["segment", *files, "-i", str(source), "-o", str(output), *more])


def test_defaults_are_those_of_the_library(capsys):
    parameters = inspect.signature(fastproto.segmentation.register).parameters
    for command in ("learn", "segment"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        for option in ("slices", "prior"):
            described = text.split(f"--{option} ")[-1]
            assert described.split("(default: ")[1].split(")")[0] == str(parameters[option].default)
        assert "(default: base," in text
    seen = inspect.signature(fastproto.segmentation.segment_volume).parameters["batch_size"]
    assert seen.default is None
    assert f"(default: {BATCH})" in text


def test_the_former_name_of_learn(model_file, example, tmp_path, capsys):
    files = ["--model", str(model_file), "--image", example[0], "--label", example[1]]
    for name in ("learn", "register"):
        options = ["--labels", *ORGANS, *QUICK, "-o", str(tmp_path / name)]
        assert main([name, *files, *options]) == 0
    assert (tmp_path / "register").read_bytes() == (tmp_path / "learn").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "register" not in capsys.readouterr().out


@pytest.mark.parametrize("source", ["tasks", "examples"])
def test_the_model_is_told_by_its_weights_once(
    model_file, task_file, example, phantom, tmp_path, monkeypatch, source
):
    """Not once per scan: it reads all of them."""
    counted = []
    whole = FewShotUNet.fingerprint
    monkeypatch.setattr(FewShotUNet, "fingerprint", lambda model: counted.append(1) or whole(model))
    arguments = 2 * (["--task", str(task_file)] if source == "tasks" else ["--example", *example])
    if source == "examples":
        arguments += ["--labels", *ORGANS, *QUICK]
    files = ["--model", str(model_file), "-i", str(phantom / "images"), "-o", str(tmp_path / "out")]
    assert main(["segment", *files, *arguments, "--no-overlay"]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert len(counted) == 1


def test_learn_lists_what_it_learned(model_file, example, tmp_path, capsys):
    path = tmp_path / "organs.task"
    assert learn(model_file, example, path, "--slices", "6") == 0
    task = Task.load(path)
    assert task.labels == {1: "liver", 5: "spine"}
    out, err = capsys.readouterr()
    first, header, *lines = out.splitlines()
    assert first == f"learned from {example[0]}, without adaptation:"
    assert header.split() == [
        "label", "organ", "slices", "prototypes", "field", "of", "view", "expected", "Dice"
    ]  # fmt: skip
    assert lines[-1].startswith(f"{path}: ")
    for line, organ in zip(lines, task.organs, strict=False):
        known = len(organ.prototypes.protos)
        assert line.split() == [
            str(organ.value), organ.name, str(len(organ.slices)), str(known),
            f"{organ.side:.0f}", "mm", f"{organ.expected_dice:.2f}",
        ]  # fmt: skip
        poor = organ.expected_dice < 0.5
        assert (f"warning: {organ.name}: the network could not learn this organ" in err) == poor
    assert "expect poor results" in err  # of a network that nobody trained


def test_learn_adapts(model_file, example, tmp_path, monkeypatch, capsys):
    seen = []

    def adapt(model, organs, steps, *, progress, **options):
        seen.append(steps)
        progress(1, steps, 0.5)
        return model, {"decoder.head.bias": torch.tensor([7.0]).half()}

    monkeypatch.setattr("fastproto.segmentation.learn.adapt_model", adapt)
    dice = itertools.cycle([0.9, 0.1])  # afterwards and before
    monkeypatch.setattr("fastproto.segmentation.learn._expected", lambda organs: next(dice))
    path = tmp_path / "organs.task"
    assert learn(model_file, example, path, "--slices", "6", "--adapt", "2") == 0
    assert "adapted in 2 steps:" in capsys.readouterr().out
    assert Task.load(path).weights["decoder.head.bias"].item() == 7
    assert learn(model_file, example, path, "--slices", "6", "--adapt", "auto") == 0
    files = ["--model", str(model_file), "--image", example[0], "--label", example[1]]
    assert main(["learn", *files, "--classes", "1", "--prior", "box", "-o", str(path)]) == 0
    assert seen == [2, AUTO_STEPS["cpu"], AUTO_STEPS["cpu"]]
    for text in ("-1", "some", "1.5"):
        with pytest.raises(SystemExit):
            learn(model_file, example, path, "--adapt", text)
        assert "auto, or a" in capsys.readouterr().err


@pytest.mark.parametrize("prior", ["box", "affine"])
def test_learn_with_a_prior(model_file, example, tmp_path, prior):
    path = tmp_path / "organs.task"
    assert learn(model_file, example, path, "--prior", prior) == 0
    assert Task.load(path).atlas.kind == prior


def test_learn_takes_a_table_and_a_choice(model_file, example, phantom, tmp_path, capsys):
    image, label = example
    bare = tmp_path / "mask.nii.gz"
    shutil.copy(label, bare)
    table = ["--labels", str(phantom / "dataset.json")]

    def run(mask: object, name: str, *more: str) -> int:
        files = ["--model", str(model_file.parent), "--image", image, "--label", str(mask)]
        return main(["learn", *files, *QUICK, "-o", str(tmp_path / name), *more])

    def labels(name: str) -> dict[int, str]:
        return Task.load(tmp_path / name).labels

    assert run(bare, "table.task", *table) == 0
    known = labels("table.task")
    assert len(known) >= 6
    assert known[1] == "liver"
    assert run(label, "beside.task") == 0  # names are in the data set beside it
    assert labels("beside.task") == known
    assert run(bare, "numbers.task") == 0
    assert labels("numbers.task") == {value: f"label {value}" for value in known}
    assert run(label, "some.task", "--classes", "Spine", "1") == 0
    assert labels("some.task") == {1: "liver", 5: "spine"}
    assert run(bare, "one.task", "--classes", "5") == 0
    assert labels("one.task") == {5: "label 5"}
    capsys.readouterr()
    assert run(bare, "none.task", "--classes", "spine") == 2
    assert "names that --labels or a dataset.json explains" in capsys.readouterr().err
    assert run(label, "none.task", "--labels", "heart=99") == 2
    assert "no voxel of label 99" in capsys.readouterr().err


def test_a_label_that_the_data_set_does_not_name(model_file, example, phantom, tmp_path):
    folder = tmp_path / "set"
    (folder / "labels").mkdir(parents=True)
    label = Path(shutil.copy(example[1], folder / "labels"))
    (folder / "dataset.json").write_text('{"labels": {"1": "liver"}}')
    files = ["--model", str(model_file), "--image", example[0], "--label", str(label)]
    path = tmp_path / "organs.task"
    assert main(["learn", *files, *QUICK, "--classes", "liver", "5", "-o", str(path)]) == 0
    assert Task.load(path).labels == {1: "liver", 5: "label 5"}


def test_learn_refuses_unnamed_labels_of_a_table(model_file, example, tmp_path, capsys):
    (tmp_path / "organs.json").write_text('{"liver": 1}')
    image, label = example
    arguments = ["--model", str(model_file), "--image", image, "--label", label]
    arguments += ["--labels", str(tmp_path / "organs.json"), "-o", str(tmp_path / "organs.task")]
    assert main(["learn", *arguments]) == 2
    assert "unknown label" in capsys.readouterr().err
    assert not (tmp_path / "organs.task").exists()


def test_the_base_model_is_the_default(example, model_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastproto.segmentation.task.BASE_FILE", tmp_path / "base.safetensors")
    arguments = ["learn", "--image", example[0], "--label", example[1], "--classes", "liver"]
    arguments += [*QUICK, "-o", str(tmp_path / "organs.task")]
    assert main(arguments) == 2
    assert "no base model in this installation" in capsys.readouterr().err
    shutil.copy(model_file, tmp_path / "base.safetensors")
    assert main(arguments) == 0


def test_segment_one_scan_with_everything(model_file, task_file, phantom, tmp_path, capsys):
    scan = phantom / "images" / "mr_001.nii.gz"
    output = tmp_path / "results" / "organs.nii.gz"
    options = ["--probabilities", "--uncertainty", "--threads", "1", "--batch-size", "3"]
    assert segment(model_file, task_file, scan, output, *options) == 0
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


def test_segment_writes_label_map_and_picture_by_default(model_file, task_file, phantom, tmp_path):
    scan = phantom / "images" / "mr_001.nii.gz"
    assert segment(model_file, task_file, scan, tmp_path / "a") == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "mr_001.nii.gz", "mr_001.png"
    ]  # fmt: skip
    assert segment(model_file, task_file, scan, tmp_path / "b", "--no-overlay") == 0
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["mr_001.nii.gz"]
    assert (
        segment(model_file, task_file, scan, tmp_path / "c", "--uncertainty", "--no-overlay") == 0
    )
    assert len(list((tmp_path / "c").iterdir())) == 2  # no probabilities


def test_segment_learns_on_the_spot_like_learn(
    model_file, task_file, example, phantom, tmp_path, capsys
):
    scan = phantom / "images" / "mr_002.nii.gz"
    assert segment(model_file, task_file, scan, tmp_path / "a.nii.gz", "--probabilities") == 0
    arguments = ["--example", *example, "--labels", *ORGANS, *QUICK, "--probabilities"]
    arguments += ["-i", str(scan), "-o", str(tmp_path / "b.nii.gz")]
    capsys.readouterr()
    assert main(["segment", "--model", str(model_file), *arguments]) == 0
    assert f"learned from {example[0]}" in capsys.readouterr().out
    for name in ("{}.nii.gz", "{}-probabilities/1-liver.nii.gz"):
        a, b = (read_volume(tmp_path / name.format(run)).array for run in "ab")
        assert np.array_equal(a, b)


def test_several_examples_are_several_tasks(model_file, example, phantom, tmp_path):
    other = [part.replace("mr_000", "mr_001") for part in example]
    scan = phantom / "images" / "mr_002.nii.gz"
    tasks = [tmp_path / "one.task", tmp_path / "other.task"]
    for files, path in zip((example, other), tasks, strict=True):
        assert learn(model_file, files, path) == 0
    second = ["--task", str(tasks[1]), "--probabilities"]
    assert segment(model_file, tasks[0], scan, tmp_path / "a.nii.gz", *second) == 0
    arguments = ["--example", *example, "--example", *other, "--labels", *ORGANS, *QUICK]
    arguments += ["-i", str(scan), "-o", str(tmp_path / "b.nii.gz"), "--probabilities"]
    assert main(["segment", "--model", str(model_file), *arguments]) == 0
    assert segment(model_file, tasks[0], scan, tmp_path / "c.nii.gz", "--probabilities") == 0
    both, again, one = (
        read_volume(tmp_path / f"{run}-probabilities" / "1-liver.nii.gz").array for run in "abc"
    )
    assert np.array_equal(both, again)
    assert not np.array_equal(both, one)


def test_an_organ_that_is_probably_absent_is_named(
    model_file, task_file, phantom, tmp_path, monkeypatch, capsys
):
    scan = phantom / "images" / "mr_001.nii.gz"
    for least, names in ((-1.0, []), (1.1, ["liver", "spine"])):
        monkeypatch.setattr("fastproto.segmentation.predict.ABSENT", least)
        assert segment(model_file, task_file, scan, tmp_path / "out.nii.gz") == 0
        warnings = capsys.readouterr().err.splitlines()
        assert warnings == [
            f"fastproto: warning: {scan}: {name} is probably not in this scan" for name in names
        ]


def test_a_registration_that_failed_is_told(
    model_file, example, phantom, tmp_path, monkeypatch, capsys
):
    def fail(*_, **__):
        raise RuntimeError("itk says much\nno overlap")

    task_file = tmp_path / "organs.task"
    assert learn(model_file, example, task_file, "--prior", "affine") == 0
    monkeypatch.setattr("fastproto.segmentation.prior.align_affine", fail)
    capsys.readouterr()
    scan = phantom / "images" / "mr_001.nii.gz"
    assert segment(model_file, task_file, scan, tmp_path / "out.nii.gz") == 0
    assert "only body boxes were compared (no overlap)" in capsys.readouterr().err


def test_a_failing_scan_does_not_stop_the_folder(model_file, task_file, phantom, tmp_path, capsys):
    scans = tmp_path / "scans"
    shutil.copytree(phantom / "images", scans)
    damaged = scans / "mr_001.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    (scans / "notes.txt").write_text("not a scan")
    assert segment(model_file, task_file, scans, tmp_path / "results", "--no-overlay") == 2
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
        ([], "nothing to find"),
        (["--task", "t", "--example", "a.nii", "b.nii"], "task files and annotated scans"),
        (["--task", "t", "--labels", "liver=1"], "--labels: found that it is given with --task"),
        (["--task", "t", "--adapt", "5", "--slices", "3"], "--slices, --adapt: found"),
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
    example = ["--example", str(series), str(tmp_path / "label.nii.gz"), *QUICK]
    arguments = ["--model", str(model_file), *example, "-i", str(series.parent)]
    assert main(["segment", *arguments, "-o", str(tmp_path / "results")]) == 0
    check_same_grid(volume, read_label(tmp_path / "results" / "series.nii.gz"))


@pytest.mark.data
def test_dicom_series_with_a_nifti_annotation_in_other_axes(test_data, tmp_path):
    folder = test_data / "dicom" / "totalseg_ct_jpeg2000"
    preprocessing = Preprocessing("ct", image_size=64, mean=20.0, std=80.0)
    model = tmp_path / "model.safetensors"
    extra = {"preprocessing": {"ct": preprocessing.to_dict()}}
    FewShotUNet(encoder="resnet18").save(model, extra)
    series, annotation = folder / "series", folder / "seg.nii.gz"
    value = int(read_label(annotation).array.max())
    example = ["--example", str(series), str(annotation), *QUICK]
    out = tmp_path / "out.nii.gz"
    arguments = ["segment", "--model", str(model), *example, "--labels", f"organ={value}"]
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
