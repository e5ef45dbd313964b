# SPDX-License-Identifier: Apache-2.0
"""Cross-validation: who teaches, who is tested, what is trained on, and going on after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastproto._files import alone_in
from fastproto.cli import main
from fastproto.data import read_label, write_volume
from fastproto.errors import (
    ArgumentError,
    CheckpointError,
    DatasetError,
    FastprotoWarning,
    LabelError,
    OutputError,
    ResourceError,
)
from fastproto.evaluation import crossval as runner
from fastproto.evaluation.crossval import CrossValidation, crossval
from fastproto.evaluation.report import summarise, summary_text
from fastproto.training.sources import read_training_data

from .conftest import save_model


class Threshold:
    """Knows the patients of `patients` by their grey values. Raises when `left` runs out."""

    left = 1000
    scans: list[str]

    def __init__(self, example) -> None:
        self.example = example

    def segment(self, scan) -> dict[str, np.ndarray]:
        type(self).left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        Threshold.scans.append(scan.path.name[0])
        found = (scan.array / 60).clip(0, 3).astype(np.uint8)
        found[~np.isin(found, list(self.example.organs))] = 0
        return {"right": found, "nothing": np.zeros_like(found)}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, patients: Path, tmp_path: Path):
    """A cross-validation of whole volumes, with `Threshold` in the place of all methods."""
    monkeypatch.setattr(Threshold, "scans", [], raising=False)
    monkeypatch.setattr(Threshold, "left", 1000)
    monkeypatch.setattr(runner, "make_method", lambda name, model, **options: Threshold)

    def run(out: Path = tmp_path, **changed: object) -> dict:
        values: dict = {"model": "none", "methods": ("registration",), "folds": 2}
        values |= {"protocols": ("whole",), "progress": False} | changed
        return crossval(CrossValidation(str(patients), str(out), **values))

    return run


def lines(out: Path) -> list[dict]:
    text = (out / "results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()][1:]


def test_every_test_case_is_annotated_in_turn_or_those_that_are_named(run, tmp_path):
    summary = run()
    pairs = [(unit["fold"], unit["annotated"], unit["query"]) for unit in lines(tmp_path)]
    folds = {0: "abc", 1: "cdea"}
    assert pairs == [
        (fold, teacher, query)
        for fold, cases in folds.items()
        for teacher in cases
        for query in cases
        if query != teacher
    ]
    assert summary["tests"] == {"fold-0": ["a", "b", "c"], "fold-1": ["c", "d", "e", "a"]}
    right, nothing = summary["results"]
    assert (right["variant"], nothing["variant"]) == ("right", "nothing")
    dice = {organ["organ"]: organ["dice"]["mean"] for organ in right["organs"]}
    assert dice["liver"] == 1
    assert nothing["mean"]["dice"]["mean"] == 0
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["quoted"] == []
    run(tmp_path / "named", test_cases=("a", "b"), annotated=("a", "d"))
    pairs = [(unit["annotated"], unit["query"]) for unit in lines(tmp_path / "named")]
    assert pairs == [("a", "b"), ("d", "a"), ("d", "b")]


def test_an_organ_that_a_scan_lacks(run, tmp_path):
    summary = run(test_cases=("d", "e"))
    taught_by_d, taught_by_e = lines(tmp_path)
    spurious = [row for row in taught_by_d["rows"] if row["organ"] == "left kidney"]
    assert [row["status"] for row in spurious] == ["spurious", "absent"]
    assert [row["dice"] for row in spurious] == [0, None]
    assert {row["organ"] for row in taught_by_e["rows"]} == {"liver", "right kidney"}
    kidney = summary["results"][0]["organs"][2]
    assert (kidney["organ"], kidney["n"]) == ("left kidney", 1)
    with pytest.raises(LabelError, match="none of the organs"):
        run(tmp_path / "2", test_cases=("d", "e"), classes=("left kidney",))


def test_what_is_ignored_does_not_count(run, patients, tmp_path):
    """Where the truth is unsure of the left kidney, what is found there is not wrong."""
    fields = json.loads((patients / "dataset.json").read_text())
    fields["labels"] = {"liver": 1, "right kidney": 2, "ignore": 3, "left kidney": 4}
    (patients / "dataset.json").write_text(json.dumps(fields))
    for case in "ab":
        label = read_label(patients / "labels" / f"{case}.nii.gz")
        label.array[:, :, 24:] = np.where(label.array[:, :, 24:] == 2, 3, label.array[:, :, 24:])
        label.array[0, 0, 0] = 4
        label.array[3, :8][label.array[3, :8] == 1] = 3  # a part of the liver
        write_volume(label.path, label.array, like=label)
    summary = run(test_cases=("a", "b"), classes=("Liver",))
    liver = summary["results"][0]["organs"][0]
    assert (liver["organ"], liver["dice"]["mean"]) == ("liver", 1)
    with pytest.raises(LabelError, match="no label 'ignore'"):
        run(tmp_path / "2", test_cases=("a", "b"), classes=("ignore",))


def test_an_organ_asked_for_that_an_annotated_scan_lacks_is_named(run, tmp_path, recwarn):
    run(test_cases=("d", "e"))
    assert not [each for each in recwarn if each.category is FastprotoWarning]  # nobody asked
    with pytest.warns(FastprotoWarning, match=r"e\.nii\.gz: it does not show left kidney;"):
        run(tmp_path / "2", test_cases=("d", "e"), classes=("liver", "left kidney"))


def test_a_modality_that_the_description_does_not_tell(run, patients, tmp_path, trainings):
    fields = json.loads((patients / "dataset.json").read_text())
    (patients / "dataset.json").write_text(json.dumps({**fields, "modality": "zscore"}))
    with pytest.raises(DatasetError, match="--modality ct"):
        run()
    run(tmp_path / "out", methods=("fastproto",), model=None, modality="ct")
    assert {config.modality for config in trainings} == {"ct"}
    with pytest.raises(CheckpointError, match="modality"):
        run(tmp_path / "out", methods=("fastproto",), model=None, modality="mr")


def test_what_is_finished_is_not_computed_again(run, tmp_path):
    Threshold.left = 4
    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(lines(tmp_path)) == 4
    file = tmp_path / "results.jsonl"
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole[:-20], encoding="utf-8")  # killed while it wrote the fourth
    Threshold.left = 1000
    before = len(Threshold.scans)
    for _ in range(2):
        run()
        assert len(Threshold.scans) - before == 18 - 3
    assert len(lines(tmp_path)) == 18
    assert file.read_text(encoding="utf-8").startswith(whole)


def test_two_runs_do_not_write_into_one_folder(run, tmp_path):
    with alone_in(tmp_path), pytest.raises(OutputError, match="another process is working in it"):
        run()
    assert not (tmp_path / "results.jsonl").exists()
    assert run()["results"]


def test_a_scan_that_memory_does_not_hold_is_named(run, monkeypatch):
    def too_large(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Threshold, "segment", too_large)
    with pytest.raises(ResourceError, match=r"b\.nii\.gz: found too little memory"):
        run(test_cases=("a", "b"))


def test_results_of_other_settings_are_not_mixed(run, tmp_path):
    run(test_cases=("a", "b"))
    run(test_cases=("a", "b"), annotated=("c",))
    assert len(lines(tmp_path)) == 4
    with pytest.raises(CheckpointError, match="z_margin"):
        run(test_cases=("a", "b"), z_margin=3)
    for damage in ("no JSON\n", "[1]\n"):
        (tmp_path / "results.jsonl").write_text(damage, encoding="utf-8")
        with pytest.raises(CheckpointError, match="damaged"):
            run()


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch, model_file: Path) -> list:
    """Training is noted, and gives an untrained model."""
    seen = []

    def train(config, *, resume):
        seen.append(config)
        folder = Path(config.output)
        (folder / "model.safetensors").symlink_to(model_file)
        config_file = json.dumps(config.to_dict())
        (folder / "config.json").write_text(config_file, encoding="utf-8")
        (folder / "log.jsonl").write_text('{"step": 1, "seconds": 90.0}\n', encoding="utf-8")

    monkeypatch.setattr(runner, "train", train)
    return seen


def test_setting_1_trains_once_for_each_fold(run, trainings):
    options = {"model": None, "training": {"holdout_cases": ["d"]}}
    summary = run(methods=("fastproto",), **options)
    assert [config.holdout_cases for config in trainings] == [tuple("abcd"), tuple("cdead")]
    for config in trainings:
        assert config.holdout == ("liver", "right kidney", "left kidney")
        assert not config.drop_excluded_slices
        assert config.label_fraction == 0
    assert summary["training_minutes"] == {"fold-0": 1.5, "fold-1": 1.5}
    run(methods=("fastproto", "adapted"), **options)
    assert len(trainings) == 2


def test_setting_2_trains_for_each_group_and_drops_slices_with_any(run, tmp_path, trainings):
    run(
        model=None,
        methods=("fastproto",),
        setting=2,
        groups=(("liver",), ("right kidney", "3")),
        test_cases=("b", "c", "d", "e"),
        training={"steps": 1, "image_size": 32, "encoder": "resnet18", "all_planes": False},
    )
    assert [config.holdout for config in trainings] == [("liver",), ("right kidney", "left kidney")]
    measured = {unit["round"]: {r["organ"] for r in unit["rows"]} for unit in lines(tmp_path)}
    assert measured["test-without-1"] == {"liver"}
    kept = {
        training.holdout[0]: read_training_data(training.resolved(gpu=False)).slices
        for training in trainings
    }
    # The liver is in slices 1 to 6, the right kidney in 4 to 7, the left one in 5 to 8.
    assert kept == {"liver": {"0/a": [0, 7, 8, 9]}, "right kidney": {"0/a": [0, 1, 2, 3, 9]}}


def test_a_model_is_not_tested_on_its_own_patients(run, tmp_path):
    model = save_model(tmp_path / "model.safetensors", dataset="boxes", training_cases=["c", "d"])
    options = {"model": str(model), "methods": ("fastproto",)}
    assert run(test_cases=("a", "b"), **options)["training"] == {}
    with pytest.raises(ArgumentError, match="trained on c"):
        run(test_cases=("a", "c"), **options)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"setting": 2}, "groups"),
        ({"groups": (("liver",),)}, "groups"),
        ({"methods": ("fastproto",)}, "without a model"),
        ({"test_cases": ("a",)}, "no case but the annotated one"),
        ({"folds": 9}, "folds"),
        ({"classes": ("heart",)}, "heart"),
    ],
)
def test_unusable_settings(changed, message, run):
    with pytest.raises((ArgumentError, LabelError), match=message):
        run(**changed)


def test_a_case_without_labels_cannot_be_tested(patients, run):
    (patients / "labels" / "b.nii.gz").unlink()
    with pytest.raises(DatasetError, match="case b"):
        run()


def unit(annotated: str, query: str, **dice: float | None) -> dict:
    rows = [
        {"variant": "v", "label": n, "organ": organ, "dice": value}
        for n, (organ, value) in enumerate(dice.items(), 1)
    ]
    key = {"round": "r", "fold": 0, "annotated": annotated, "query": query, "method": "m"}
    return {**key, "protocol": "ep1", "rows": rows}


def test_means_run_over_queries_then_over_annotated_scans():
    (entry,) = summarise(
        [
            unit("a", "b", liver=0.2, spleen=0.9),
            unit("a", "c", liver=0.4, spleen=None),
            unit("b", "a", liver=0.7, spleen=0.5),
        ]
    )
    liver, spleen = entry["organs"]
    assert liver["dice"]["mean"] == pytest.approx((0.3 + 0.7) / 2)
    assert liver["dice"]["std"] == pytest.approx(np.std([0.3, 0.7], ddof=1))
    assert (liver["n"], spleen["n"]) == (3, 2)
    assert spleen["dice"]["mean"] == pytest.approx(0.7)
    assert entry["mean"]["dice"]["mean"] == pytest.approx(0.6)
    assert entry["mean"]["dice"]["std"] == pytest.approx(np.std([0.6, 0.6], ddof=1))
    assert entry["dice_by_annotated"] == pytest.approx({"a (fold 0)": 0.6, "b (fold 0)": 0.6})


def test_published_numbers_stand_beside_chaos_alone(patients, run):
    file = patients / "dataset.json"
    file.write_text(file.read_text().replace("boxes", "CHAOS T2"), encoding="utf-8")
    summary = run(test_cases=("a", "b"))
    text = summary_text(summary)
    assert "quoted, not measured here" in text
    assert "SSL-ALPNet" in text
    assert all(row["source"] for row in summary["quoted"])


def command(patients: Path, out: Path, *more: str) -> int:
    arguments = ["crossval", "--data", str(patients), "--out", str(out), "--device", "cpu"]
    arguments += ["--test-cases", "a", "b", "--annotated", "a"]
    return main([*arguments, *more])


def test_the_command_measures_all_protocols_with_one_model(patients, tmp_path, model_file, capsys):
    options = ["--methods", "fastproto", "prototypes", "registration", "--slices", "2"]
    options += ["--classes", "liver", "3", "--model", str(model_file)]
    assert command(patients, tmp_path, *options) == 0
    printed = capsys.readouterr().out
    for words in ("EP1", "EP2", "Whole volumes", "fastproto: network + prior", "HD95"):
        assert words in printed
    for row in ("prototypes: network", "registration: box", "registration: affine"):
        assert row in printed
    assert command(patients, tmp_path, *options) == 0
    assert capsys.readouterr().out == printed
    units = lines(tmp_path)
    assert len(units) == 2 * 3 + 1
    (whole,) = [u for u in units if (u["method"], u["protocol"]) == ("fastproto", "whole")]
    assert {row["organ"] for row in whole["rows"]} == {"liver", "left kidney"}
    assert {"hd95", "assd", "nsd"} <= set(whole["rows"][0])
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert str(tmp_path) not in json.dumps(summary)


def test_the_command_trains_a_fold(patients, tmp_path):
    options = ["--classes", "liver", "--methods", "fastproto", "--protocols", "ep2"]
    options += ["--set", "steps=1", "batch=1", "image_size=32", "encoder=resnet18"]
    assert command(patients, tmp_path, *options) == 0
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["training"]["steps"] == 1
    assert list(summary["training_minutes"]) == ["test"]


def test_the_command_says_what_there_is(capsys):
    with pytest.raises(SystemExit):
        main(["crossval", "--data", "d", "--out", "o", "--z-margin", "x"])
    assert "--z-margin: found 'x'; allowed: a whole number, or all" in capsys.readouterr().err
