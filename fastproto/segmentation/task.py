# SPDX-License-Identifier: Apache-2.0
"""A segmentation task: what one annotated scan taught a model, small enough to keep and share.

A task holds, for every organ, its prototypes and those of what surrounds it, the organs' values and
names, where they lay in the annotated scan, the preprocessing, the weights that adaptation changed
and the fingerprint of the model all this belongs to. It holds no path and nothing about the
patient, but with a prior by registration a picture of the scan at low resolution.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastproto.data.label_table import MAX_LABEL
from fastproto.data.preprocessing import Preprocessing
from fastproto.data.volume import volume_suffix
from fastproto.errors import CheckpointError, InputError, require
from fastproto.nn import FewShotUNet, Prototypes
from fastproto.nn.base import FewShotModel
from fastproto.nn.weights import HEADER, read_safetensors, write_safetensors
from fastproto.segmentation.prior import Atlas

BASE = "base"  # what the package's own model is called
BASE_FILE = Path(__file__).resolve().parents[1] / "models" / "base.safetensors"
FORMAT = "fastproto-task-2"
Model = TypeVar("Model", bound=FewShotModel)


@dataclass(frozen=True)
class Organ:
    """One organ of a task, seen in a field of view of its own.

    Args:
        value, name: Of its label.
        side: Side of the field of view in mm.
        slices: Numbers of the annotated scan's slices that prototypes are from, ascending.
        prototypes: An episode per slice, of two classes: what is not the organ, and the organ.
        bias: Added to the organ's log odds.
        expected_dice: Dice in slices of the annotated scan that were left out; None without any.
    """

    value: int
    name: str
    side: float
    slices: tuple[int, ...]
    prototypes: Prototypes
    bias: float = 0.0
    expected_dice: float | None = None


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        organs: What to find.
        preprocessing: How the annotated scan was made into slices, and every scan will be.
        atlas: Where the organs lay in the annotated scan.
        fingerprint: `FewShotUNet.fingerprint` of the model the task was made with.
        weights: The model's weights that were adapted to the annotated scan, in half precision.
        adapted_steps: Training steps behind them; 0 where there are none.
    """

    organs: tuple[Organ, ...]
    preprocessing: Preprocessing
    atlas: Atlas
    fingerprint: str
    weights: dict[str, Tensor] = field(default_factory=dict)
    adapted_steps: int = 0
    _ready: dict[Any, FewShotModel] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ready": {}}  # neither copied nor sent to other processes

    @property
    def millilitres(self) -> dict[int, float]:
        """Label value -> volume of the organ in the annotated scan, about."""
        sizes = [shape.millilitres for shape in self.atlas.maps]
        return dict(zip(self.atlas.values, sizes, strict=True))

    @property
    def labels(self) -> dict[int, str]:
        """Label value -> name, in the order of the organs."""
        return {organ.value: organ.name for organ in self.organs}

    def check_model(
        self, model: FewShotModel, *, name: str | Path = "task", fingerprint: str | None = None
    ) -> None:
        """Raise unless ``model`` is the one this task was registered with.

        The error calls the task ``name``, e.g. its file. ``fingerprint`` is the model's, if known:
        it takes a while.

        Raises:
            CheckpointError: The model's configuration or weights differ.
        """
        own, other = self.fingerprint, fingerprint or model.fingerprint()
        found = f"prototypes of another model (fingerprint {own[:12]})"
        allowed = f"a task registered with this model (fingerprint {other[:12]})"
        fix = "Register the annotated scan again with this model, or use the other model."
        require(own == other, name, found=found, allowed=allowed, fix=fix, error=CheckpointError)

    def adapted(self, model: Model) -> Model:
        """``model`` with the weights that were adapted; itself where there are none."""
        if not self.weights:
            return model
        model = copy.deepcopy(model)
        model.load_state_dict(model.state_dict() | self.weights)
        return model

    def ready(self, model: FewShotModel) -> FewShotModel:
        """The network that segments with this task: adapted and `for_inference`; kept."""
        weights = tuple((name, id(t), t._version) for name, t in self.weights.items())
        key = next(model.parameters()).device, model.backend, weights
        ready = self._ready.get(key)
        if ready is None:
            self._ready.clear()  # one at a time: it may take a GPU's memory
            ready = self._ready[key] = self.adapted(model).for_inference()
        return ready

    def save(self, path: str | Path) -> None:
        """Write the task as one safetensors file with JSON metadata, atomically.

        Raises:
            OutputError: ``path`` cannot be written.
        """
        places, atlas = self.atlas.to_parts()
        tensors = {f"weights.{name}": value for name, value in self.weights.items()}
        tensors |= {f"atlas.{name}": value for name, value in places.items()}
        organs = [dict(vars(organ)) for organ in self.organs]
        for index, fields in enumerate(organs):
            prototypes = fields.pop("prototypes").trim()
            tensors[f"protos.{index}"] = prototypes.protos.half()
            tensors[f"offsets.{index}"] = prototypes.offsets
        header = {
            "kind": FORMAT,
            "organs": organs,
            "preprocessing": self.preprocessing.to_dict(),
            "atlas": atlas,
            "fingerprint": self.fingerprint,
            "adapted_steps": self.adapted_steps,
        }
        write_safetensors(Path(path), tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Task:
        """Read a task written by `save`.

        Raises:
            CheckpointError: The file is damaged or not a task.
        """
        path = Path(path)
        found = what_is(path)
        allowed = "a task file of `fastproto learn`"
        fix = _FIXES.get(found, "Make one with `fastproto learn`.")
        require(found == _TASK, path, found=found, allowed=allowed, fix=fix, error=CheckpointError)
        tensors, header = read_safetensors(path)
        try:
            organs = tuple(
                _organ(fields, tensors[f"protos.{index}"], tensors[f"offsets.{index}"])
                for index, fields in enumerate(header["organs"])
            )
            preprocessing = Preprocessing.from_dict(header["preprocessing"])
            atlas = Atlas.from_parts(_below("atlas.", tensors), header["atlas"])
            fingerprint, steps = str(header["fingerprint"]), int(header["adapted_steps"])
            weights = _below("weights.", tensors)
            task = cls(organs, preprocessing, atlas, fingerprint, weights, steps)
            if not organs or atlas.values != tuple(task.labels):
                raise ValueError(f"an atlas of {atlas.values} for organs {[*task.labels]}")
        except (KeyError, TypeError, ValueError) as error:
            found, fix = f"unusable contents ({error})", "Make it again with `fastproto learn`."
            allowed = "an intact task file"
            raise CheckpointError(path, found=found, allowed=allowed, fix=fix) from error
        return task


def _organ(fields: Mapping[str, Any], protos: Tensor, offsets: Tensor) -> Organ:
    """One organ from a task file; whatever does not fit raises."""
    fields = {**fields, "slices": tuple(map(int, fields["slices"]))}
    organ = Organ(prototypes=Prototypes(protos.float(), offsets, 2), **fields)
    bounds = offsets.tolist()
    fits = bounds[0] == 0 and sorted(bounds) == bounds and bounds[-1] == len(protos)
    if not fits or organ.prototypes.episodes != len(organ.slices):
        raise ValueError(f"offsets {bounds[:3]}.. for {len(organ.slices)} slices")
    if not (0 < organ.value <= MAX_LABEL and organ.side > 0 and np.isfinite(organ.bias)):
        raise ValueError(f"label {organ.value}, side {organ.side}, bias {organ.bias}")
    return organ


_MODEL, _TASK, _RUN = "a model", "a task file", "the folder of a training"
_IMAGE = "an image or label map"
_KINDS = {"model": _MODEL, FORMAT: _TASK, "training state": "the state of a training"}
_PICKLE = "a pickle or a checkpoint of PyTorch, which is never loaded"
_OTHERS = {  # by what they begin with
    b"version https://git-lfs": "a Git LFS pointer, which stands in for a file not downloaded",
    b"PK\3\4": _PICKLE,
    b"\x80": _PICKLE,
}
_FIXES = {  # where something else was meant
    _MODEL: "Give it as --model; `fastproto learn` makes a task with it.",
    _RUN: "Give it as --model; `fastproto learn` makes a task with it.",
    _TASK: "Give it as --task, and as --model the model that it was made with.",
    _IMAGE: "An annotated scan is given by --example SCAN MASK, a scan to segment by -i.",
}


def what_is(path: Path) -> str:
    """What a file or folder is, in the words of who gave it for a model or a task."""
    if path.is_dir():
        runs = any((path / name).is_file() for name in ("model.safetensors", "config.json"))
        return _RUN if runs else "a folder"
    if not path.is_file():
        return "no such file"
    if volume_suffix(path):
        return _IMAGE
    try:
        with path.open("rb") as file:
            head = file.read(64)
        if not head:
            return "an empty file"
        if head[8:9] != b"{":  # safetensors begins with the length of its JSON
            for start, what in _OTHERS.items():
                if head.startswith(start):
                    return what
            return "a file that fastproto did not write"
        with safe_open(path, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
        if HEADER not in metadata:
            return "a safetensors file of another program"
        kind = json.loads(metadata[HEADER]).get("kind")
        former = f"a task file of another version ({kind})" if str(kind)[:-1] == FORMAT[:-1] else ""
        return _KINDS.get(kind, former or f"a file of kind {kind!r}")
    except (SafetensorError, ValueError, AttributeError):
        return "a truncated or damaged file"
    except OSError as error:
        return f"a file that cannot be read ({error.strerror or error})"


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def known_preprocessing(model: FewShotModel) -> dict[str, Preprocessing]:
    """How a model wants its scans, by modality.

    Raises:
        CheckpointError: Its metadata does not say.
    """
    fields = model.extra.get("preprocessing", {})
    try:
        known = {name: Preprocessing.from_dict(each) for name, each in fields.items()}
    except (AttributeError, TypeError, InputError):
        known = {}
    usable = known and all(name == each.modality for name, each in known.items())
    found = "no usable preprocessing in its metadata"
    allowed = "a model written by `fastproto train`"
    fix = "Train one, or pass `preprocessing` when calling from Python."
    require(usable, "model", found=found, allowed=allowed, fix=fix, error=CheckpointError)
    return known


def load_model(path: str | Path, *, backend: str | None = None) -> FewShotUNet:
    """Load a trained model from its file or from the run folder that holds it.

    Args:
        path: ``model.safetensors``, a folder written by `fastproto.training.train`, or the text
            ``"base"`` for the model that comes with the package.
        backend: Backend of ``proto_attention``, or None for the best one that can run.

    Raises:
        CheckpointError: The file is missing, damaged, unsafe or of another architecture.
    """
    allowed = "a model.safetensors, or the run folder that holds one"
    if path == BASE and not BASE_FILE.is_file():
        fix = "Install a package that has one, or train a model with `fastproto train`."
        found = "no base model in this installation"
        raise CheckpointError(BASE_FILE, found=found, allowed=allowed, fix=fix)
    path = BASE_FILE if path == BASE else Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        found = f"{what_is(path)} without a model.safetensors"
    else:
        found = what_is(file)
    fix = f"Train one with `fastproto train`, or take the package's own, {BASE!r}."
    fix = _FIXES.get(found, fix)
    require(found == _MODEL, path, found=found, allowed=allowed, fix=fix, error=CheckpointError)
    model = FewShotUNet.load(file)
    model.backend = backend
    return model
