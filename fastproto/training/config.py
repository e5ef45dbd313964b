# SPDX-License-Identifier: Apache-2.0
"""Every knob of a training run, in one dataclass that goes to JSON and back."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from fastproto.errors import ArgumentError

_CHOICES = {
    "encoder": ("auto", "resnet18", "resnet34", "resnet50", "resnet101"),
    "output_stride": (8, 16),
    "plane": ("axial", "coronal", "sagittal"),
    "precision": ("auto", "float32", "bfloat16"),
    "recompute": ("auto", "on", "off"),
}
_AT_LEAST_ONE = (
    *("ways", "shots", "queries", "batch", "min_pixels"),
    *("steps", "checkpoint_every", "validate_every", "store_size"),
)
_FROM_ZERO = ("seed", "validation_episodes")
_NOT_NEGATIVE = ("weight_decay", "ce", "align", "cycle", "final_learning_rate", "gap")
_ABOVE_ZERO = ("learning_rate", "clip_norm", "temperature", "background_weight")
_FRACTION = (
    "label_fraction",
    "absent_fraction",
    "same_slice_fraction",
    "mask_threshold",
    "warmup_fraction",
)
_SWITCHES = (
    *("drop_excluded_slices", "augment", "crop", "append_global", "progress", "tensorboard"),
    *("all_planes", "cuda_graph"),
)
_LISTS: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("data", (str,), "folders"),
    ("holdout", (str, int), "class names or label numbers"),
    ("classes", (str, int), "class names or label numbers"),
    ("holdout_cases", (str,), "case ids"),
    ("validation_cases", (str,), "case ids"),
)

# What the network is; a model to go on from decides on it.
NETWORK = (
    *("encoder", "output_stride", "image_size", "plane"),
    *("temperature", "mask_threshold", "append_global"),
)
# What "auto" is on a GPU and on a CPU.
AUTO: dict[str, tuple[Any, Any]] = {
    "encoder": ("resnet34", "resnet18"),
    "image_size": (256, 128),
}
# What may differ between a run and its continuation: none of it changes a computed number.
_FREE_ON_RESUME = (
    *("data", "output", "checkpoint_every", "progress", "tensorboard"),
    *("workers", "recompute", "cuda_graph"),
)


@dataclass(frozen=True)
class TrainConfig:
    """What to train on, what to train, and how long.

    Args:
        data: Folders of scans: data sets (``dataset.json`` inside) or plain folders; CT and MR may
            be mixed.
        output: Run folder; gets ``model.safetensors``, ``state.safetensors``, ``log.jsonl`` and
            ``config.json``.
        holdout: Classes (names or label numbers) that must never be a foreground: the ones to be
            segmented later without having been trained.
        classes: Base classes (names or label numbers) to train on; empty = all not held out.
        drop_excluded_slices: "Setting 2": drop every slice with a held-out class, so that it is not
            even seen as background. Off ("setting 1"), it is part of the background.
        holdout_cases: Case ids that training never reads.
        validation_cases: Case ids for the validation Dice; not trained on. Empty = the validation
            episodes come from the training cases.
        label_fraction: Probability that an episode of a data set with labels is made of its base
            classes instead of supervoxels, 0 to 1; 0 never looks at a label.
        absent_fraction: Share of the supervoxel episodes whose query comes from anywhere in the
            scan, mostly without the class.
        same_slice_fraction: Share of the other supervoxel episodes whose query is the support
            slice, under random changes of its own.
        gap: Largest distance of support and query of a supervoxel in mm; two slices are allowed
            at any distance.
        all_planes: Draw slices of the other two planes too, from scans whose voxels allow it.
        ways: Foreground classes in an episode.
        shots: Support slices of each class.
        queries: Query slices in an episode.
        batch: Episodes in a step.
        min_pixels: Pixels of the prepared slice that a class must cover for the slice to count.
        augment: Random affine, elastic and gamma changes of the training slices.
        image_size: Side of the network's images in pixels; "auto" is 256 on a GPU, 128 on a CPU.
        store_size: Largest side of the slices that fields of view are cut from, in pixels.
        plane: Slicing plane.
        crop: Crop to the body's bounding box before resampling.
        encoder: Encoder name; "auto" is resnet34 on a GPU, resnet18 on a CPU.
        output_stride: Pixels of a cell at the bottleneck, 8 or 16; small organs need small cells.
        weights: Encoder weights to start from: None, "imagenet" or a file.
        start: A trained model to go on from, a file, a run folder or "base", the package's own; it
            decides on encoder, output stride, image size, plane and how CT is normalised.
        temperature: Softmax temperature over prototypes, no unit.
        mask_threshold: Share of a bottleneck cell that a class must cover to give a prototype,
            0 to 1.
        append_global: Add each class's mean feature to its prototypes.
        steps: Optimiser steps at most.
        minutes: End after so many minutes of training, the schedule with them; None for ``steps``
            alone. Such a run depends on the machine's speed.
        learning_rate: Peak learning rate of Adam.
        final_learning_rate: Learning rate at the last step, as a share of the peak.
        warmup_fraction: Share of the steps in which the rate rises linearly; then it falls along
            half a cosine.
        weight_decay: Decoupled weight decay of Adam, per unit of learning rate.
        clip_norm: Largest 2-norm of all gradients together.
        ce: Weight of the cross-entropy.
        align: Weight of the alignment loss.
        cycle: Weight of the cyclic consistency loss.
        background_weight: Class weight of the background in the losses; foregrounds have 1.
        precision: "float32", "bfloat16" (autocast; weights and Adam stay float32) or "auto":
            bfloat16 where the hardware computes in it, float32 elsewhere.
        recompute: Whether the backward pass computes the decoder's largest maps again, which takes
            somewhat longer, instead of keeping them: "on", "off" or "auto", where they take more
            than a sixteenth of the device's memory.
        cuda_graph: On a GPU capture a whole step as one CUDA graph, so that it need not wait for
            the host.
        device: "auto" (CUDA if there is a GPU), "cpu", "cuda", "cuda:1", ...
        workers: Processes that prepare the next steps' episodes meanwhile; "auto" is one for each
            core, 8 at most, on a GPU, and none on a CPU, which has no time to spare.
        seed: Seed of initial weights and episodes. Episode i is a pure function of (seed, i).
        checkpoint_every: Steps between checkpoints; the last step always makes one.
        validate_every: Steps between validations; the last step always makes one.
        validation_episodes: Episodes in a validation; 0 = none.
        progress: Show a progress bar on stderr.
        tensorboard: Write TensorBoard events beside the JSONL log (extra ``tensorboard``).

    Raises:
        ArgumentError: A value out of its range, named.
    """

    data: tuple[str, ...]
    output: str
    holdout: tuple[str | int, ...] = ()
    classes: tuple[str | int, ...] = ()
    drop_excluded_slices: bool = False
    holdout_cases: tuple[str, ...] = ()
    validation_cases: tuple[str, ...] = ()
    label_fraction: float = 0.5
    absent_fraction: float = 0.25
    same_slice_fraction: float = 0.5
    gap: float = 10.0
    all_planes: bool = True
    ways: int = 1
    shots: int = 1
    queries: int = 1
    batch: int = 8
    min_pixels: int = 30
    augment: bool = True
    image_size: int | Literal["auto"] = "auto"
    store_size: int = 256
    plane: Literal["axial", "coronal", "sagittal"] = "axial"
    crop: bool = True
    encoder: str = "auto"
    output_stride: Literal[8, 16] = 8
    weights: str | None = None
    start: str | None = None
    temperature: float = 0.05
    mask_threshold: float = 0.5
    append_global: bool = False
    steps: int = 5_000
    minutes: float | None = None
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.01
    warmup_fraction: float = 0.02
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    ce: float = 1.0
    align: float = 0.0
    cycle: float = 0.0
    background_weight: float = 0.2
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    recompute: Literal["auto", "on", "off"] = "auto"
    cuda_graph: bool = True
    device: str = "auto"
    workers: int | Literal["auto"] = "auto"
    seed: int = 0
    checkpoint_every: int = 500
    validate_every: int = 500
    validation_episodes: int = 16
    progress: bool = True
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.data, (str, os.PathLike)):
            object.__setattr__(self, "data", (os.fspath(self.data),))
        for name in ("output", "weights", "start"):  # a Path goes in, JSON takes only text
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
        for name, types, words in _LISTS:
            value = getattr(self, name)
            listed = isinstance(value, Collection) and not isinstance(value, (str, bytes))
            valid = listed and all(
                isinstance(entry, types) and not isinstance(entry, bool) for entry in value
            )
            _check(name, valid, self, f"a list of {words}")
            object.__setattr__(self, name, tuple(value))
        for name in _SWITCHES:
            _check(name, isinstance(getattr(self, name), bool), self, "true or false")
        for name, choices in _CHOICES.items():
            allowed = ", ".join(map(str, choices))
            _check(name, getattr(self, name) in choices, self, f"one of {allowed}")
        for name in _AT_LEAST_ONE:
            _check(name, _is_integer(getattr(self, name), 1), self, "an integer of at least 1")
        for name in _NOT_NEGATIVE:
            _check(name, _is_number(getattr(self, name), 0), self, "a finite number of at least 0")
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            _check(name, _is_number(value, 0) and value > 0, self, "a finite number above 0")
        for name in _FRACTION:
            value = getattr(self, name)
            _check(name, _is_number(value, 0) and value <= 1, self, "a number from 0 to 1")
        _check("mask_threshold", self.mask_threshold < 1, self, "a number from 0 to below 1")
        for name in _FROM_ZERO:
            _check(name, _is_integer(getattr(self, name), 0), self, "an integer of at least 0")
        _check("ce", self.ce + self.align + self.cycle > 0, self, "a loss weight above 0 somewhere")
        size = self.image_size == "auto" or _is_integer(self.image_size, 1)
        _check("image_size", size, self, '"auto" or an integer of at least 1')
        workers = self.workers == "auto" or _is_integer(self.workers, 0)
        _check("workers", workers, self, '"auto" or an integer of at least 0')
        time = self.minutes is None or (_is_number(self.minutes, 0) and self.minutes > 0)
        _check("minutes", time, self, "None or a number above 0")
        _check("data", bool(self.data), self, "at least one folder")
        shared = sorted(set(self.holdout_cases) & set(self.validation_cases))
        _check("validation_cases", not shared, self, f"cases outside holdout_cases (not {shared})")

    def to_dict(self) -> dict[str, Any]:
        """All values, in a form that JSON keeps."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The reverse of ``to_dict``; absent values get their defaults.

        Raises:
            ArgumentError: An unknown name, or a value out of its range.
        """
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                raise ArgumentError(
                    name, found="an unknown option", allowed=", ".join(sorted(known))
                )
        for name in ("data", "output"):
            if name not in values:
                raise ArgumentError(name, found="nothing", allowed="a path")
        return cls(**values)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainConfig:
        """Read a ``config.json``.

        Raises:
            ArgumentError: The file cannot be read as a configuration.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArgumentError(
                path, found=f"no readable JSON ({error})", allowed="a config.json of a run"
            ) from error
        if not isinstance(values, dict):
            raise ArgumentError(path, found=type(values).__name__, allowed="a JSON object")
        return cls.from_dict(values)

    def resolved(self, *, gpu: bool) -> TrainConfig:
        """With every "auto" of the network's size replaced by what suits the device."""
        choice: dict[str, Any] = {
            name: on_gpu if gpu else on_cpu
            for name, (on_gpu, on_cpu) in AUTO.items()
            if getattr(self, name) == "auto"
        }
        return replace(self, **choice)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What makes this another run than ``other``, a ``to_dict``: "name: old -> new"."""
        free = {*_FREE_ON_RESUME, *(NETWORK if self.start is not None else ())}
        return [
            f"{name}: {other.get(name)!r} -> {value!r}"
            for name, value in self.to_dict().items()
            if name not in free and other.get(name) != value
        ]


def _check(name: str, valid: bool, config: TrainConfig, allowed: str) -> None:
    if not valid:
        raise ArgumentError(name, found=repr(getattr(config, name)), allowed=allowed)


def _is_number(value: object, low: float) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= low


def _is_integer(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
