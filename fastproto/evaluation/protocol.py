# SPDX-License-Identifier: Apache-2.0
"""How the field measures few-shot segmentation: which slices teach, which count, which patients.

* **EP1** (Roy et al. 2020, Ouyang et al. 2020): the slices of an organ are cut into three chunks,
  in the annotated scan and in the query. The middle slice of each chunk of the annotated scan is
  the only example for that chunk of the query. So the organ's extent in the query is given.
* **EP2** (Hansen et al. 2022): one chunk, so the middle slice is the example for all of the organ.
* Both take one organ at a time and count its slices only; a scan's Dice is that of the voxels of
  all of them together, not a mean over slices.
* **Whole volume**: every slice counts, nothing about the query is given, all organs at once.
* **Folds** (Ouyang et al.): consecutive blocks of the data set. The scan after a block, the first
  after the last, is tested with it, and training reads none of them.

Masks and label maps are ``[n, h, w]`` in canonical orientation, slices first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from fastproto.errors import require

CHUNKS = {"ep1": 3, "ep2": 1}

SliceSegmenter = Callable[[int, Sequence[int]], np.ndarray]
"""From a slice of the annotated scan and n slices of the query to their masks, ``[n, h, w]``."""


def folds(cases: Sequence[str], number: int) -> list[list[str]]:
    """The cases to test in each fold, of all cases in the data set's order.

    Raises:
        ArgumentError: Fewer than two folds, or more than cases.
    """
    allowed = f"2 to {len(cases)}, the number of cases"
    require(2 <= number <= len(cases), "folds", found=str(number), allowed=allowed)
    borders = [len(cases) * fold // number for fold in range(number + 1)]
    return [
        [*cases[first:last], cases[last % len(cases)]]
        for first, last in itertools.pairwise(borders)
    ]


def support_slices(annotated: np.ndarray, chunks: int) -> list[int]:
    """The middle slice of each of ``chunks`` equal parts of the slices that show the organ.

    With fewer slices than chunks, a slice stands for several. ``annotated`` is not empty.
    """
    slices = np.flatnonzero(annotated.any(axis=(1, 2)))
    return [int(slices[int((part + 0.5) * len(slices) / chunks)]) for part in range(chunks)]


def counted_slices(truth: np.ndarray, z_margin: int | None = 0) -> np.ndarray:
    """Numbers of the slices that count: the organ's extent and ``z_margin`` beyond; None for all.

    Nothing counts where the organ is absent and a margin is given.
    """
    if z_margin is None:
        return np.arange(len(truth))
    hit = np.flatnonzero(truth.any(axis=(1, 2)))
    if not hit.size:
        return hit
    return np.arange(max(hit[0] - z_margin, 0), min(hit[-1] + z_margin + 1, len(truth)))


def query_chunks(truth: np.ndarray, numbers: np.ndarray, chunks: int) -> np.ndarray:
    """Which chunk each slice of the query belongs to, by the organ's extent in it.

    Slices beyond the extent belong to the nearest chunk; a single slice is in the middle one.
    """
    hit = np.flatnonzero(truth.any(axis=(1, 2)))
    length = hit[-1] - hit[0] if hit.size else 0
    if length == 0:
        return np.full(len(numbers), chunks // 2)
    return ((numbers - hit[0]) * chunks // length).clip(0, chunks - 1)


def episodic_dice(
    annotated: np.ndarray,
    truth: np.ndarray,
    segment: SliceSegmenter,
    *,
    chunks: int,
    z_margin: int | None = 0,
    ignored: np.ndarray | None = None,
) -> float:
    """Dice of one organ in one query by EP1 (three chunks) or EP2 (one).

    Args:
        annotated: ``[n, h, w]`` bool, the organ in the annotated scan, not empty.
        truth: ``[m, i, j]`` bool, the organ in the query.
        segment: Segments slices of the query from one slice of the annotated scan.
        chunks: See ``CHUNKS``.
        z_margin: Which slices count, see `counted_slices`.
        ignored: ``[m, i, j]`` bool, voxels of the query that do not count; None for none.

    Returns:
        0 to 1; NaN where neither shows the organ in a slice that counts.
    """
    numbers = counted_slices(truth, z_margin)
    part = query_chunks(truth, numbers, chunks)
    both = either = 0
    for index, support in enumerate(support_slices(annotated, chunks)):
        own = numbers[part == index]
        if own.size:
            found, real = segment(support, own.tolist()), truth[own]
            if ignored is not None:
                found = found & ~ignored[own]
            both += np.count_nonzero(found & real)
            either += np.count_nonzero(found) + np.count_nonzero(real)
    return 2 * both / either if either else float("nan")
