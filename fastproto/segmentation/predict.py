# SPDX-License-Identifier: Apache-2.0
"""Segment a whole volume with a task: where the prior expects an organ, a few slices at a time.

Every organ is looked for in its own field of view, by the prototypes of the annotated slices that
lie nearest. Its log odds against the background and those of its place add up; where several organs
claim a voxel, the largest sum has it. With several annotated scans, an organ's log odds are the
mean of those by each.
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
from fastproto.errors import ArgumentError, LabelError
from fastproto.nn.base import FewShotModel
from fastproto.segmentation.correction import correction
from fastproto.segmentation.postprocess import clean
from fastproto.segmentation.prior import Prior, locate
from fastproto.segmentation.task import Organ, Task

NEAREST = 3  # annotated slices that a query slice is compared with
BATCH = 8  # slices at once
# How far beyond its expected place an organ is looked for, by the kind of the prior.
MARGINS_MM = {"box": 40.0, "affine": 30.0, "deformable": 25.0}
ABSENT = 0.15  # mean probability by the network alone below which an organ is probably not there


@dataclass(frozen=True)
class Fusion:
    """How the network's evidence and the prior's make one decision; chosen on training patients.

    Args:
        network: Factor of the network's log odds; 0 leaves it out.
        prior: Factor of the prior's log odds; 0 leaves it out.
        blur: Distance over which the prior's odds fall by e, as a share of the organ's depth: of
            the largest distance of a place inside to its surface.
        limit: Largest log odds of the prior, either way: no place is ever ruled out.
    """

    network: float = 1.0
    prior: float = 1.0
    blur: float = 0.12
    limit: float = 4.0

    def __call__(self, scores: Tensor, distance: Tensor, organ: Organ) -> Tensor:
        """Log odds of an organ from the network's scores and the distance to its expected place."""
        depth = -float(distance.min().clamp(max=-1.0))  # an organ beyond the scan has none
        place = (distance / (-self.blur * depth)).clamp(-self.limit, self.limit)
        trust = self.network * (_trust(organ.expected_dice) if self.prior else 1.0)
        return trust * (scores + organ.bias) + self.prior * place


def _trust(expected_dice: float | None) -> float:
    """How much the network counts beside the prior: by the odds of its Dice in slices left out.

    1/2 at a Dice of 0.8, 1/8 at 0.5; 1/4 where no slice could be left out.
    """
    if expected_dice is None:
        return 0.25
    return min(expected_dice / max(1 - expected_dice, 1e-6) / 8, 1.5)


FUSIONS = {
    "box": Fusion(blur=0.5),
    "affine": Fusion(blur=0.25),
    "deformable": Fusion(blur=0.12),
}
"""By the kind of the prior; the sharper its place, the steeper its odds."""


class Segmentation(NamedTuple):
    """A segmented volume, on the grid and in the stored axes of its input.

    Args:
        labels: ``[Z, Y, X]``, the label values of the task, in the smallest unsigned type.
        probabilities: Label value -> ``[Z, Y, X]`` float32, the organ's probability against the
            background; or None.
        prior: Where the organs were expected, by the first of several tasks.
        confidence: Label value -> mean probability that the network alone, without the place, gives
            the voxels found; 0 where none were.
    """

    labels: np.ndarray
    probabilities: dict[int, np.ndarray] | None
    prior: Prior
    confidence: dict[int, float]

    def absent(self) -> list[int]:
        """Organs that are probably not in the scan: none found, or the network saw none there."""
        return [value for value, mean in self.confidence.items() if mean < ABSENT]


