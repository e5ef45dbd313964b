# SPDX-License-Identifier: Apache-2.0
"""Segment a whole volume with a task: where the prior expects an organ, a few slices at a time.

Every organ is looked for in its own field of view, by the prototypes of the annotated slices that
lie nearest. Its log odds against the background and those of its place add up; where several organs
claim a voxel, the largest sum has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastproto.data.preprocessing import FieldOfView, PreparedVolume
from fastproto.data.volume import Volume
from fastproto.errors import ArgumentError
from fastproto.nn.base import FewShotModel
from fastproto.segmentation.postprocess import clean
from fastproto.segmentation.prior import Prior, locate
from fastproto.segmentation.task import Organ, Task

NEAREST = 3  # annotated slices that a query slice is compared with
BATCH = 8  # slices at once
MARGIN_MM = 40.0  # how far beyond its expected place an organ is looked for


@dataclass(frozen=True)
class Fusion:
    """How the network's evidence and the prior's make one decision; chosen on training patients.

    Args:
        network: Factor of the network's log odds; 0 leaves it out.
        prior: Factor of the prior's log odds; 0 leaves it out.
        blur: Distance in mm over which the prior's odds fall by e.
        limit: Largest log odds of the prior, either way: no place is ever ruled out.
    """

    network: float = 1.0
    prior: float = 1.0
    blur: float = 5.0
    limit: float = 6.0

    def __call__(self, scores: Tensor, distance: Tensor, bias: float) -> Tensor:
        """Log odds of an organ from the network's scores and the distance to its expected place."""
        place = (distance / -self.blur).clamp(-self.limit, self.limit)
        return self.network * (scores + bias) + self.prior * place


class Segmentation(NamedTuple):
    """A segmented volume, on the grid and in the stored axes of its input.

    Args:
        labels: ``[Z, Y, X]``, the label values of the task, in the smallest unsigned type.
        probabilities: Label value -> ``[Z, Y, X]`` float32, the background left out; or None.
        prior: Where the organs were expected.
    """

    labels: np.ndarray
    probabilities: dict[int, np.ndarray] | None
    prior: Prior


class Evidence(NamedTuple):
    """What speaks for one organ in the box where it is looked for.

    Args:
        box: The box in canonical slices, rows and columns.
        scores: The network's log odds against the background, float32, of the box's shape.
        distance: Signed distance to the expected place in mm, negative inside.
    """

    box: tuple[slice, slice, slice]
    scores: Tensor
    distance: Tensor


