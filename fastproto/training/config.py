# SPDX-License-Identifier: Apache-2.0
"""Every knob of a training run, in one dataclass that goes to JSON and back.

A new option is one new field of `TrainConfig`: its metadata, an `Option`, says all else about it.
"""

# ruff: noqa: RUF009 - `_option` is a `field`
from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from fastproto import defaults
from fastproto.errors import ArgumentError, require

T = TypeVar("T")


class Allowed(NamedTuple):
    """The values an option takes."""

    words: str | Callable[[], str]  # of errors
    holds: Callable[[Any], bool]
    argument: Mapping[str, Any] = MappingProxyType({})  # how argparse reads them
    keep: Callable[[Any], Any] | None = None  # makes of a value what the field holds


@dataclass(frozen=True)
class Option:
    """The metadata of a field of `TrainConfig`, by these names."""

    allowed: Allowed
    flag: str = ""  # on the command line, with its metavar; without one, --set reaches the field
    help: str = field(kw_only=True)
    group: Literal["data", "training"] = "training"
    argument: Mapping[str, Any] = field(default_factory=dict)  # for argparse; overrules `allowed`
    auto: tuple[Any, ...] = ()  # what "auto" is on a GPU and on a CPU
    network: bool = False  # it says what the network is; a model to go on from decides on it
    loss: bool = False  # a weight of a loss: one of them must be above 0
    free: bool = False  # it may change when a run is continued: no computed number depends on it


def _option(default: T, *about: Any, **more: Any) -> T:
    """A field with a default; the rest is for `Option`."""
    return field(default=default, metadata=vars(Option(*about, **more)))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _one_of(literal: Any) -> Allowed:
    choices = get_args(literal)
    words = f"one of {', '.join(map(str, choices))}"
    return Allowed(words, lambda x: x in choices, {"choices": choices})


def _list_of(words: str, *types: type, read: Callable[[str], str | int] = str) -> Allowed:
    def holds(value: Any) -> bool:
        listed = isinstance(value, Collection) and not isinstance(value, (str, bytes))
        return listed and all(isinstance(x, types) and not isinstance(x, bool) for x in value)

    argument = {"nargs": "+", "action": "extend", "type": read}
    return Allowed(f"a list of {words}", holds, argument, tuple)


def _class(text: str) -> str | int:  # given by its label value or its name
    return int(text) if text.isdigit() else text


def _text(value: Any) -> Any:  # JSON takes no path
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _encoders() -> tuple[str, ...]:
    from fastproto.nn.encoders import ENCODERS  # imports torch

    return ("auto", *ENCODERS)