class Claim(NamedTuple):
    """Where one organ may be.

    Args:
        value: Its label value.
        box: Canonical slices, rows and columns.
        odds: Its log odds against the background, float32, of the box's shape.
        network: The network's part of them.
    """

    value: int
    box: tuple[slice, ...]
    odds: Tensor
    network: Tensor


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
    task: Task | Sequence[Task],
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
        task: The organs to find; or several tasks, each of another annotated scan.
        volume: The scan; its values are not changed.
        batch_size: Slices per forward pass; None takes ``BATCH``.
        probabilities: Also return every organ's probability, 4 bytes per voxel and organ.
        prior: How to find the place of the organs: "box", "affine" or "deformable", as far as the
            task can serve it; None takes that.
        fusion: How network and prior are weighed; None takes what was chosen for the prior's kind.
        progress: Called after each batch with the slices done so far and the slices in all, as far
            as is known: those of another task are counted when their turn comes.

    Raises:
        CheckpointError: A task was registered with another model.
        LabelError: Tasks that name a label differently.
    """
    tasks = [task] if isinstance(task, Task) else list(task)
    check_tasks(tasks, model)
    prepared = tasks[0].preprocessing.prepare(volume)
    priors = [locate(task.atlas, volume, prior) for task in tasks]
    claims = []
    before = done = 0  # slices of earlier tasks, slices in all

    def advance(now: int, total: int) -> None:
        nonlocal done
        done = before + now
        if progress is not None:
            progress(done, before + total)

    for task, located in zip(tasks, priors, strict=True):
        found = gather(
            task.ready(model),
            task,
            prepared,
            located,
            batch_size=BATCH if batch_size is None else batch_size,
            progress=advance,
        )
        before = done
        claims.append(weigh(task, found, fusion or FUSIONS[located.kind]))
    return settle(volume, prepared, priors[0], average(claims), probabilities=probabilities)


def check_tasks(tasks: Sequence[Task], model: FewShotModel) -> None:
    """Raise unless ``model`` can use all of ``tasks`` together.

    Raises:
        ArgumentError: None at all, or slices prepared in different ways.
        CheckpointError: A task was registered with another model.
        LabelError: Tasks that name a label differently.
    """
    if not tasks:
        raise ArgumentError("task", found="no task", allowed="one task or several")
    names: dict[int, str] = {}
    for task in tasks:
        task.check_model(model)
        if task.preprocessing != tasks[0].preprocessing:
            raise ArgumentError(
                "task",
                found=f"tasks of {task.preprocessing} and of {tasks[0].preprocessing}",
                allowed="annotated scans of one modality, prepared alike",
            )
        for value, name in task.labels.items():
            if names.setdefault(value, name) != name:
                raise LabelError(
                    "task",
                    found=f"label {value} as {names[value]!r} and as {name!r}",
                    allowed="one name for each value in all annotated scans",
                )


def gather(
    model: FewShotModel,
    task: Task,
    prepared: PreparedVolume,
    prior: Prior,
    *,
    batch_size: int = BATCH,
    progress: Callable[[int, int], object] | None = None,
) -> list[Evidence]:
    """The evidence for every organ of ``task``; ``model`` is the adapted one.

    An organ that the network sees beside its expected place is looked at again, from there; see
    `correction`.
    """
    if batch_size < 1:
        raise ArgumentError("batch_size", found=str(batch_size), allowed="a whole number above 0")
    places = [prior.only(index) for index in range(len(task.organs))]

    def slices(place: Prior) -> int:
        first, stop = place.box(MARGINS_MM[place.kind])[0]
        return stop - first

    total = sum(map(slices, places))
    done = 0

    def look(organ: Organ, place: Prior) -> Evidence:
        nonlocal done
        (first, last), *sides = place.box(MARGINS_MM[place.kind])
        view = prepared.at(expected_view(organ, place))
        positions = place.slice_positions().tolist()
        # No further than the network sees.
        box = [slice(first, last)]
        for axis, centre in ((1, view.view.row), (2, view.view.column)):
            reach = organ.side / 2 / prepared.spacing[axis]
            low, high = sides[axis - 1]
            box.append(slice(max(low, round(centre - reach)), min(high, round(centre + reach) + 1)))
        scores, distance = [], []
        for start in range(first, last, batch_size):
            stop = min(start + batch_size, last)
            part = score_slices(model, organ, view, range(start, stop), positions[start:stop])
            restored = torch.from_numpy(view.restore(part[:, None], start, stop))
            scores.append(restored[:, 0, box[1], box[2]].clone())
            distance.append(place.signed_distance(start, stop)[:, 0, box[1], box[2]].clone())
            done += stop - start
            if progress is not None:
                progress(done, total)
        return Evidence((box[0], box[1], box[2]), torch.cat(scores), torch.cat(distance))

    found = []
    for organ, place in zip(task.organs, places, strict=True):
        evidence = look(organ, place)
        way = correction(evidence.scores + organ.bias, evidence.distance, prepared.spacing)
        if way.any():
            place = place.moved(way)
            total += slices(place)
            evidence = look(organ, place)
        found.append(evidence)
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
    """One label map from the evidence for all organs of one task."""
    claims = list(weigh(task, found, fusion).values())
    return settle(volume, prepared, prior, claims, probabilities=probabilities)


def weigh(task: Task, found: Sequence[Evidence], fusion: Fusion) -> dict[int, Claim]:
    """What the evidence for every organ of a task adds up to, by label value."""
    return {
        organ.value: Claim(
            organ.value,
            evidence.box,
            fusion(evidence.scores, evidence.distance, organ),
            evidence.scores + organ.bias,
        )
        for organ, evidence in zip(task.organs, found, strict=True)
    }


def average(claims: Sequence[dict[int, Claim]]) -> list[Claim]:
    """Mean log odds of every organ over the tasks that know it.

    Where a task did not look, its log odds are the lowest that its prior gives.
    """
    result = []
    for value in dict.fromkeys(value for part in claims for value in part):
        known = [part[value] for part in claims if value in part]
        if len(known) == 1:
            result += known
            continue
        box = tuple(
            slice(min(side.start for side in sides), max(side.stop for side in sides))
            for sides in zip(*(claim.box for claim in known), strict=True)
        )
        shape = [side.stop - side.start for side in box]
        means = []
        for part in ("odds", "network"):
            mean = torch.zeros(shape)
            for claim in known:
                whole = torch.full(shape, -Fusion.limit)
                inner = tuple(
                    slice(own.start - side.start, own.stop - side.start)
                    for own, side in zip(claim.box, box, strict=True)
                )
                whole[inner] = getattr(claim, part)
                mean += whole
            means.append(mean / len(known))
        result.append(Claim(value, box, *means))
    return result


def settle(
    volume: Volume,
    prepared: PreparedVolume,
    prior: Prior,
    claims: Sequence[Claim],
    *,
    probabilities: bool = False,
) -> Segmentation:
    """One label map from the claims of all organs."""
    dtype = np.min_scalar_type(max(claim.value for claim in claims))
    labels = np.zeros(volume.array.shape, dtype)
    best = np.zeros(volume.array.shape, np.float32)
    seen, best_seen = prepared.to_canonical(labels), prepared.to_canonical(best)
    organs = {}
    for claim in claims:
        odds, box = claim.odds.numpy(), claim.box
        wins = odds > best_seen[box]
        best_seen[box][wins] = odds[wins]
        seen[box][wins] = claim.value
        if probabilities:
            whole = np.zeros(volume.array.shape, np.float32)
            prepared.to_canonical(whole)[box] = claim.odds.sigmoid().numpy()
            organs[claim.value] = whole
    confidence = {}
    for claim in claims:
        part = seen[claim.box]  # a view
        mask = part == claim.value
        kept = clean(mask)
        part[mask & ~kept] = 0
        part[kept & (part == 0)] = claim.value
        inside = claim.network[torch.from_numpy(part == claim.value)]
        confidence[claim.value] = float(inside.sigmoid().mean()) if len(inside) else 0.0
    return Segmentation(labels, organs if probabilities else None, prior, confidence)


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
        model: The network, adapted or not, as it is or `for_inference`.
        organ: With its prototypes.
        view: The scan in the organ's field of view.
        numbers: Slices of it, without gaps or not.
        positions: The slice of the annotated scan that each of them corresponds to.

    Returns:
        ``[n, S, S]`` float32 on the CPU.
    """
    weight = next(model.parameters())
    images = view.some_images(numbers)[:, None].to(weight.device, weight.dtype)
    bags = organ.prototypes.pick([_nearest(organ, place) for place in positions])
    bags = bags.to(weight.device, weight.dtype)
    logits = model.segment(images.expand(-1, -1, 3, -1, -1), bags)[:, 0].float()
    return (logits[:, 1] - logits[:, 0]).cpu()


def _nearest(organ: Organ, place: float) -> tuple[list[int], list[int]]:
    """The annotated slices to compare with, for the background and for the organ."""
    order = np.argsort([abs(number - place) for number in organ.slices], kind="stable").tolist()
    counts = organ.prototypes.offsets.diff().view(-1, 2)[:, 1].tolist()
    return order[:NEAREST], [i for i in order if counts[i]][:NEAREST]


def expected_view(organ: Organ, prior: Prior) -> FieldOfView:
    """The organ's field of view around its expected place; ``prior`` is of it alone."""
    _, (top, bottom), (left, right) = prior.box()
    return FieldOfView((top + bottom - 1) / 2, (left + right - 1) / 2, organ.side)
