# SPDX-License-Identifier: Apache-2.0
"""From a configuration to the episodes of a run: which cases, which classes, which source."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastproto.data.dataset import Case, Dataset, open_datasets
from fastproto.data.label_table import find_label
from fastproto.data.preprocessing import Preprocessing
from fastproto.data.volume import read_volume
from fastproto.errors import DatasetError, LabelError, require
from fastproto.training.augment import Augmentation
from fastproto.training.config import TrainConfig
from fastproto.training.episodes import (
    EpisodeSource,
    LabelEpisodes,
    MixedEpisodes,
    SupervoxelEpisodes,
)
from fastproto.training.slices import SliceStore
from fastproto.training.supervoxels import all_supervoxels

_VALIDATION_SEED = 20_010_911  # the same validation episodes for every training seed


@dataclass(frozen=True)
class TrainingData:
    """What a run is fed with.

    Attributes:
        training: Augmented episodes.
        validation: Fixed episodes without augmentation, or None without labels.
        extra: What the model file says about it, preprocessing included.
        slices: Numbers of the slices kept of each training case, ``DATA SET/CASE``; the same in a
            resumed run.
        summary: One line for the user: what is trained on.
    """

    training: EpisodeSource
    validation: EpisodeSource | None
    extra: dict[str, Any]
    slices: dict[str, list[int]]
    summary: str


@dataclass(frozen=True)
class _Part:
    """One data set of a run, with what it gives to it."""

    dataset: Dataset
    cases: list[Case]
    validation_cases: list[Case]
    classes: list[int]
    excluded: list[int]


def read_training_data(
    config: TrainConfig, preprocessing: Mapping[str, Any] | None = None
) -> TrainingData:
    """Open the data sets, fit the normalisation to the training cases and read their slices.

    Args:
        config: Without "auto", see ``TrainConfig.resolved``.
        preprocessing: Of a model to go on from: modality -> fields of ``Preprocessing``.

    Raises:
        ArgumentError: Classes both held out and to be trained on, or none left.
        LabelError: Classes that no data set has, or too little of to train on.
        DatasetError: Unknown cases, no case left, or no slices.
        InputError: Files that cannot be used.
    """
    assert config.image_size != "auto"
    parts = _parts(config)
    fitted = dict(preprocessing or {})
    for modality in dict.fromkeys(part.dataset.modality for part in parts):
        if modality in fitted:
            continue
        cases = [c for part in parts if part.dataset.modality == modality for c in part.cases]
        volumes = (read_volume(case.image) for case in cases)
        fitted[modality] = Preprocessing.fit(
            volumes, modality, config.image_size, crop=config.crop, plane=config.plane
        ).to_dict()

    options: dict[str, Any] = {n: getattr(config, n) for n in ("shots", "ways", "queries")}
    options["size"] = config.image_size
    find_regions = partial(
        all_supervoxels, folder=Path(config.output) / "supervoxels", progress=config.progress
    )
    share = config.label_fraction
    augmentation = Augmentation() if config.augment else None
    sources: list[EpisodeSource] = []
    validation: list[EpisodeSource] = []
    slices: dict[str, list[int]] = {}
    trained: dict[str, str] = {}
    used: set[str] = set()  # names and numbers of the classes that episodes have
    counts = {"supervoxels": 0, "labels": 0}
    for number, part in enumerate(parts):
        dataset = part.dataset
        fit = Preprocessing.from_dict(fitted[dataset.modality])
        stored = replace(fit, image_size=config.store_size)
        on_labels = bool(share > 0 and part.classes and _labelled(part.cases))
        on_regions = share < 1 or not on_labels
        store = SliceStore.build(
            dataset,
            part.cases,
            stored,
            labels=on_labels,
            find_regions=find_regions if on_regions else None,
            holding=None if on_regions else part.classes,
            without=_never_seen(part) if config.drop_excluded_slices else [],
        )
        slices |= {f"{number}/{case.id}": case.numbers for case in store.cases}
        label_episodes = partial(
            LabelEpisodes,
            classes=part.classes,
            excluded=part.excluded,
            names=dataset.labels,
            ignore=dataset.ignore,
            min_pixels=config.min_pixels,
            **options,
        )
        own: list[EpisodeSource] = []
        if on_regions:
            regions = SupervoxelEpisodes(
                store,
                config.seed,
                absent=config.absent_fraction,
                same_slice=config.same_slice_fraction,
                planes=config.all_planes and config.plane == "axial",
                gap=config.gap,
                augmentation=augmentation,
                **options,
            )
            own.append(regions)
            counts["supervoxels"] += len(store.cases)
        if on_labels:
            labels = label_episodes(store=store, seed=config.seed, augmentation=augmentation)
            own.append(labels)
            trained |= {str(number): dataset.labels[number] for number in labels.classes}
            used |= _called(dataset, labels.classes)
            counts["labels"] += len(store.cases)
        sources.append(_mixed(own, [1 - share, share]))
        if config.validation_episodes > 0 and part.classes:
            if part.validation_cases:
                usable = _labelled(part.validation_cases)
                known = SliceStore.build(dataset, part.validation_cases, stored) if usable else None
            else:
                known = store if on_labels else None
            if known is not None:
                labels = label_episodes(store=known, seed=_VALIDATION_SEED)
                validation.append(labels)
                used |= _called(dataset, labels.classes) if share == 0 else set()

    _check_used(config, used)
    names = ", ".join(trained.values())
    by_labels = f" and, in {counts['labels']}, from the labels of {names}" if trained else ""
    return TrainingData(
        training=_mixed(sources, [1] * len(sources)),  # each data set as often as any other
        validation=_mixed(validation, [1] * len(validation)) if validation else None,
        extra={
            "dataset": ", ".join(part.dataset.name for part in parts),
            "preprocessing": fitted,
            "classes": trained,
            "holdout": {
                str(label): part.dataset.labels[label] for part in parts for label in part.excluded
            },
            "training_cases": [case.id for part in parts for case in part.cases],
            "validation_cases": list(config.validation_cases),
        },
        slices=slices,
        summary=f"learning from {counts['supervoxels']} scans without labels (supervoxels)"
        f"{by_labels}",
    )


def _parts(config: TrainConfig) -> list[_Part]:
    """The data sets with their cases and classes, every name of the configuration used."""
    datasets = open_datasets(config.data, config.modality)
    parts = []
    for dataset in datasets:
        excluded = _known_labels(dataset, config.holdout)
        classes = _known_labels(dataset, config.classes)
        if not config.classes:
            classes = [number for number in dataset.labels if number not in excluded]
        both = sorted(set(classes) & set(excluded))
        require(not both, "holdout", found=f"base classes {both}", allowed="other classes")
        own = {case.id for case in dataset.cases}
        validation = dataset.select(id_ for id_ in config.validation_cases if id_ in own)
        away = {*config.holdout_cases, *(case.id for case in validation)}
        cases = [case for case in dataset.cases if case.id not in away]
        require(
            cases,
            dataset.root,
            found="no case left to train on",
            allowed="cases that are neither held out nor for validation",
            error=DatasetError,
        )
        parts.append(_Part(dataset, cases, validation, classes, excluded))
    ids = [case.id for dataset in datasets for case in dataset.cases]
    for name in ("holdout_cases", "validation_cases"):
        unknown = [id_ for id_ in getattr(config, name) if id_ not in ids]
        found = f"no case {', '.join(unknown)}"
        require(
            not unknown, ", ".join(config.data), found=found, allowed=str(ids), error=DatasetError
        )
    for label in (*config.holdout, *config.classes):
        if not any(_known_labels(dataset, [label]) for dataset in datasets):
            datasets[0].label_ids([label])  # raises, and says what there is
    return parts


def _known_labels(dataset: Dataset, labels: Sequence[str | int]) -> list[int]:
    """Numbers of those labels, names or numbers, that the data set has."""
    found = (find_label(label, dataset.labels) for label in labels)
    return [label for label in found if label is not None]


def _never_seen(part: _Part) -> list[int]:
    """Labels of slices to drop: the classes held out, and what is ignored, which may be one."""
    ignore = part.dataset.ignore
    return [*part.excluded, ignore] if part.excluded and ignore is not None else part.excluded


def _called(dataset: Dataset, labels: Sequence[int]) -> set[str]:
    """What labels may be called: their numbers and names, without regard to case."""
    return {*map(str, labels), *(dataset.labels[label].casefold() for label in labels)}


def _check_used(config: TrainConfig, used: Collection[str]) -> None:
    """Refuse classes asked for that no episode has."""
    unused = [label for label in map(str, config.classes) if label.casefold() not in used]
    require(
        not unused,
        "classes",
        found=f"{', '.join(unused)}, of which no training episode can be made",
        allowed=f"classes that cover {config.min_pixels} pixels (min_pixels) in slices enough: in "
        f"two patients, or in {config.shots + 1} slices of one; every case needs a label map, and "
        "label_fraction is above 0",
        fix="Leave them out, lower min_pixels, or choose other cases.",
        error=LabelError,
    )


def _labelled(cases: Sequence[Case]) -> bool:
    return all(case.label is not None for case in cases)


def _mixed(sources: Sequence[EpisodeSource], weights: Sequence[float]) -> EpisodeSource:
    return sources[0] if len(sources) == 1 else MixedEpisodes(sources, weights)