def segment_volume(
    model: FewShotModel,
    task: Task,
    volume: Volume,
    *,
    batch_size: int | None = None,
    probabilities: bool = False,
    prior: str | None = None,
    fusion: Fusion | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Segmentation:
    """Segment a scan.

    Args:
        model: The model ``task`` was registered with.
        task: The organs to find.
        volume: The scan; its values are not changed.
        batch_size: Slices per forward pass; None takes ``BATCH``.
        probabilities: Also return every organ's probability, 4 bytes per voxel and organ.
        prior: How to find the place of the organs: "box", "affine" or "deformable", as far as the
            task can serve it; None takes that.
        fusion: How network and prior are weighed; None takes what was chosen for the prior's kind.
        progress: Called after each batch with the slices done so far and the slices in all.

    Raises:
        CheckpointError: ``task`` was registered with another model.
    """
    task.check_model(model)
    model = task.adapted(model)
    located = locate(task.atlas, volume, prior)
    fusion = fusion or FUSIONS[located.kind]
    prepared = task.preprocessing.prepare(volume)
    found = gather(
        model, task, prepared, located, batch_size=batch_size or BATCH, progress=progress
    )
    return decide(task, volume, prepared, located, found, fusion, probabilities=probabilities)


def gather(
    model: FewShotModel,
    task: Task,
    prepared: PreparedVolume,
    prior: Prior,
    *,
    batch_size: int = BATCH,
    progress: Callable[[int, int], object] | None = None,
) -> list[Evidence]:
    """The evidence for every organ of ``task``; ``model`` is the adapted one."""
    if batch_size < 1:
        raise ArgumentError("batch_size", found=str(batch_size), allowed="a whole number above 0")
    positions = prior.slice_positions().tolist()
    boxes = []
    for index in range(len(task.organs)):
        own = prior.only(index)
        boxes.append((own, own.box(MARGIN_MM)))
    total = sum(box[0][1] - box[0][0] for _, box in boxes)
    done = 0
    found = []
    for organ, (own, box) in zip(task.organs, boxes, strict=True):
        view = prepared.at(_field_of_view(organ, own))
        (first, last), (top, bottom), (left, right) = box
        # No further than the network sees.
        half = organ.side / 2
        for axis, centre in ((1, view.view.row), (2, view.view.column)):
            low, high = (top, bottom) if axis == 1 else (left, right)
            reach = half / prepared.spacing[axis]
            low, high = max(low, round(centre - reach)), min(high, round(centre + reach) + 1)
            if axis == 1:
                top, bottom = low, high
            else:
                left, right = low, high
        scores = torch.empty(last - first, bottom - top, right - left)
        distance = torch.empty_like(scores)
        for start in range(first, last, batch_size):
            stop = min(start + batch_size, last)
            numbers = range(start, stop)
            logits = score_slices(model, organ, view, numbers, positions[start:stop])
            restored = torch.from_numpy(view.restore(logits[:, None], start, stop))
            rows = slice(start - first, stop - first)
            scores[rows] = restored[:, 0, top:bottom, left:right]
            near = own.signed_distance(start, stop)
            distance[rows] = near[:, 0, top:bottom, left:right]
            done += stop - start
            if progress is not None:
                progress(done, total)
        region = slice(first, last), slice(top, bottom), slice(left, right)
        found.append(Evidence(region, scores, distance))
    return found


def decide(
    task: Task,
    volume: Volume,
    prepared: PreparedVolume,
    prior: Prior,
    found: Sequence[Evidence],
    fusion: Fusion,
    *,
    probabilities: bool = False,
) -> Segmentation:
    """One label map from the evidence for all organs."""
    values = [organ.value for organ in task.organs]
    dtype = np.min_scalar_type(max(values))
    labels = np.zeros(volume.array.shape, dtype)
    best = np.zeros(volume.array.shape, np.float32)
    seen, best_seen = prepared.to_canonical(labels), prepared.to_canonical(best)
    organs = {}
    for organ, evidence in zip(task.organs, found, strict=True):
        odds = fusion(evidence.scores, evidence.distance, organ.bias).numpy()
        box = evidence.box
        wins = odds > best_seen[box]
        best_seen[box][wins] = odds[wins]
        seen[box][wins] = organ.value
        if probabilities:
            whole = np.zeros(volume.array.shape, np.float32)
            prepared.to_canonical(whole)[box] = 1 / (1 + np.exp(-odds))
            organs[organ.value] = whole
    for organ, evidence in zip(task.organs, found, strict=True):
        mask = seen[evidence.box] == organ.value
        kept = clean(mask, evidence.distance.numpy())
        seen[evidence.box][mask & ~kept] = 0
        seen[evidence.box][kept & (seen[evidence.box] == 0)] = organ.value
    return Segmentation(labels, organs if probabilities else None, prior)


@torch.inference_mode()
def score_slices(
    model: FewShotModel,
    organ: Organ,
    view: PreparedVolume,
    numbers: Sequence[int],
    positions: Sequence[float],
) -> Tensor:
    """Log odds of an organ in some slices.

    Args:
        model: The adapted model.
        organ: With its prototypes.
        view: The scan in the organ's field of view.
        numbers: Slices of it, without gaps or not.
        positions: The slice of the annotated scan that each of them corresponds to.

    Returns:
        ``[n, S, S]`` float32 on the CPU.
    """
    device = next(model.parameters()).device
    images = torch.cat([view.images(n, n + 1) for n in numbers])[:, None].to(device)
    bags = organ.prototypes.to(device).pick([_nearest(organ, place) for place in positions])
    features = model.encode(images.expand(-1, -1, 3, -1, -1))
    logits = model.decode(features, bags)[:, 0].float()
    return (logits[:, 1] - logits[:, 0]).cpu()


def _nearest(organ: Organ, place: float) -> tuple[list[int], list[int]]:
    """The annotated slices to compare with, for the background and for the organ."""
    order = np.argsort([abs(number - place) for number in organ.slices], kind="stable").tolist()
    counts = organ.prototypes.offsets.diff().view(-1, 2)[:, 1].tolist()
    return order[:NEAREST], [i for i in order if counts[i]][:NEAREST]


def _field_of_view(organ: Organ, prior: Prior) -> FieldOfView:
    """The organ's field of view around its expected place."""
    _, (top, bottom), (left, right) = prior.box()
    return FieldOfView((top + bottom - 1) / 2, (left + right - 1) / 2, organ.side)


FUSIONS = {"box": Fusion(), "affine": Fusion(), "deformable": Fusion()}
