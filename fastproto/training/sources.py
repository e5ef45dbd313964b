# SPDX-License-Identifier: Apache-2.0
"""From a configuration to the episodes of a run: which cases, which classes, which source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastproto.data.dataset import Case, Dataset, open_dataset
from fastproto.data.preprocessing import Preprocessing
from fastproto.data.volume import read_volume
from fastproto.errors import ArgumentError, DatasetError
from fastproto.training.augment import Augmentation
from fastproto.training.config import TrainConfig
from fastproto.training.episodes import (
    EpisodeSource,
    LabelEpisodes,
    MixedEpisodes,
    SuperpixelEpisodes,
)
from fastproto.training.slices import SliceStore

_VALIDATION_SEED = 20_010_911  # the same validation episodes for every training seed


@dataclass(frozen=True)
class TrainingData:
    """What a run is fed with.

    Attributes:
        training: Augmented episodes.
        validation: Fixed episodes without augmentation, or None without labels.
        extra: What the model file says about it, preprocessing included.
        slices: Numbers of the slices kept of each training case; the same in a resumed run.
    """

    training: EpisodeSource
    validation: EpisodeSource | None
    extra: dict[str, Any]
    slices: dict[str, list[int]]


def read_training_data(config: TrainConfig, device: torch.device) -> TrainingData:
    """Open the data set, fit the normalisation to the training cases and read their slices.

    Raises:
        ArgumentError: Classes both held out and to be trained on, or none left.
        DatasetError: Unknown cases, no case left, or no slices.
        InputError: Files that cannot be used.
    """
    dataset = open_dataset(config.data)
    excluded = dataset.label_ids(config.holdout)
    classes = dataset.label_ids(config.classes) or [i for i in dataset.labels if i not in excluded]
    both = sorted(set(classes) & set(excluded))
    if both:
        raise ArgumentError("holdout", found=f"base classes {both}", allowed="other classes")
    validation_cases = dataset.select(config.validation_cases)
    away = {case.id for case in [*dataset.select(config.holdout_cases), *validation_cases]}
    cases = [case for case in dataset.cases if case.id not in away]
    if not cases:
        raise DatasetError(
            dataset.root,
            found="no case left to train on",
            allowed="cases that are neither held out nor for validation",
        )
    preprocessing = Preprocessing.fit(
        (read_volume(case.image) for case in cases),
        dataset.modality,
        config.image_size,
        crop=config.crop,
        plane=config.plane,
    )
    on_labels = config.superpixel_fraction < 1
    without = excluded if config.drop_excluded_slices else []
    store = SliceStore.build(
        dataset,
        cases,
        preprocessing,
        on_labels,
        holding=classes if config.superpixel_fraction == 0 else None,
        without=without,
    )

    options: dict[str, Any] = {
        "shots": config.shots,
        "ways": config.ways,
        "queries": config.queries,
        "device": device,
    }
    label_options = {
        "excluded": excluded,
        "names": dataset.labels,
        "min_pixels": config.min_pixels,
        **options,
    }
    validation = None
    if config.validation_episodes > 0:
        validation_store = _validation_store(
            dataset, validation_cases, cases, store if on_labels else None, preprocessing, classes
        )
        if validation_store is not None:
            validation = LabelEpisodes(validation_store, classes, _VALIDATION_SEED, **label_options)

    augmentation = Augmentation() if config.augment else None
    training: EpisodeSource | None = None
    trained: list[int] = []
    if on_labels:
        training = LabelEpisodes(
            store, classes, config.seed, augmentation=augmentation, **label_options
        )
        trained = training.classes
    if config.superpixel_fraction > 0:
        pseudo = SuperpixelEpisodes(
            store,
            config.seed,
            source=config.superpixel_source,
            augmentation=augmentation,
            **options,
        )
        if training is None:
            training = pseudo
        else:
            training = MixedEpisodes(training, pseudo, config.superpixel_fraction)
    assert training is not None

    return TrainingData(
        training=training,
        validation=validation,
        extra={
            "dataset": dataset.name,
            "modality": dataset.modality,
            "preprocessing": preprocessing.to_dict(),
            "classes": {str(label): dataset.labels[label] for label in trained},
            "holdout": {str(label): dataset.labels[label] for label in excluded},
            "training_cases": [case.id for case in cases],
            "validation_cases": list(config.validation_cases),
        },
        slices={case.id: case.numbers for case in store.cases},
    )


def _validation_store(
    dataset: Dataset,
    validation_cases: Sequence[Case],
    training_cases: Sequence[Case],
    training_store: SliceStore | None,
    preprocessing: Preprocessing,
    classes: Sequence[int],
) -> SliceStore | None:
    """Slices of the validation cases, else of the training cases; None where labels are missing."""
    if not validation_cases and training_store is not None:
        return training_store
    cases = validation_cases or training_cases
    if not classes or any(case.label is None for case in cases):
        return None
    return SliceStore.build(dataset, cases, preprocessing, holding=classes)
