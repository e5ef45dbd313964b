# SPDX-License-Identifier: Apache-2.0
"""A segmentation task: what one annotated scan taught a model, small enough to keep and share.

A task holds the prototypes of every organ and of the background, the organs' label values and
names, the preprocessing they were made with and the fingerprint of the model that made them. It
holds no image, no path and nothing about the patient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastproto.data.preprocessing import Preprocessing
from fastproto.data.volume import Volume, check_labels
from fastproto.errors import ArgumentError, CheckpointError, LabelError
from fastproto.nn import FewShotUNet, Prototypes
from fastproto.nn.base import FewShotModel

FORMAT = "fastproto-task-1"
MAX_CLASSES = 256  # class indices, background included, travel as uint8
MAX_LABEL = 2**16 - 1  # as in `read_label`


@dataclass(frozen=True)
class Task:
    """One registered task.

    Args:
        prototypes: One episode's bags: the background's, then one per entry of ``labels``.
        labels: Label value -> name, in the order of the classes, background left out.
        preprocessing: How the annotated scan was made into slices, and every scan will be.
        fingerprint: `FewShotUNet.fingerprint` of the model the prototypes belong to.
    """

    prototypes: Prototypes
    labels: dict[int, str]
    preprocessing: Preprocessing
    fingerprint: str

    @property
    def label_values(self) -> np.ndarray:
        """Label value of every class, ``[K]``; the background (class 0) has the value 0."""
        values = np.array([0, *self.labels])
        return values.astype(np.min_scalar_type(int(values.max())))

    def check_model(self, model: FewShotModel, *, name: str | Path = "task") -> None:
        """Raise unless ``model`` is the one this task was registered with.

        Args:
            model: The model to use it with.
            name: What to call the task in the error, e.g. its file.

        Raises:
            CheckpointError: The model's configuration or weights differ.
        """
        found = model.fingerprint()
        if found != self.fingerprint:
            raise CheckpointError(
                name,
                found=f"prototypes of another model (fingerprint {self.fingerprint[:12]})",
                allowed=f"a task registered with this model (fingerprint {found[:12]})",
                fix="Register the annotated scan again with this model, or use the other model.",
            )

    def save(self, path: str | Path) -> None:
        """Write the task as one safetensors file with JSON metadata, atomically.

        Raises:
            OutputError: ``path`` cannot be written.
        """
        self.prototypes.save(
            Path(path),
            extra={
                "format": FORMAT,
                "labels": [[value, name] for value, name in self.labels.items()],
                "preprocessing": self.preprocessing.to_dict(),
                "fingerprint": self.fingerprint,
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> Task:
        """Read a task written by `save`.

        Raises:
            CheckpointError: The file is damaged or not a task.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(
                path,
                found="no such file",
                allowed="a task file",
                fix="Make one with `fastproto register`.",
            )
        prototypes, extra = Prototypes.load(path)
        found = extra.get("format") if isinstance(extra, dict) else None
        if found != FORMAT:
            raise CheckpointError(
                path,
                found=f"format {found!r}",
                allowed=f"a task file ({FORMAT!r})",
                fix="Make one with `fastproto register`.",
            )
        try:
            labels = {int(value): str(name) for value, name in extra["labels"]}
            preprocessing = Preprocessing.from_dict(extra["preprocessing"])
            fingerprint = str(extra["fingerprint"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"unusable metadata ({error})") from error
        if prototypes.num_classes != len(labels) + 1:
            raise _damaged(
                path, f"{prototypes.num_classes} bags for {len(labels)} labels and background"
            )
        if prototypes.episodes != 1 or not all(0 < value <= MAX_LABEL for value in labels):
            raise _damaged(path, f"{prototypes.episodes} episodes, labels {_listed([*labels])}")
        return cls(prototypes, labels, preprocessing, fingerprint)


def register(
    model: FewShotModel,
    image: Volume,
    label: Volume,
    *,
    labels: dict[int, str] | None = None,
    classes: Sequence[int] | None = None,
    slices: int = 10,
    preprocessing: Preprocessing | None = None,
) -> Task:
    """Learn the organs drawn in one annotated scan; no weight of the model changes.

    Args:
        model: A trained model; it also says how to preprocess, unless ``preprocessing`` does.
        image: The scan.
        label: Its label map, of the same voxels; the axes may be stored in another order.
        labels: Label value -> name. It must name every value of the mask that is registered or,
            without ``classes``, that occurs; names of values that do not occur are not used.
            None names them ``label 3``.
        classes: Label values to register, the mask's other values counting as background. None
            registers all of them.
        slices: How many slices with an organ to use, see `choose_slices`. As many of the slices
            without any are used as well, for what else the body looks like.
        preprocessing: Replaces the model's own.

    Raises:
        GeometryError: Image and mask are on different grids.
        LabelError: The mask is empty, or a label is unknown, absent or lost in resampling.
        CheckpointError: The model file does not say how to preprocess.
    """
    if slices < 1:
        raise ArgumentError("slices", found=str(slices), allowed="a whole number above 0")
    preprocessing = preprocessing or _model_preprocessing(model)
    prepared = preprocessing.prepare(image)
    label_map = prepared.labels(label)
    names = _choose_labels(label, labels, classes)
    class_maps = class_indices(label_map, list(names))
    present = _classes_per_slice(class_maps, len(names) + 1)
    for index, (value, name) in enumerate(names.items(), start=1):
        if not present[:, index].any():
            raise LabelError(
                label.name,
                found=f"that {name!r} ({value}) vanishes at {preprocessing.image_size} pixels",
                allowed="organs larger than a pixel of the network's image",
                fix="Use a model trained at a larger image size, or leave this label out.",
            )
    annotated = choose_slices(present[:, 1:], slices)
    empty = np.flatnonzero(~present[:, 1:].any(axis=1))
    chosen = annotated + _spread(empty, min(len(annotated), len(empty)))
    device = next(model.parameters()).device
    images = torch.cat([prepared.images(index, index + 1) for index in chosen])
    with torch.inference_mode():
        prototypes = model.encode_support(
            images.expand(-1, 3, -1, -1)[None].to(device),
            class_maps[chosen][None].long().to(device),
            num_classes=len(names) + 1,
        )
    return Task(prototypes.trim().to("cpu"), names, preprocessing, model.fingerprint())


def load_model(path: str | Path, *, backend: str | None = None) -> FewShotUNet:
    """Load a trained model from its file or from the run folder that holds it.

    Args:
        path: ``model.safetensors`` or a folder written by `fastproto.training.train`.
        backend: Backend of ``proto_attention``, or None for the best one that can run.

    Raises:
        CheckpointError: The file is missing, damaged, unsafe or of another architecture.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(
            path,
            found="no such file",
            allowed="a model.safetensors, or the run folder that holds one",
            fix="Train one with `fastproto train`.",
        )
    model = FewShotUNet.load(path)
    model.backend = backend
    return model


def choose_slices(present: np.ndarray, budget: int) -> list[int]:
    """Choose support slices evenly over every class's extent, the same number for each class.

    A class that occupies ``m`` slices and gets ``n`` of them gives the middles of ``n`` equal
    parts of those ``m``. ``n`` is the largest number for which all classes together need at most
    ``budget`` slices, and at least 1: with more classes than ``budget``, the budget gives way. What
    is left of the budget goes to some of the slices that ``n + 1`` would take.

    Args:
        present: ``[slices, classes]`` bool, whether a class occurs in a slice; each occurs once.
        budget: Number of slices to use in total.

    Returns:
        Slice indices in ascending order.
    """
    occupied = [np.flatnonzero(column) for column in present.T]
    chosen: set[int] = set()
    for number in range(1, budget + 1):
        wider = {index for slices in occupied for index in _spread(slices, number)}
        if chosen and len(wider) > budget:
            more = np.array(sorted(wider - chosen))
            chosen.update(_spread(more, budget - len(chosen)))
            break
        chosen = wider
    return sorted(chosen)


def _spread(slices: np.ndarray, number: int) -> list[int]:
    """The middles of ``number`` equal parts of ``slices``; some come twice if there are fewer."""
    return [int(slices[int((part + 0.5) * len(slices) / number)]) for part in range(number)]


def class_indices(label_map: Tensor, values: Sequence[int]) -> Tensor:
    """Renumber label values to class indices: ``values[k]`` to ``k + 1``, all others to 0.

    Args:
        label_map: Integer label values, any shape.
        values: The label values that are classes.

    Returns:
        uint8 class indices, same shape.
    """
    indices = torch.zeros(label_map.shape, dtype=torch.uint8)
    for index, value in enumerate(values, start=1):
        indices[label_map == value] = index
    return indices


def _choose_labels(
    label: Volume, labels: dict[int, str] | None, classes: Sequence[int] | None
) -> dict[int, str]:
    """Value -> name of the classes to register, checked against what the mask holds."""
    found = check_labels(label, labels if classes is None else None)
    wanted = found if classes is None else list(dict.fromkeys(classes))
    if absent := [value for value in wanted if value not in found]:
        raise LabelError(
            label.name,
            found=f"no voxel of label {_listed(absent)}",
            allowed=f"labels that occur in this mask: {_listed(found)}",
        )
    if labels is None:
        labels = {value: f"label {value}" for value in found}
    if unknown := [value for value in wanted if value not in labels]:
        raise LabelError(
            "labels",
            found=f"no name for label {_listed(unknown)}",
            allowed="a name for every label to register",
        )
    if len(wanted) >= MAX_CLASSES:
        raise LabelError(
            label.name,
            found=f"{len(wanted)} labels",
            allowed=f"at most {MAX_CLASSES - 1} in one task",
            fix="Register them in several tasks.",
        )
    return {value: labels[value] for value in sorted(wanted)}


def _model_preprocessing(model: FewShotModel) -> Preprocessing:
    """The preprocessing a model was trained with, from the metadata of its file."""
    try:
        return Preprocessing.from_dict(model.extra["preprocessing"])
    except (KeyError, TypeError, ArgumentError) as error:
        raise CheckpointError(
            "model",
            found="no usable preprocessing in its metadata",
            allowed="a model written by `fastproto train`",
            fix="Train one, or pass `preprocessing` when calling from Python.",
        ) from error


def _classes_per_slice(class_maps: Tensor, num_classes: int) -> np.ndarray:
    """``[slices, K]`` bool: which classes occur in each of ``[slices, S, S]`` class maps."""
    present = np.zeros((len(class_maps), num_classes), dtype=bool)
    for index, class_map in enumerate(class_maps):
        present[index, torch.unique(class_map).numpy()] = True
    return present


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        path,
        found=found,
        allowed="an intact task file",
        fix="Make it again with `fastproto register`.",
    )


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
