# SPDX-License-Identifier: Apache-2.0
"""Cross-validation: train on some patients, learn from one of the others, measure on the rest.

Every measurement is a line of ``results.jsonl`` in the output folder, written when it is done, so a
run that was killed goes on where it was.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastproto._files import alone_in, append_text, write_text
from fastproto._memory import enough_memory
from fastproto.data.dataset import Case, Dataset, open_datasets
from fastproto.data.volume import Volume, check_labels, read_label, read_volume
from fastproto.defaults import PLANE
from fastproto.errors import CheckpointError, DatasetError, LabelError, require, warn
from fastproto.evaluation.measure import evaluate_case
from fastproto.evaluation.methods import Example, Learned, LearnedNetwork, make_method
from fastproto.evaluation.metrics import dice
from fastproto.evaluation.protocol import CHUNKS, episodic_dice, folds
from fastproto.evaluation.report import json_text, machine, quoted, summarise, versions, without_nan
from fastproto.evaluation.settings import EPISODIC, NO_MODEL, WITHOUT_MODEL, CrossValidation
from fastproto.nn.base import FewShotModel
from fastproto.segmentation.learn import model_preprocessing
from fastproto.segmentation.task import load_model
from fastproto.training.config import TrainConfig
from fastproto.training.trainer import train

# Of the settings, those that a run that goes on must share: the others only add work, or say where.
_SHARED = ("test_cases", "folds", "setting", "classes", "groups", "model", "training", "z_margin")
KEY = ("round", "fold", "annotated", "query", "method", "protocol")  # of a measurement


def crossval(config: CrossValidation, command: str = "") -> dict[str, Any]:
    """Measure what is not measured yet, and sum up; ``command`` is for the record.

    Returns:
        What ``summary.json`` holds: the results (see `summarise`) and where they come from.

    Raises:
        InputError: Data, a model or options that cannot be used.
        CheckpointError: The output folder holds results of other settings.
        OutputError: Another process works in it, or it cannot be written.
        ResourceError: There is too little memory.
    """
    (dataset,) = open_datasets([config.data], config.modality)
    given = load_model(config.model) if config.model not in (None, NO_MODEL) else None
    rounds = _rounds(config, dataset, given)
    if given and dataset.name in str(given.extra.get("dataset")):
        tests = {id_ for round_ in rounds for id_ in round_.tests}
        seen = ", ".join(sorted(tests & {*given.extra.get("training_cases", [])}))
        require(
            not seen,
            "model",
            found=f"that it was trained on {seen}",
            allowed="test cases that it never saw",
            fix="Name such cases with --test-cases, or leave --model out and train.",
        )
    values = dataclasses.asdict(config)
    settings = {name: values[name] for name in _SHARED} | {
        "options": config.options,
        "model": given.fingerprint() if given else config.model,
        "data": dataset.name,
        "more_data": [Path(path).name for path in config.more_data],
    }
    if config.modality is not None:  # else earlier results would be those of other settings
        settings["modality"] = config.modality
    work = [
        (round_, case, [query for query in dataset.select(round_.tests) if query.id != case.id])
        for round_ in rounds
        for case in dataset.select(config.annotated or round_.tests)
    ]
    total = sum(len(queries) for *_, queries in work)
    found = "no case but the annotated one"
    require(total, "test_cases", found=found, allowed="a case to segment")
    model = given.extra.get("name", Path(str(config.model)).name) if given else config.model
    with alone_in(Path(config.output)):
        results = ResultFile(Path(config.output) / "results.jsonl", settings)
        with tqdm(total=total, unit="scan", disable=None if config.progress else True) as bar:
            for round_, case, queries in work:
                teacher = _Teacher(round_, case)
                for query in queries:
                    bar.set_postfix_str(f"{round_.name}, {case.id} -> {query.id}", refresh=False)
                    with enough_memory(query.image):
                        teacher.measure(query, results)
                    bar.update()
        training, minutes = _trainings(rounds)
        summary = {
            "date": datetime.date.today().isoformat(),
            "command": command,
            "machine": machine(config.device),
            "versions": versions("fastproto", "torch", "python", "cpu_level"),
            "data": dataset.name,
            "model": model,
            "tests": {round_.name: round_.tests for round_ in rounds},
            "annotated": list(config.annotated) or "each test case in turn",
            "settings": settings,
            "training": training,
            "training_minutes": minutes,
            "results": summarise(results.units.values()),
            "quoted": quoted(dataset.name),
        }
        write_text(Path(config.output) / "summary.json", json_text(summary, indent=1))
    return summary


class ResultFile:
    """JSON lines: the settings, then a line for each measurement that is finished.

    Args:
        path: The file; a last line that a killed process left unfinished is dropped.
        settings: Of the run that goes on or begins.

    Attributes:
        units: The measurements, by their values of ``KEY``.

    Raises:
        CheckpointError: The file holds results of other settings, or is damaged.
        OutputError: It cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        settings = json.loads(json.dumps(settings))  # tuples are lists now
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines(keepends=True) or [json_text(settings)]
        try:
            head, *units = map(json.loads, lines)
            self.units = {tuple(unit[name] for name in KEY): unit for unit in units}
            changed = [name for name in settings if head.get(name) != settings[name]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                path, found=f"a damaged line ({error})", allowed="what crossval wrote"
            ) from error
        require(
            head == settings,
            path,
            found=f"results with another {', '.join(changed)}",
            allowed="results of the same settings",
            fix="Choose another output folder, or delete the old results.",
            error=CheckpointError,
        )
        write_text(path, "".join(lines))

    def add(self, key: tuple[Any, ...], rows: list[dict[str, Any]]) -> None:
        """Keep a finished measurement."""
        unit = dict(zip(KEY, key, strict=True)) | {"rows": without_nan(rows)}
        append_text(self.path, json_text(unit))
        self.units[key] = unit