_INT, _FLOAT = {"type": int}, {"type": float}
_COUNT = Allowed("an integer of at least 1", lambda x: _is_integer(x) and x >= 1, _INT)
_FROM_ZERO = Allowed("an integer of at least 0", lambda x: _is_integer(x) and x >= 0, _INT)
_SIZE = Allowed(f'"auto" or {_COUNT.words}', lambda x: x == "auto" or _COUNT.holds(x), _INT)
_WORKERS = Allowed(f'"auto" or {_FROM_ZERO.words}', lambda x: x == "auto" or _FROM_ZERO.holds(x))
_NOT_NEGATIVE = Allowed("a finite number of at least 0", lambda x: _is_real(x) and x >= 0, _FLOAT)
_ABOVE_ZERO = Allowed("a finite number above 0", lambda x: _is_real(x) and x > 0, _FLOAT)
_TIME = Allowed("None or a number above 0", lambda x: x is None or _ABOVE_ZERO.holds(x), _FLOAT)
_SHARE = Allowed("a number from 0 to 1", lambda x: _is_real(x) and 0 <= x <= 1, _FLOAT)
_SWITCH = Allowed("true or false", lambda x: isinstance(x, bool), {"action": "store_true"})
_ENCODER = Allowed(
    lambda: f"one of {', '.join(_encoders())}", lambda x: x == "auto" or x in _encoders()
)
_TEXT = Allowed("text or a path", lambda x: True, keep=_text)
_CLASSES = _list_of("class names or label numbers", str, int, read=_class)
_CASES = _list_of("case ids", str)
_MODALITY = Allowed(
    "None, ct or mr",
    lambda x: x in (None, "ct", "mr"),
    {"choices": ("ct", "mr"), "type": str.lower},
)
Plane = Literal["axial", "coronal", "sagittal"]
Stride = Literal[8, 16]
Precision = Literal["auto", "float32", "bfloat16"]
Recompute = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class TrainConfig:
    """What to train on, what to train, and how long; ArgumentError names a wrong value."""

    # fmt: off
    data: tuple[str, ...] = field(metadata=vars(Option(
        _list_of("folders", str), "--data DIR", group="data", free=True,
        help="folders of scans or data sets (dataset.json with images, labels or not), CT and MR")))
    output: str = field(metadata=vars(Option(
        _TEXT, "--out RUN", argument={"required": True}, free=True,
        help="run folder for model.safetensors, state.safetensors, log.jsonl and config.json")))
    modality: Literal["ct", "mr"] | None = _option(None, _MODALITY, "--modality", group="data",
        help="modality of the data sets whose dataset.json does not say (it may name a "
        "normalisation, such as zscore) and of plain folders")
    holdout: tuple[str | int, ...] = _option((), _CLASSES, "--holdout-classes ORGAN", group="data",
        help="classes (names or label values) never trained as foreground, to be segmented later")
    classes: tuple[str | int, ...] = _option((), _CLASSES, "--classes ORGAN", group="data",
        help="classes (names or label values) to train on (default: all that are not held out)")
    drop_excluded_slices: bool = _option(False, _SWITCH,
        help="drop slices with a held-out class (setting 2); else it is background (setting 1)")
    holdout_cases: tuple[str, ...] = _option((), _CASES, "--holdout-cases CASE", group="data",
        help="case ids that training never reads")
    validation_cases: tuple[str, ...] = _option((), _CASES, "--validation-cases CASE", group="data",
        help="case ids for the validation Dice, not trained on (default: the training cases)")
    label_fraction: float = _option(0.5, _SHARE, "--label-fraction SHARE", group="data",
        help="share of the episodes drawn from labels, where there are some; 0 never looks at one")
    absent_fraction: float = _option(0.25, _SHARE,
        help="share of the supervoxel episodes whose query is any slice, mostly without the class")
    same_slice_fraction: float = _option(0.5, _SHARE,
        help="share of the others whose query is the support slice, with random changes of its own")
    gap: float = _option(10.0, _NOT_NEGATIVE,
        help="mm from support to query of a supervoxel at most; two slices are never too far")
    all_planes: bool = _option(True, _SWITCH,
        help="draw slices of the other two planes too, from scans whose voxels allow it")
    ways: int = _option(1, _COUNT, help="foreground classes in an episode")
    shots: int = _option(1, _COUNT, "--shots N", help="support slices of each class")
    queries: int = _option(1, _COUNT, help="query slices in an episode")
    batch: int = _option(8, _COUNT, "--batch N",
        help="episodes in a step, of each process that torchrun starts")
    min_pixels: int = _option(30, _COUNT,
        help="pixels of the prepared slice that a class must cover for the slice to count")
    augment: bool = _option(True, _SWITCH,
        help="random affine, elastic and gamma changes of the training slices")
    image_size: int | Literal["auto"] = _option("auto", _SIZE, "--image-size PIXELS", group="data",
        auto=(256, 128), network=True, help="side of the network's images in pixels")
    store_size: int = _option(256, _COUNT,
        help="largest side of the slices that fields of view are cut from, in pixels")
    plane: Plane = _option(defaults.PLANE, _one_of(Plane), "--plane", group="data", network=True,
        help="slices to learn from; with axial ones, those of the other planes as well")
    crop: bool = _option(True, _SWITCH, help="crop to the body's bounding box before resampling")
    encoder: str = _option("auto", _ENCODER, "--encoder NAME",
        auto=(defaults.ENCODER, "resnet18"), network=True,
        help="a name such as resnet34, or auto; an unknown name lists them all")
    output_stride: Stride = _option(8, _one_of(Stride), network=True,
        help="pixels of a cell at the bottleneck; small organs need small cells")
    weights: str | None = _option(None, _TEXT, "--weights FILE",
        help="encoder weights to start from: a safetensors or torchvision file, or imagenet to "
        "download them (default: from scratch)")
    start: str | None = _option(None, _TEXT, "--model RUN",
        help="model to go on from, which decides on the network, image size, plane and how CT is "
        "normalised: base, a run folder or a model.safetensors (default: from scratch)")
    temperature: float = _option(defaults.TEMPERATURE, _ABOVE_ZERO, network=True,
        help="softmax temperature over prototypes, no unit")
    mask_threshold: float = _option(defaults.MASK_THRESHOLD, _SHARE, network=True,
        help="share of a bottleneck cell, below 1, that a class must cover to give a prototype")
    append_global: bool = _option(False, _SWITCH, network=True,
        help="add each class's mean feature to its prototypes")
    steps: int = _option(5_000, _COUNT, "--steps N", help="optimiser steps at most")
    minutes: float | None = _option(None, _TIME, "--minutes M",
        help="end after so many minutes of training, the schedule with them; the command then "
        "counts steps only if told how many. Such a run depends on the machine's speed")
    learning_rate: float = _option(1e-3, _ABOVE_ZERO, "--learning-rate RATE",
        help="peak learning rate of Adam")
    final_learning_rate: float = _option(0.01, _NOT_NEGATIVE,
        help="learning rate at the last step, as a share of the peak")
    warmup_fraction: float = _option(0.02, _SHARE,
        help="share of the steps with a linear rise of the rate; then it falls along half a cosine")
    weight_decay: float = _option(1e-4, _NOT_NEGATIVE,
        help="decoupled weight decay of Adam, per unit of learning rate")
    clip_norm: float = _option(1.0, _ABOVE_ZERO, help="largest 2-norm of all gradients together")
    ce: float = _option(1.0, _NOT_NEGATIVE, loss=True, help="weight of the cross-entropy")
    align: float = _option(0.0, _NOT_NEGATIVE, loss=True, help="weight of the alignment loss")
    cycle: float = _option(0.0, _NOT_NEGATIVE, loss=True, help="weight of the cyclic consistency")
    background_weight: float = _option(0.2, _ABOVE_ZERO,
        help="class weight of the background in the losses; foregrounds have 1")
    precision: Precision = _option("auto", _one_of(Precision),
        help="float32, bfloat16 (autocast; weights and Adam stay float32) or auto: bfloat16 where "
        "the hardware computes in it, float32 elsewhere")
    recompute: Recompute = _option("auto", _one_of(Recompute), free=True,
        help="compute the decoder's largest maps again in the backward pass, somewhat slower, "
        "instead of keeping them: on, off or auto, where they exceed 1/16 of the device's memory")
    cuda_graph: bool = _option(True, _SWITCH, free=True,
        help="on a GPU capture a whole step as one CUDA graph, which does not wait for the host; "
        "not where several processes train together")
    sync_batch_norm: bool = _option(False, _SWITCH,
        help="where several processes train together (torchrun), normalise over the batches of "
        "all; else each over its own")
    device: str = _option("auto", _TEXT, help="auto (the GPU if there is one), cpu, cuda:1, ...")
    workers: int | Literal["auto"] = _option("auto", _WORKERS, free=True,
        help="processes that prepare the next steps' episodes meanwhile; auto: one for each core, "
        "8 at most, on a GPU, and none on a CPU, which has no time to spare")
    seed: int = _option(0, _FROM_ZERO, "--seed N",
        help="seed of initial weights and episodes; episode i is a pure function of (seed, i)")
    checkpoint_every: int = _option(500, _COUNT, free=True,
        help="steps between checkpoints; the last step always makes one")
    validate_every: int = _option(500, _COUNT,
        help="steps between validations; the last step always makes one")
    validation_episodes: int = _option(16, _FROM_ZERO, help="episodes in a validation; 0: none")
    progress: bool = _option(True, _SWITCH, free=True, help="show a progress bar on stderr")
    tensorboard: bool = _option(False, _SWITCH, "--tensorboard", free=True,
        help="also log for TensorBoard, if it is installed")
    # fmt: on

    def __post_init__(self) -> None:
        if isinstance(self.data, (str, os.PathLike)):
            object.__setattr__(self, "data", (os.fspath(self.data),))
        for option in fields(self):
            allowed, value = option.metadata["allowed"], getattr(self, option.name)
            self._check(option.name, allowed.holds(value), allowed.words)
            if allowed.keep:
                object.__setattr__(self, option.name, allowed.keep(value))
        self._check("mask_threshold", self.mask_threshold < 1, "a number from 0 to below 1")
        losses = [getattr(self, option.name) for option in fields(self) if option.metadata["loss"]]
        self._check("ce", any(losses), "a loss weight above 0 somewhere")
        self._check("data", bool(self.data), "at least one folder")
        shared = sorted(set(self.holdout_cases) & set(self.validation_cases))
        self._check("validation_cases", not shared, f"cases outside holdout_cases (not {shared})")

    def _check(self, name: str, valid: bool, allowed: str | Callable[[], str]) -> None:
        if not valid:
            allowed = allowed if isinstance(allowed, str) else allowed()
            raise ArgumentError(name, found=repr(getattr(self, name)), allowed=allowed)

    def to_dict(self) -> dict[str, Any]:
        """All values, in a form that JSON keeps."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The reverse of ``to_dict``, with defaults; ArgumentError names a wrong name or value."""
        names = sorted(option.name for option in fields(cls))
        for name in values:
            require(name in names, name, found="an unknown option", allowed=", ".join(names))
        for name in ("data", "output"):
            require(name in values, name, found="nothing", allowed="a path")
        return cls(**values)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainConfig:
        """Read a ``config.json``; ArgumentError names one that is no configuration."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            found = f"no readable JSON ({error})"
            raise ArgumentError(path, found=found, allowed="a config.json of a run") from error
        found = type(values).__name__
        require(isinstance(values, dict), path, found=found, allowed="a JSON object")
        return cls.from_dict(values)

    def resolved(self, *, gpu: bool) -> TrainConfig:
        """With every "auto" of the network's size replaced by what suits the device."""
        chosen = {
            option.name: option.metadata["auto"][0 if gpu else 1]
            for option in fields(self)
            if option.metadata["auto"] and getattr(self, option.name) == "auto"
        }
        return replace(self, **chosen)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What makes this another run than ``other``, a ``to_dict``: "name: old -> new".

        A longer run is none, nor is an option that ``other`` did not have yet and is not used.
        """
        free = {option.name for option in fields(self) if option.metadata["free"]}
        free |= set(NETWORK if self.start is not None else ())
        other = {**replace(self, **_defaults()).to_dict(), **other}
        return [
            f"{name}: {other.get(name)!r} -> {value!r}"
            for name, value in self.to_dict().items()
            if name not in free and other.get(name) != value
            if not (name in LENGTH and other.get(name) and value and value > other[name])
        ]


def _defaults() -> dict[str, Any]:
    return {each.name: each.default for each in fields(TrainConfig) if each.default is not MISSING}


def describe(option: Field[Any]) -> str:
    """The help of a field of `TrainConfig`, with its default where there is more than nothing."""
    text: str = option.metadata["help"]
    if option.metadata["auto"]:
        text += "; auto: {} on a GPU, {} on a CPU".format(*option.metadata["auto"])
    default = option.default
    shown = isinstance(default, (str, int, float)) and default is not False
    return f"{text} (default: {default})" if shown else text


LENGTH = ("steps", "minutes")  # what a run that goes on may have more of
# What a model to go on from decides on.
NETWORK = tuple(option.name for option in fields(TrainConfig) if option.metadata["network"])
_HELP = (f"    {option.name}: {describe(option)}" for option in fields(TrainConfig))
TrainConfig.__doc__ = "\n".join([f"{TrainConfig.__doc__}\n\nArgs:", *_HELP])
