# SPDX-License-Identifier: Apache-2.0
"""Segment a whole volume with a task: where the prior expects an organ, a few slices at a time.

Every organ is looked for in its own field of view, by the prototypes of the annotated slices that
lie nearest. Its log odds against the background and those of its place add up; where several organs
claim a voxel, the largest sum has it. With several annotated scans, an organ's log odds are the
mean of those by each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastproto.data.geometry import FieldOfView
from fastproto.data.intensity import check_intensities
from fastproto.data.preprocessing import PreparedVolume
from fastproto.data.volume import Volume
from fastproto.errors import LabelError, require, warn
from fastproto.nn.base import FewShotModel
from fastproto.segmentation.correction import correction
from fastproto.segmentation.fusion import FUSIONS, Claim, Evidence, Fusion, average, weigh
from fastproto.segmentation.postprocess import clean
from fastproto.segmentation.prior import Prior, locate
from fastproto.segmentation.task import Organ, Task

NEAREST = 3  # annotated slices that a query slice is compared with
BATCH = 8  # slices at once
# How far beyond its expected place an organ is looked for, by the kind of the prior.
MARGINS_MM = {"box": 40.0, "affine": 30.0, "deformable": 25.0}
ABSENT = 0.15  # mean probability by the network alone below which an organ is probably not there


class Segmentation(NamedTuple):
    """A segmented volume, on the grid and in the stored axes of its input.

    Args:
        labels: ``[Z, Y, X]``, the label values of the task, in the smallest unsigned type.
        probabilities: Label value -> ``[Z, Y, X]`` float32, the organ's probability against the
            background; or None.
        prior: Where the organs were expected, by the first of several tasks.
        confidence: Label value -> mean probability that the network alone, without the place, gives
            the voxels found; 0 where none were.
        unfit: What `force` went over; None where the scan is as the model expects.
    """

    labels: np.ndarray
    probabilities: dict[int, np.ndarray] | None
    prior: Prior
    confidence: dict[int, float]
    unfit: str | None = None

    def absent(self) -> list[int]:
        """Organs that are probably not in the scan: none found, or the network saw none there."""
        return [value for value, mean in self.confidence.items() if mean < ABSENT]


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
    fingerprint: str | None = None,
    force: bool = False,
) -> Segmentation:
    """Segment a scan.

    Args:
        model: The model ``task`` was registered with.
        task: The organs to find; or several tasks, each of another annotated scan.
        volume: The scan; its values are not changed.
        batch_size: Slices per forward pass; None takes ``BATCH``. Where a GPU's memory is too small
            for them, half as many are tried, with a warning.
        probabilities: Also return every organ's probability, 4 bytes per voxel and organ.
        prior: How to find the place of the organs: "box", "affine" or "deformable", as far as the
            task can serve it; None takes that.
        fusion: How network and prior are weighed; None takes what was chosen for the prior's kind.
        progress: Called after each batch with the slices done so far and the slices in all, as far
            as is known: those of another task are counted when their turn comes.
        fingerprint: ``model.fingerprint()``, if known: with many scans it need not be computed for
            each of them, as long as nothing changes the weights.
        force: Segment a scan whose intensities are not those of the tasks' modality, with a
            warning.

    Raises:
        VolumeError: The scan is constant, of another modality, or a CT that is not in HU; see
            `fastproto.data.intensity.check_intensities`.
        ArgumentError: No task, tasks whose slices are prepared differently, no batch.
        CheckpointError: A task was registered with another model.
        LabelError: Tasks that name a label differently.
    """
    tasks = [task] if isinstance(task, Task) else list(task)
    check_tasks(tasks, model, fingerprint)
    unfit = check_intensities(volume, tasks[0].preprocessing.modality, force=force)
    prepared = tasks[0].preprocessing.prepare(volume)
    priors = [locate(task.atlas, volume, prior) for task in tasks]
    claims: list[Claim] = []
    before = done = 0  # slices of earlier tasks, slices in all

    def advance(now: int, total: int) -> None:
        nonlocal done
        done = before + now
        if progress is not None:
            progress(done, before + total)

    size = BATCH if batch_size is None else batch_size
    for task, located in zip(tasks, priors, strict=True):
        ready = task.ready(model)
        found = gather(ready, task, prepared, located, batch_size=size, progress=advance)
        before = done
        claims += weigh(task, found, fusion or FUSIONS[located.kind])
    result = settle(prepared, priors[0], average(claims), probabilities=probabilities)
    return result._replace(unfit=unfit)


def check_tasks(tasks: Sequence[Task], model: FewShotModel, fingerprint: str | None = None) -> None:
    """Raise what `segment_volume` does unless ``model`` can use all of ``tasks`` together."""
    require(tasks, "task", found="no task", allowed="one task or several")
    fingerprint = fingerprint or model.fingerprint()
    names: dict[int, str] = {}
    for task in tasks:
        task.check_model(model, fingerprint=fingerprint)
        first, own = tasks[0].preprocessing, task.preprocessing
        kinds = " and ".join(f"{each.modality.upper()}, {each.plane}" for each in (first, own))
        found = f"tasks whose scans are prepared in two ways ({kinds})"
        allowed = "annotated scans of one modality, prepared alike"
        require(own == first, "task", found=found, allowed=allowed)
        allowed = "one name for each value in all annotated scans"
        for value, name in task.labels.items():
            known = names.setdefault(value, name)
            found = f"label {value} as {known!r} and as {name!r}"
            require(known == name, "task", found=found, allowed=allowed, error=LabelError)


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
    allowed = "a whole number above 0"
    require(batch_size > 0, "batch_size", found=str(batch_size), allowed=allowed)
    margin = MARGINS_MM[prior.kind]
    places = [prior.only(index) for index in range(len(task.organs))]
    total = sum(stop - first for (first, stop), *_ in (place.box(margin) for place in places))
    done = 0

    def look(organ: Organ, place: Prior) -> Evidence:
        nonlocal done, batch_size
        (first, last), *sides = place.box(margin)
        view = prepared.at(expected_view(organ, place))
        positions = place.slice_positions().tolist()
        box = []  # no further than the network sees
        for (low, high), step, centre in zip(
            sides, prepared.spacing[1:], view.view[:2], strict=True
        ):
            reach = organ.side / 2 / step
            box.append(slice(max(low, round(centre - reach)), min(high, round(centre + reach) + 1)))
        rows, columns = box
        scores, distance = [], []
        start = first
        while start < last:
            stop = min(start + batch_size, last)
            try:
                part = score_slices(model, organ, view, range(start, stop), positions[start:stop])
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
                part = None
            if part is None:  # no longer in the handler, which keeps the failed tensors alive
                batch_size = _shrink(batch_size)
                continue
            restored = torch.from_numpy(view.restore(part[:, None], start, stop))
            scores.append(restored[:, 0, rows, columns].clone())
            distance.append(place.signed_distance(start, stop)[:, 0, rows, columns].clone())
            done += stop - start
            start = stop
            if progress is not None:
                progress(done, total)
        return Evidence((slice(first, last), rows, columns), torch.cat(scores), torch.cat(distance))

    found = []
    for organ, place in zip(task.organs, places, strict=True):
        evidence = look(organ, place)
        way = correction(evidence.scores + organ.bias, evidence.distance, prepared.spacing)
        if way.any():
            place = place.moved(way)
            first, stop = place.box(margin)[0]
            total += stop - first
            evidence = look(organ, place)
        found.append(evidence)
    return found


def _shrink(batch_size: int) -> int:
    """Half a batch, after the GPU had too little memory for it; says so and frees what it can."""
    smaller = max(1, batch_size // 2)
    text = f"{batch_size} slices at once are too many for its memory; going on with {smaller}"
    warn("the GPU", text)
    torch.cuda.empty_cache()
    return smaller


def decide(
    task: Task,
    volume: Volume,
    prepared: PreparedVolume,
    prior: Prior,
    found: Sequence[Evidence],
    fusion: Fusion,
) -> Segmentation:
    """One label map from the evidence for all organs of one task."""
    return settle(prepared, prior, weigh(task, found, fusion))


def settle(
    prepared: PreparedVolume, prior: Prior, claims: Sequence[Claim], *, probabilities: bool = False
) -> Segmentation:
    """One label map from the claims of all organs."""
    shape = prepared.volume.array.shape
    labels = np.zeros(shape, np.min_scalar_type(max(claim.value for claim in claims)))
    best = np.zeros(shape, np.float32)
    seen, best_seen = prepared.to_canonical(labels), prepared.to_canonical(best)
    organs = {}
    for claim in claims:
        odds, box = claim.odds.numpy(), claim.box
        wins = odds > best_seen[box]
        best_seen[box][wins] = odds[wins]
        seen[box][wins] = claim.value
        if probabilities:
            whole = np.zeros(shape, np.float32)
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
    """Log odds of an organ in the slices ``numbers`` of its field of view, in any order.

    ``positions`` are the slices of the annotated scan that they correspond to.

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
    counts = organ.prototypes.counts()
    return order[:NEAREST], [i for i in order if counts[i][1]][:NEAREST]


def expected_view(organ: Organ, prior: Prior) -> FieldOfView:
    """The organ's field of view around its expected place; ``prior`` is of it alone."""
    _, (top, bottom), (left, right) = prior.box()
    return FieldOfView((top + bottom - 1) / 2, (left + right - 1) / 2, organ.side)
