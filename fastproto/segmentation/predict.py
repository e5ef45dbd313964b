# SPDX-License-Identifier: Apache-2.0
"""Segment a whole volume with a registered task, a few slices at a time.

Memory beyond the volume and its result does not grow with the number of slices: each batch is
prepared, decoded, brought back to the volume's own grid and reduced to label values on the spot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastproto.data.volume import Volume
from fastproto.errors import ArgumentError
from fastproto.nn import Prototypes
from fastproto.nn.base import FewShotModel
from fastproto.segmentation.task import Task

# Class maps the decoder works on at once (slices x classes). At 256 x 256 one of them costs about
# 25 MB of activations.
DECODER_MAPS = 8
# Probabilities held at once on the volume's own grid: 8 class maps of 512 x 512.
RESTORED_VALUES = 8 * 512 * 512


class Segmentation(NamedTuple):
    """A segmented volume, on the grid and in the stored axes of its input.

    Args:
        labels: ``[Z, Y, X]``, the label values of the task, in the smallest unsigned type.
        probabilities: Label value -> ``[Z, Y, X]`` float32, the background left out; or None.
    """

    labels: np.ndarray
    probabilities: dict[int, np.ndarray] | None


def segment_volume(
    model: FewShotModel,
    task: Task,
    volume: Volume,
    *,
    batch_size: int | None = None,
    probabilities: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Segmentation:
    """Segment every slice of ``volume``.

    Args:
        model: The model ``task`` was registered with.
        task: The organs to find.
        volume: The scan; its values are not changed.
        batch_size: Slices per forward pass; None takes what suits the number of classes.
        probabilities: Also return every organ's probability, 4 bytes per voxel and organ.
        progress: Called after each batch with the slices done so far and the slices in all.

    Raises:
        CheckpointError: ``task`` was registered with another model.
    """
    num_classes = len(task.labels) + 1
    if batch_size is None:
        batch_size = max(1, DECODER_MAPS // num_classes)
    if batch_size < 1:
        raise ArgumentError("batch_size", found=str(batch_size), allowed="a whole number above 0")
    task.check_model(model)
    device = next(model.parameters()).device
    bags = list(_split_classes(task.prototypes.to(device)))
    prepared = task.preprocessing.prepare(volume)
    values = task.label_values
    labels = np.zeros(volume.array.shape, dtype=values.dtype)
    organs = {
        value: np.zeros(volume.array.shape, dtype=np.float32)
        for value in (task.labels if probabilities else ())
    }
    labels_seen = prepared.to_canonical(labels)
    organs_seen = [prepared.to_canonical(organ) for organ in organs.values()]
    _, height, width = prepared.shape
    step = max(1, RESTORED_VALUES // (num_classes * height * width))
    for start in range(0, len(prepared), batch_size):
        stop = min(start + batch_size, len(prepared))
        batch = _class_probabilities(model, bags, prepared.images(start, stop).to(device))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            restored = prepared.restore(batch[first - start : last - start], first, last)
            labels_seen[first:last] = values[restored.argmax(axis=1)]
            for index, organ in enumerate(organs_seen, start=1):
                organ[first:last] = restored[:, index]
        if progress is not None:
            progress(stop, len(prepared))
    return Segmentation(labels, organs if probabilities else None)


@torch.inference_mode()
def _class_probabilities(model: FewShotModel, bags: list[Prototypes], images: Tensor) -> Tensor:
    """``[n, 1, S, S]`` -> ``[n, K, S, S]``, the bags being all K classes in groups."""
    features = model.encode(images.expand(-1, 3, -1, -1)[None])
    logits = torch.cat([model.decode(features, part) for part in bags], dim=2)
    return logits[0].float().softmax(dim=1)


def _split_classes(prototypes: Prototypes) -> Iterator[Prototypes]:
    """Split the bags of one episode into groups the decoder can hold; it treats each bag alone."""
    offsets = prototypes.offsets.tolist()
    groups = -(-prototypes.num_classes // DECODER_MAPS)
    for group in np.array_split(np.arange(prototypes.num_classes), groups):
        first, last = int(group[0]), int(group[-1]) + 1
        yield Prototypes(
            prototypes.protos[offsets[first] : offsets[last]],
            prototypes.offsets[first : last + 1] - offsets[first],
            last - first,
        )
