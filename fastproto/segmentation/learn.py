# SPDX-License-Identifier: Apache-2.0
"""From an annotated scan to a task: fields of view, prototypes, adaptation, self-check."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from fastproto.data.geometry import FieldOfView, canonical
from fastproto.data.intensity import check_intensities, guess_modality
from fastproto.data.preprocessing import PreparedVolume, Preprocessing
from fastproto.data.volume import Volume, check_labels
from fastproto.defaults import IGNORE
from fastproto.errors import CheckpointError, LabelError, require
from fastproto.nn.base import FewShotModel
from fastproto.segmentation.adapt import AnnotatedOrgan, adapt_model
from fastproto.segmentation.distance import extent
from fastproto.segmentation.predict import score_slices
from fastproto.segmentation.prior import Atlas
from fastproto.segmentation.slices import choose, split
from fastproto.segmentation.task import Organ, Task, known_preprocessing

MARGIN_MM = 30.0  # of the field of view around an organ
DIAMETERS = 4.0  # least side of the field of view, in diameters of the organ's largest slice
AUTO_STEPS = {"cpu": 60, "cuda": 150}  # of adaptation, by the kind of device
_BIASES = np.arange(-4.0, 4.01, 0.25)


def register(
    model: FewShotModel,
    image: Volume,
    label: Volume,
    *,
    labels: dict[int, str] | None = None,
    classes: Sequence[int] | None = None,
    ignore: int | None = None,
    slices: int | Sequence[int] = 12,
    preprocessing: Preprocessing | None = None,
    prior: str = "deformable",
    adapt: int | Literal["auto"] = 0,
    seed: int = 0,
    progress: Callable[[int, int, float], object] | None = None,
    fingerprint: str | None = None,
    force: bool = False,
) -> Task:
    """Learn the organs drawn in one annotated scan.

    Args:
        model: A trained model, which stays as it is; it also says how to preprocess, unless
            ``preprocessing`` does.
        image: The scan.
        label: Its label map, of the same voxels; the axes may be stored in another order.
        labels: Label value -> name. It must name every value of the mask that is registered or,
            without ``classes``, that occurs; names of values that do not occur are not used.
            None names them ``label 3``.
        classes: Label values to register, the mask's other values counting as background. None
            registers all of them.
        ignore: A label value whose voxels count nowhere, neither as an organ nor as background. For
            the place of the organs in other scans, the nearest voxel that counts stands for each.
        slices: How many slices of an organ to use, spread evenly over it; or their numbers, counted
            along the canonical axis of the plane.
        preprocessing: Replaces the model's own.
        prior: How the task will find the place of the organs in another scan: "box", "affine" or
            "deformable", see `fastproto.segmentation.prior`.
        adapt: Training steps on the annotated scan; 0 for none, "auto" for ``AUTO_STEPS``. What
            they taught is kept where it finds more in the slices left out.
        seed: Of the adaptation.
        progress: Called after each step of it with the steps done, the steps in all and the loss.
        fingerprint: ``model.fingerprint()``, if known: it takes a while.
        force: Take a scan whose intensities are not what the model was trained on, with a warning.

    Raises:
        VolumeError: The scan is constant, of another modality, or a CT that is not in HU; see
            `fastproto.data.intensity.check_intensities`.
        GeometryError: Image and mask are on different grids.
        LabelError: The mask is empty, or a label is unknown, absent or lost in resampling.
        CheckpointError: The model file does not say how to preprocess.
    """
    many = not isinstance(slices, int) or slices > 0
    require(many, "slices", found=str(slices), allowed="a whole number above 0")
    device = next(model.parameters()).device
    steps = AUTO_STEPS.get(device.type, AUTO_STEPS["cuda"]) if adapt == "auto" else adapt
    usable = isinstance(steps, int) and steps >= 0
    require(usable, "adapt", found=repr(adapt), allowed='"auto", or a number from 0')
    if preprocessing is None:
        preprocessing = _choose_preprocessing(model, image, force)
    check_intensities(image, preprocessing.modality, force=force)
    prepared = preprocessing.prepare(image)
    names = _choose_labels(label, labels, classes, ignore)
    annotated = [
        annotate(prepared, label, value, name, slices, ignore) for value, name in names.items()
    ]
    whole = without_gaps(label, ignore)
    atlas = Atlas.make(
        image, whole, list(names), preprocessing.modality, prior, plane=preprocessing.plane
    )
    organs = _learn(model, annotated)
    task = Task(organs, preprocessing, atlas, fingerprint or model.fingerprint())
    if steps == 0 or not any(split(organ)[1] for organ in annotated):
        return task  # nothing could show that it helped
    training = [replace(organ, slices=split(organ)[0]) for organ in annotated]
    learner, weights = adapt_model(model, training, steps, seed=seed, progress=progress)
    after = _learn(learner, annotated)
    if _expected(after) <= _expected(organs):
        return task
    return replace(task, organs=after, weights=weights, adapted_steps=steps)


def model_preprocessing(model: FewShotModel, modality: str) -> Preprocessing:
    """The preprocessing a model was trained with, from the metadata of its file.

    Raises:
        CheckpointError: There is none, or none for this modality.
    """
    known = known_preprocessing(model)
    found = f"that it was trained on {', '.join(known).upper()} alone, "
    found += f"and a scan that looks like {modality.upper()}"
    allowed = "a model and a scan of one modality"
    require(modality in known, "model", found=found, allowed=allowed, error=CheckpointError)
    return known[modality]


def _choose_preprocessing(model: FewShotModel, image: Volume, force: bool) -> Preprocessing:
    """That of the scan's modality; of the model's only one where that is forced."""
    known = known_preprocessing(model)
    modality = guess_modality(image)
    if modality not in known:
        (other,) = known.values()
        if force:
            return other
        check_intensities(image, other.modality)  # says what is odd about the scan, if it is
    return model_preprocessing(model, modality)


def without_gaps(label: Volume, ignore: int | None) -> Volume:
    """A label map in which the nearest voxel with another value stands for each with ``ignore``."""
    if ignore is None or not (gaps := label.array == ignore).any():
        return label
    nearest = distance_transform_edt(
        gaps, sampling=label.spacing[::-1], return_distances=False, return_indices=True
    )
    return replace(label, array=label.array[tuple(nearest)])


def annotate(
    prepared: PreparedVolume,
    label: Volume,
    value: int,
    name: str,
    slices: int | Sequence[int],
    ignore: int | None = None,
) -> AnnotatedOrgan:
    """One organ in a field of view of its own, with the slices to learn from."""
    hits = canonical(label, prepared.preprocessing.plane).array == value
    pixel = np.array(prepared.spacing[1:])
    area = hits.sum(axis=(1, 2)).max() * pixel.prod()
    first, last = extent(hits)[:, 1:]
    longest = ((last - first + 1) * pixel).max()
    side = max(DIAMETERS * 2 * math.sqrt(area / math.pi), longest + 2 * MARGIN_MM)
    side = min(side, max(prepared.view.side, longest))
    row, column = (first + last) / 2
    view = prepared.at(FieldOfView(row, column, side))
    labels = view.labels(label)
    masks = labels == value
    found = f"that {name!r} ({value}) vanishes at {prepared.image_size} pixels"
    allowed = "organs larger than a pixel of the network's image"
    fix = "Use a model trained at a larger image size, or leave this label out."
    require(masks.any(), label.name, found=found, allowed=allowed, fix=fix, error=LabelError)
    organ = AnnotatedOrgan(value, name, view, masks, ())
    if ignore is not None:
        ignored = labels == ignore
        seen = canonical(label, prepared.preprocessing.plane).array
        ignored[(seen == ignore).all(axis=(1, 2))] = True  # beyond the border as well
        organ = replace(organ, ignored=ignored)
    return replace(organ, slices=choose(masks, name, slices, organ.shown))


def _expected(organs: Sequence[Organ]) -> float:
    """Mean Dice in the slices left out, over the organs that have some."""
    known = [organ.expected_dice for organ in organs if organ.expected_dice is not None]
    return sum(known) / len(known)


def _learn(model: FewShotModel, annotated: Sequence[AnnotatedOrgan]) -> tuple[Organ, ...]:
    """Prototypes of all chosen slices; bias and predicted Dice by the slices left out."""
    network = model.for_inference()  # as it will segment
    organs = []
    for organ in annotated:
        kept, left_out = split(organ)
        learned = _encode(model, organ, organ.slices)
        if left_out:
            known = _encode(model, organ, kept)
            scores = score_slices(network, known, organ.view, left_out, left_out)
            bias, expected = _fit_bias(scores, organ.labels(left_out))
            learned = replace(learned, bias=bias, expected_dice=expected)
        organs.append(learned)
    return tuple(organs)


@torch.inference_mode()
def _encode(model: FewShotModel, organ: AnnotatedOrgan, slices: Sequence[int]) -> Organ:
    device = next(model.parameters()).device
    images = organ.view.some_images(slices)[:, None]
    prototypes = model.encode_support(
        images.expand(-1, -1, 3, -1, -1).to(device),
        organ.labels(slices)[:, None].long().to(device),
        num_classes=2,
    )
    known = prototypes.trim().to("cpu", torch.float16).to(dtype=torch.float32)  # as in a file
    return Organ(organ.value, organ.name, organ.view.view.side, tuple(slices), known)


def _fit_bias(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """The shift of the log odds that gives the best Dice, the smallest of equals; and that Dice."""
    counted = labels != IGNORE
    scores, truth = scores[counted], labels[counted].float()
    best, most = 0.0, -1.0
    for bias in sorted(_BIASES, key=abs):
        found = (scores + bias > 0).float()
        dice = float(2 * (found * truth).sum() / (found.sum() + truth.sum()).clamp(min=1))
        if dice > most + 1e-3:
            best, most = float(bias), dice
    return best, most


def _choose_labels(
    label: Volume,
    labels: dict[int, str] | None,
    classes: Sequence[int] | None,
    ignore: int | None,
) -> dict[int, str]:
    """Value -> name of the classes to register, checked against what the mask holds."""
    known = None if classes is not None or labels is None else dict(labels)
    if known is not None and ignore is not None:
        known.setdefault(ignore, "ignore")
    drawn = [value for value in check_labels(label, known) if value != ignore]
    found, allowed = f"no voxel but those to ignore ({ignore})", "at least one annotated voxel"
    require(drawn, label.name, found=found, allowed=allowed, error=LabelError)
    wanted = drawn if classes is None else list(dict.fromkeys(classes))
    absent = [str(value) for value in wanted if value not in drawn]
    found = f"no voxel of label {', '.join(absent)}"
    allowed = f"labels that occur in this mask: {', '.join(map(str, drawn))}"
    require(not absent, label.name, found=found, allowed=allowed, error=LabelError)
    names = {value: f"label {value}" for value in drawn} if labels is None else labels
    unknown = [str(value) for value in wanted if value not in names]
    found, allowed = f"no name for label {', '.join(unknown)}", "a name for every label to register"
    require(not unknown, "labels", found=found, allowed=allowed, error=LabelError)
    return {value: names[value] for value in sorted(wanted)}
