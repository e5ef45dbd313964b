# SPDX-License-Identifier: Apache-2.0
"""Episodes of pieces of tissue that nobody annotated."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastproto.errors import DatasetError
from fastproto.training.episodes.source import Draw, EpisodeSource, choice
from fastproto.training.episodes.views import cut, field_of_view, renumber, where
from fastproto.training.slices import SliceStore

_ATTEMPTS = 1000  # slices looked at for supervoxels before giving up
_LARGE = 0.3  # share of a supervoxel's largest cross-section that a slice must show
_COMPACT = 0.7  # see _compactness; 0.9 for a square of 10 pixels


class SupervoxelEpisodes(EpisodeSource):
    """Episodes without labels: the foregrounds are supervoxels, everything else is background.

    A scan, one of its planes, a scale and a supervoxel are drawn, each uniformly; then a support
    slice in which the supervoxel is large and, as organs are, no cloud of pixels; and a query slice
    at most two slices or 10 mm away. In a share of the episodes the query is any slice of the scan
    instead, mostly one without the supervoxel, and in a share of the others the support slice
    itself, which its own random changes make another. The field of view is two to eight times as
    wide as the supervoxel, so that pieces of every size are seen at every scale. With more ways,
    the other supervoxels are large in the same support slice.

    Args:
        store: Slices with ``regions``; labels are not looked at.
        seed: See ``EpisodeSource``.
        absent: Share of the episodes whose query is drawn from the whole scan, 0 to 1.
        same_slice: Share of the others whose query is the support slice, 0 to 1.
        planes: Draw coronal and sagittal slices too, where the voxels allow it.
        gap: Largest distance of support and query in mm; at least two slices are allowed.
        shots: See ``EpisodeSource``, as the remaining options.

    Raises:
        DatasetError: From ``draw``: no supervoxels enough in 1000 attempts.
    """

    def __init__(
        self,
        store: SliceStore,
        seed: int,
        *,
        absent: float = 0.25,
        same_slice: float = 0.5,
        planes: bool = True,
        gap: float = 10.0,
        **options: Any,
    ):
        super().__init__(seed, **options)
        self.store = store
        self.absent = absent
        self.same_slice = same_slice
        self.gap = gap
        # Planes of a case are drawn together, so that a case with three is not drawn more often.
        self._cases = [list(case.planes()) if planes else [case] for case in store.cases]

    def draw(self, generator: torch.Generator) -> Draw:
        """See ``EpisodeSource.draw``."""
        for _ in range(_ATTEMPTS):
            case = choice(choice(self._cases, generator), generator)
            scale = choice(range(len(case.areas)), generator)
            areas = case.areas[scale]
            count = areas.shape[1] - 1
            if count < self.ways:
                continue
            first = 1 + choice(range(count), generator)
            seen = _large(areas[:, first])
            if not seen:  # it lay in slices that were dropped
                continue
            position = choice(seen, generator)
            if _compactness(case.region(scale, position) == first) < _COMPACT:
                continue
            here = np.flatnonzero(areas[position]).tolist() if self.ways > 1 else []
            others = [n for n in here if n not in (0, first) and position in _large(areas[:, n])]
            if len(others) >= self.ways - 1:
                break
        else:
            raise DatasetError(
                "supervoxels",
                found=f"{_ATTEMPTS} slices in a row with fewer than {self.ways} to draw",
                allowed="slices with body in them",
                fix="Use fewer ways, or train on labels.",
            )
        order = torch.randperm(len(others), generator=generator)[: self.ways - 1].tolist()
        chosen = [first, *(others[i] for i in order)]
        reach = max(self.gap, 2.01 * case.spacing[0]) / case.spacing[0]
        near = [p for p in seen if 0 < abs(case.numbers[p] - case.numbers[position]) <= reach]
        more = self.shots * self.ways - 1
        support = [position, *(choice(near or seen, generator) for _ in range(more))]
        query = []
        for _ in range(self.queries):
            absent, same = torch.rand(2, generator=generator).tolist()
            if absent < self.absent:
                query.append(choice(range(len(case)), generator))
            elif same < self.same_slice or not near:
                query.append(position)
            else:
                query.append(choice(near, generator))

        pictures = [(p, renumber(case.region(scale, p), chosen)) for p in (*support, *query)]
        centre, side = field_of_view(case, pictures[0][1], generator)
        return Draw(
            [cut(case, p, label, centre, side, generator) for p, label in pictures],
            f"supervoxel {', '.join(map(str, chosen))} of {scale}, "
            f"support {where(case, support)}, query {where(case, query)}",
        )


def _compactness(mask: Tensor) -> float:
    """Share of a mask's pixels whose neighbour to the right, or below, is in it too: near 1 for a
    piece as organs are, far lower for scattered pixels.
    """
    pairs = (mask[1:] & mask[:-1]).sum() + (mask[:, 1:] & mask[:, :-1]).sum()
    return float(pairs) / (2 * float(mask.sum()))


def _large(pixels: np.ndarray) -> list[int]:
    """The positions at which a supervoxel shows a large part of its largest cross-section."""
    return np.flatnonzero(pixels >= max(_LARGE * pixels.max(), 1)).tolist()