@dataclasses.dataclass(frozen=True, eq=False)
class _Round:
    """One fold and one group of organs: what one training serves."""

    config: CrossValidation
    dataset: Dataset
    given: FewShotModel | None
    fold: int
    tests: list[str]
    organs: dict[int, str]
    name: str

    @property
    def folder(self) -> Path:
        """Of its training."""
        return Path(self.config.output) / "training" / self.name

    @functools.cached_property
    def model(self) -> FewShotModel:
        """The given model, or one trained for this round, now or earlier."""
        config, folder = self.config, self.folder
        if self.given is not None:
            return self.given.to(config.device)
        if not (folder / "finished").exists():
            kept = folder / "supervoxels"  # the same for all rounds
            if not kept.is_symlink():
                folder.mkdir(parents=True, exist_ok=True)
                (folder.parent / "supervoxels").mkdir(exist_ok=True)
                kept.symlink_to(Path("..", "supervoxels"), target_is_directory=True)
            defaults: dict[str, Any] = {"label_fraction": 0.0, "validation_episodes": 0}
            if "minutes" in config.training:
                defaults["steps"] = 10**9  # the minutes decide
            fixed = {
                "data": (str(self.dataset.root), *config.more_data),
                "output": str(folder),
                "modality": config.modality,
                "holdout": tuple(self.organs.values()),
                "holdout_cases": (*self.tests, *config.training.get("holdout_cases", ())),
                "drop_excluded_slices": config.setting == 2,
                "device": config.device,
                "progress": config.progress,
            }
            settings = TrainConfig.from_dict({**defaults, **config.training, **fixed})
            train(settings, resume=(folder / "config.json").exists())
            (folder / "finished").touch()
        return load_model(folder).to(config.device)

    def read(self, case: Case) -> tuple[Volume, Volume]:
        """A scan and its label map."""
        if case.label is None:
            raise DatasetError(
                f"{self.dataset.root}: case {case.id}",
                found="no label map",
                allowed="a label map for every case that is annotated or tested",
            )
        return read_volume(case.image), read_label(case.label)


