# SPDX-License-Identifier: Apache-2.0
"""``fastproto learn``: what is learned, how it is called, and what the file holds."""

from __future__ import annotations

import inspect
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import fastproto.segmentation
from fastproto.cli import main
from fastproto.data import read_label, write_volume
from fastproto.segmentation import Task
from fastproto.segmentation.learn import AUTO_STEPS
from fastproto.segmentation.predict import BATCH

from .conftest import CHOSEN, QUICK


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


def test_the_former_name_of_learn(program, task_file, tmp_path, capsys):
    assert program.learn(tmp_path / "organs.task", *CHOSEN, name="register") == 0
    assert (tmp_path / "organs.task").read_bytes() == task_file.read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "register" not in capsys.readouterr().out


def test_the_base_model_is_the_default(program, task_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastproto.segmentation.task.BASE_FILE", tmp_path / "base.safetensors")
    arguments = ["learn", "--image", program.example[0], "--label", program.example[1]]
    arguments += [*CHOSEN, "-o", str(tmp_path / "organs.task")]
    assert main(arguments) == 2
    assert "no base model in this installation" in capsys.readouterr().err
    shutil.copy(program.model, tmp_path / "base.safetensors")
    assert main(arguments) == 0
    assert (tmp_path / "organs.task").read_bytes() == task_file.read_bytes()


def test_learn_lists_what_it_learned(program, tmp_path, capsys):
    path = tmp_path / "organs.task"
    assert program.learn(path, *CHOSEN, "--slices", "6") == 0
    task = Task.load(path)
    assert task.labels == {1: "liver", 5: "spine"}
    assert task.atlas.kind == "box"
    out, err = capsys.readouterr()
    first, how, header, *lines = out.splitlines()
    assert first == f"learning from {program.example[0]}: minutes on a CPU"
    assert how.startswith("without adaptation;")
    assert header.split() == [
        "label", "organ", "slices", "prototypes", "field", "of", "view", "predicted", "Dice"
    ]  # fmt: skip
    assert lines[-1].startswith(f"{path}: ")
    for line, organ in zip(lines, task.organs, strict=False):
        assert line.split() == [
            str(organ.value), organ.name, str(len(organ.slices)), str(len(organ.prototypes.protos)),
            f"{organ.side:.0f}", "mm", f"{organ.expected_dice:.2f}",
        ]  # fmt: skip
        poor = organ.expected_dice < 0.5
        assert (f"warning: {organ.name}: the network could not learn this organ" in err) == poor
    assert "expect poor results" in err  # of a network that nobody trained


def test_learn_adapts(program, tmp_path, monkeypatch, capsys):
    seen = []

    def adapt(model, organs, steps, *, progress, **options):
        seen.append(steps)
        progress(1, steps, 0.5)
        return model, {"decoder.head.bias": torch.tensor([7.0]).half()}

    monkeypatch.setattr("fastproto.segmentation.learn.adapt_model", adapt)
    dice = itertools.cycle([0.9, 0.1])  # afterwards and before
    monkeypatch.setattr("fastproto.segmentation.learn._expected", lambda organs: next(dice))
    path = tmp_path / "organs.task"
    assert program.learn(path, *CHOSEN, "--slices", "6", "--adapt", "2") == 0
    assert "adapted in 2 steps;" in capsys.readouterr().out
    assert Task.load(path).weights["decoder.head.bias"].item() == 7
    assert program.learn(path, "--classes", "1", "--prior", "box") == 0  # auto is the default
    assert seen == [2, AUTO_STEPS["cpu"]]
    for text in ("-1", "some", "1.5"):
        with pytest.raises(SystemExit):
            program.learn(path, "--adapt", text)
        assert "auto, or a" in capsys.readouterr().err


@pytest.fixture
def naming(program, task_file, tmp_path, monkeypatch):
    """What the library is asked for, by the label map and further options: labels, classes."""
    asked = []

    def register(model, image, mask, *, labels, classes, **options):
        asked.append((labels, classes))
        return Task.load(task_file)

    def run(label: Path, *more: str) -> tuple[dict[int, str] | None, list[int] | None]:
        options = ["--model", str(program.model.parent), *more]
        assert program.learn(tmp_path / "organs.task", *options, label=label) == 0
        return asked.pop()

    monkeypatch.setattr("fastproto.segmentation.register", register)
    return run


def test_names_come_from_a_table_or_the_data_set_and_classes_choose(
    naming, program, phantom, tmp_path
):
    label = Path(program.example[1])
    bare = Path(shutil.copy(label, tmp_path / "mask.nii.gz"))
    known, classes = naming(bare, "--labels", str(phantom / "dataset.json"))
    assert len(known) >= 6
    assert known[1] == "liver"
    assert classes is None
    assert naming(label) == (known, None)  # names are in the data set beside it
    assert naming(bare) == (None, None)
    assert naming(label, "--classes", "Spine", "1") == (known, [5, 1])
    assert naming(bare, "--classes", "5") == (None, [5])
    assert naming(label, "--labels", "liver=1", "spine=5") == ({1: "liver", 5: "spine"}, [1, 5])
    (tmp_path / "dataset.json").write_text((phantom / "dataset.json").read_text())
    assert naming(bare) == (known, None)  # beside the very file
    few = tmp_path / "labels" / "mask.nii.gz"  # in a data set that names the liver alone
    (tmp_path / "dataset.json").write_text('{"labels": {"1": "liver"}}')
    few.parent.mkdir()
    bare.rename(few)
    named = {value: name if value == 1 else f"label {value}" for value, name in known.items()}
    assert naming(few, "--classes", "liver", "5") == (named, [1, 5])


@pytest.mark.parametrize("where", ["dataset.json", "--labels", "pairs"])
def test_what_is_to_be_ignored_is_no_organ(program, tmp_path, where):
    """Wherever it is named: as if nobody had said what the spine is."""
    names = {"liver": 1, "spleen": 2, "ignore": 5}
    label = read_label(program.example[1])
    array = np.where(np.isin(label.array, list(names.values())), label.array, 0)
    other = tmp_path / "labelsTr" / "mask.nii.gz"
    write_volume(other, array, like=label)
    table = tmp_path / ("dataset.json" if where == "dataset.json" else "names.json")
    table.write_text(json.dumps({"labels": names}))
    options = {"dataset.json": [], "--labels": ["--labels", str(table)]}.get(where)
    if options is None:
        options = ["--labels", *(f"{name}={value}" for name, value in names.items())]
    task = tmp_path / "organs.task"
    assert program.learn(task, *QUICK, *options, label=other) == 0
    learned = Task.load(task)
    assert learned.labels == {1: "liver", 2: "spleen"}
    told = tmp_path / "told.task"  # were it background, other prototypes would come of it
    write_volume(tmp_path / "mask.nii.gz", np.where(array == 5, 0, array), like=label)
    pairs = ["--labels", "liver=1", "spleen=2"]
    assert program.learn(told, *QUICK, *pairs, label=tmp_path / "mask.nii.gz") == 0
    fewer, all_ = (
        sum(len(organ.prototypes.protos) for organ in each.organs)
        for each in (learned, Task.load(told))
    )
    assert fewer < all_


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "spine"], "names that --labels or a dataset.json explains"),
        (
            ["--labels", "liver=1", "--classes", "1", "heart"],
            "found no label 'heart'; allowed: 1 liver",
        ),
        (["--labels", "heart=99"], "no voxel of label 99"),
        (["--labels", "organs.json"], "unknown label"),
    ],
)
def test_organs_that_cannot_be_learned(program, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    Path("organs.json").write_text('{"liver": 1}')
    shutil.copy(program.example[1], "mask.nii.gz")
    assert program.learn("organs.task", *QUICK, *options, label="mask.nii.gz") == 2
    assert message in capsys.readouterr().err
    assert not Path("organs.task").exists()
    assert program.learn("organs.task", *QUICK, "--classes", "", label="mask.nii.gz") == 2
    assert "--classes: found ''" in capsys.readouterr().err