@dataclasses.dataclass(eq=False)
class _Teacher:
    """One annotated case, and what methods learnt from it; nothing is read before it is needed."""

    round: _Round
    case: Case
    _learned: dict[str, Learned] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def example(self) -> Example:
        """The organs that the case shows."""
        image, label = self.round.read(self.case)
        found = check_labels(label, needed=False)
        organs = {value: name for value, name in self.round.organs.items() if value in found}
        missing = ", ".join(self.round.organs[value] for value in self.round.organs.keys() - organs)
        if organs and missing and (self.round.config.classes or self.round.config.groups):
            text = f"it does not show {missing}; nothing is measured of that with this annotation."
            warn(label.name, text)
        require(
            organs,
            label.name,
            found="none of the organs",
            allowed=f"an annotated scan of {', '.join(self.round.organs.values())}",
            fix="Name the cases to learn from with --annotated.",
            error=LabelError,
        )
        config, modality, plane = self.round.config, self.round.dataset.modality, PLANE
        if config.model != NO_MODEL and config.needing_model:
            plane = model_preprocessing(self.round.model, modality).plane
        return Example(image, label, organs, modality, plane, self.round.dataset.ignore)

    def learned(self, method: str) -> Learned:
        """What a method made of it."""
        if method not in self._learned:
            model = None if method in WITHOUT_MODEL else self.round.model
            learn = make_method(method, model, **self.round.config.options)
            self._learned[method] = learn(self.example)
        return self._learned[method]

    def measure(self, query: Case, results: ResultFile) -> None:
        """What is not measured yet with one query."""
        config, scan = self.round.config, None
        for method, protocol in itertools.product(config.methods, config.protocols):
            key = (self.round.name, self.round.fold, self.case.id, query.id, method, protocol)
            defined = protocol == "whole" or method in EPISODIC
            if defined and key not in results.units:
                scan = scan or self.round.read(query)
                results.add(key, self.rows(method, protocol, *scan))

    def rows(self, method: str, protocol: str, scan: Volume, truth: Volume) -> list[dict[str, Any]]:
        """One row for each variant and organ."""
        learned, organs = self.learned(method), self.example.organs
        ignore = self.example.ignore
        rows: list[dict[str, Any]] = []
        if protocol == "whole":
            for variant, labels in learned.segment(scan).items():
                found = dataclasses.replace(scan, array=labels)
                measured = evaluate_case(found, truth, organs, ignore=ignore)
                rows += [{"variant": variant} | row for row in measured]
            return rows
        assert isinstance(learned, LearnedNetwork)
        for organ, name in organs.items():
            score = episodic_dice(
                self.example.masks(self.example.label, organ),
                self.example.masks(truth, organ),
                learned.slice_segmenter(scan, organ),
                chunks=CHUNKS[protocol],
                z_margin=self.round.config.z_margin,
                ignored=None if ignore is None else self.example.masks(truth, ignore),
            )
            rows.append({"variant": "network", "label": organ, "organ": name, dice.name: score})
        return rows


def _rounds(config: CrossValidation, dataset: Dataset, given: FewShotModel | None) -> list[_Round]:
    """Every fold with every group of organs."""
    if config.test_cases:
        tests = [[case.id for case in dataset.select(config.test_cases)]]
    else:
        tests = folds([case.id for case in dataset.cases], config.folds)
    groups = config.groups or [config.classes or dataset.labels]
    named = [dataset.label_ids(group) for group in groups]
    allowed = "a dataset.json that names the organs"
    require(all(named), dataset.root, found="no named label", allowed=allowed, error=DatasetError)
    rounds = []
    for (fold, cases), group in itertools.product(enumerate(tests), named):
        name = "test" if config.test_cases else f"fold-{fold}"
        if config.groups:
            name += "-without-" + "-".join(map(str, group))
        organs = {value: dataset.labels[value] for value in group}
        rounds.append(_Round(config, dataset, given, fold, cases, organs, name))
    return rounds


def _trainings(rounds: list[_Round]) -> tuple[dict[str, Any], dict[str, float]]:
    """How the rounds were trained, and the minutes each took; empty without training."""
    settings: dict[str, Any] = {}
    minutes = {}
    for round_ in rounds:
        folder = round_.folder
        if round_.config.model is None and (folder / "finished").exists():
            settings = TrainConfig.load(folder / "config.json").to_dict()
            log = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
            seconds = sum(json.loads(line).get("seconds", 0) for line in log)
            minutes[round_.name] = round(seconds / 60, 1)
            settings["data"] = [Path(path).name for path in settings["data"]]
    for name in ("holdout", "holdout_cases", "output", "device", "progress"):
        settings.pop(name, None)  # of one round, or of this machine
    return settings, minutes
