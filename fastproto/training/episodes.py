# SPDX-License-Identifier: Apache-2.0
"""Episodes: small few-shot tasks drawn from labels or from supervoxels.

An episode is a pure function of (seed, index): nothing is remembered from one to the next, so a
resumed run needs no loader state and any episode can be made again from a log line.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastproto.errors import ArgumentError, DatasetError, LabelError
from fastproto.training.augment import Augmentation, AugmentParams, Cut, cut_batch
from fastproto.training.slices import CaseSlices, SliceStore

__all__ = [
    "Episode",
    "EpisodeSource",
    "LabelEpisodes",
    "MixedEpisodes",
    "SliceStore",
    "SupervoxelEpisodes",
]

T = TypeVar("T")

_ATTEMPTS = 1000  # slices looked at for supervoxels before giving up
_LARGE = 0.3  # share of a supervoxel's largest cross-section that a slice must show
_COMPACT = 0.7  # see _compactness; 0.9 for a square of 10 pixels
_WIDTHS = (2.0, 8.0)  # sides of the field of view in diameters of the foreground
_SMALLEST = 24  # pixels of the stored slice along the smallest field of view
_NUDGE = 0.1  # how far the fields of view of one episode lie apart, in sides


@dataclass
class Episode:
    """A batch of E few-shot tasks on the device that trains.

    Attributes:
        support_images: [E, S, 3, H, W] float32, three equal channels.
        support_masks: [E, S, H, W] int64, 0 = background, 1..num_classes - 1.
        query_images: [E, Q, 3, H, W] float32.
        query_masks: [E, Q, H, W] int64.
        num_classes: Classes, background included.
        description: Where the slices are from.
    """

    support_images: Tensor
    support_masks: Tensor
    query_images: Tensor
    query_masks: Tensor
    num_classes: int
    description: str

    def to(self, device: torch.device) -> Episode:
        """The same on another device; from pinned memory without waiting for it."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Episode:
        """The same in memory that a GPU reads by itself."""
        return self._moved(Tensor.pin_memory)

    def clone(self) -> Episode:
        """The same in memory of its own."""
        return self._moved(Tensor.clone)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Episode:
        moved: dict[str, Any] = {name: move(value) for name, value in self.tensors().items()}
        return replace(self, **moved)


@dataclass(frozen=True)
class Draw:
    """One episode before augmentation: support slices first, then query slices.

    Attributes:
        cuts: S + Q fields of view, labels already renumbered 0..ways.
        description: Where the slices are from.
    """

    cuts: list[Cut]
    description: str


class EpisodeSource(ABC):
    """Draws episodes, augments them in one batch, and puts them on a device.

    Args:
        seed: First half of what an episode is a function of.
        size: Side of the network's images in pixels.
        shots: Support slices of each foreground class; an episode has ``shots * ways``.
        ways: Foreground classes.
        queries: Query slices.
        augmentation: Ranges of the random changes, each slice with its own; None for none.
        device: Where the augmentation runs and the tensors end.
    """

    def __init__(
        self,
        seed: int,
        *,
        size: int,
        shots: int = 1,
        ways: int = 1,
        queries: int = 1,
        augmentation: Augmentation | None = None,
        device: torch.device | str = "cpu",
    ):
        for name, value in (("shots", shots), ("ways", ways), ("queries", queries)):
            if value < 1:
                raise ArgumentError(name, found=repr(value), allowed="an integer of at least 1")
        self.seed = seed
        self.size = size
        self.shots = shots
        self.ways = ways
        self.queries = queries
        self.augmentation = augmentation
        self.device = torch.device(device)

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Draw:
        """Choose slices and classes of one episode with the numbers of ``generator``."""

    def episode(self, index: int) -> Episode:
        """Episode ``index``, with E = 1."""
        return self.batch([index])

    def batch(self, indices: Sequence[int]) -> Episode:
        """Several episodes as one, augmented together."""
        draws, params = [], []
        for index in indices:
            generator = episode_generator(self.seed, index)
            drawn = self.draw(generator)
            draws.append(drawn)
            params.append(
                AugmentParams.identity(len(drawn.cuts))
                if self.augmentation is None
                else self.augmentation.draw(generator, len(drawn.cuts), self.size, self.size)
            )
        cuts = [cut for drawn in draws for cut in drawn.cuts]
        images, labels = cut_batch(cuts, self.size, AugmentParams.cat(params), self.device)
        images = images.repeat(1, 3, 1, 1).unflatten(0, (len(draws), -1))
        labels = labels.unflatten(0, (len(draws), -1))
        support = self.shots * self.ways
        return Episode(
            support_images=images[:, :support],
            support_masks=labels[:, :support],
            query_images=images[:, support:],
            query_masks=labels[:, support:],
            num_classes=self.ways + 1,
            description="; ".join(
                f"episode {index}: {drawn.description}"
                for index, drawn in zip(indices, draws, strict=True)
            ),
        )


class LabelEpisodes(EpisodeSource):
    """Episodes whose foregrounds are labelled base classes.

    A class is drawn first, then the support patient among those that have it (with more ways: that
    have at least ``ways`` classes, from which the others are drawn). The query patient is another
    one that has the first class; where there is no other, the query slices are slices of the same
    patient that are not in the support.

    A patient's slices of a class are ordered along the class's extent, as a position from 0 to 1.
    The support slices of a class lie one in each of ``shots`` equal parts of it. A query slice lies
    within 1/6 of the position of one of the support slices, which is how far the three-chunk
    evaluation protocol lets them be apart. With more ways, the query slices take in turn the
    classes that the query patient has.

    Args:
        store: Slices with labels.
        classes: Label numbers that may be foreground. Those without slices enough for a support and
            a query are left out; ``self.classes`` has the rest.
        seed: See ``EpisodeSource``.
        excluded: Held-out label numbers, checked to be no foreground. All labels that are not
            foreground in an episode are background; to drop slices with held-out classes
            altogether, build the store with ``without=excluded``.
        names: Label names for the description.
        min_pixels: Pixels a class must cover for a slice to count as one of its slices.
        shots: See ``EpisodeSource``, as the remaining options.

    Raises:
        ArgumentError: A class that is both base and held out, or more ways than any patient has.
        LabelError: No class has slices enough.
    """

    def __init__(
        self,
        store: SliceStore,
        classes: Sequence[int],
        seed: int,
        *,
        excluded: Collection[int] = (),
        names: Mapping[int, str] | None = None,
        min_pixels: int = 30,
        **options: Any,
    ):
        super().__init__(seed, **options)
        shots, ways = self.shots, self.ways
        both = sorted(set(classes) & set(excluded))
        if both or 0 in classes:
            raise ArgumentError(
                "classes", found=f"{both or 0}", allowed="foreground labels that are not held out"
            )
        self.store = store
        self.names = dict(names or {})
        # positions[case][label]: the case's slices of that class, in order
        self._positions = [_positions_of(case, classes, min_pixels) for case in store.cases]
        holders = {
            label: [case for case, held in enumerate(self._positions) if label in held]
            for label in sorted(set(classes))
        }
        usable = {
            label
            for label, cases in holders.items()
            if len(cases) > 1 or (cases and len(self._positions[cases[0]][label]) > shots)
        }
        if not usable:
            raise LabelError(
                "classes",
                found=f"none of {sorted(set(classes))} with {min_pixels} pixels in slices enough",
                allowed=f"a class in two patients, or in {shots + 1} slices of one",
                fix="Choose other classes or cases, or lower min_pixels.",
            )
        self._positions = [
            {label: found for label, found in held.items() if label in usable}
            for held in self._positions
        ]
        self._holders = {
            label: [case for case in holders[label] if len(self._positions[case]) >= ways]
            for label in sorted(usable)
        }
        self.classes = [label for label, cases in self._holders.items() if cases]
        self._query_holders = {label: holders[label] for label in self.classes}
        if not self.classes:
            raise ArgumentError(
                "ways",
                found=str(ways),
                allowed=f"at most {max(map(len, self._positions))}, the classes of one patient",
            )

    def draw(self, generator: torch.Generator) -> Draw:
        """See ``EpisodeSource.draw``."""
        first = choice(self.classes, generator)
        support_case = choice(self._holders[first], generator)
        others = [label for label in self._positions[support_case] if label != first]
        order = torch.randperm(len(others), generator=generator)[: self.ways - 1].tolist()
        chosen = [first, *(others[i] for i in order)]

        support: list[int] = []
        centres: dict[int, list[float]] = {}
        for label in chosen:
            slices = self._positions[support_case][label]
            parts = torch.arange(self.shots) + torch.rand(self.shots, generator=generator)
            centres[label] = (parts / self.shots).tolist()
            support += [_at(centre, slices) for centre in centres[label]]

        candidates = [case for case in self._query_holders[first] if case != support_case]
        query_case = choice(candidates, generator) if candidates else support_case
        present = [label for label in chosen if label in self._positions[query_case]]
        query = []
        for i in range(self.queries):
            label = present[i % len(present)]
            slices = self._positions[query_case][label]
            if query_case == support_case:
                slices = [s for s in slices if s not in support] or slices
            jitter = (float(torch.rand(1, generator=generator)) - 0.5) / 3
            query.append(_at(choice(centres[label], generator) + jitter, slices))

        picked = [(self.store.cases[support_case], s) for s in support]
        picked += [(self.store.cases[query_case], s) for s in query]
        cuts: list[Cut] = []
        for case, position in picked:
            assert case.labels is not None
            label = _renumber(case.labels[position], chosen)
            centre, own = field_of_view(case, label, generator)
            side = cuts[0].side if cuts else own  # one scale an episode, the first slice's
            cuts.append(_cut(case, position, label, _nudge(case, centre, side, generator), side))
        return Draw(
            cuts,
            f"class {', '.join(self._name(label) for label in chosen)}, "
            f"support {_where(self.store.cases[support_case], support)}, "
            f"query {_where(self.store.cases[query_case], query)}",
        )

    def _name(self, label: int) -> str:
        return f"{label} ({self.names[label]})" if label in self.names else str(label)


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
            others = []
            if self.ways > 1:
                here = np.flatnonzero(areas[position]).tolist()
                others = [
                    n for n in here if n not in (0, first) and position in _large(areas[:, n])
                ]
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
        support = [position]
        while len(support) < self.shots * self.ways:
            support.append(choice(near or seen, generator))
        query = []
        for _ in range(self.queries):
            absent, same = torch.rand(2, generator=generator).tolist()
            if absent < self.absent:
                query.append(int(torch.randint(len(case), (1,), generator=generator)))
            elif same < self.same_slice or not near:
                query.append(position)
            else:
                query.append(choice(near, generator))

        labels = [_renumber(case.region(scale, p), chosen) for p in (*support, *query)]
        centre, side = field_of_view(case, labels[0], generator)
        return Draw(
            [
                _cut(case, p, label, _nudge(case, centre, side, generator), side)
                for p, label in zip((*support, *query), labels, strict=True)
            ],
            f"supervoxel {', '.join(map(str, chosen))} of {scale}, "
            f"support {_where(case, support)}, query {_where(case, query)}",
        )


class MixedEpisodes(EpisodeSource):
    """Each episode from one of several sources, drawn by weight.

    Args:
        sources: Sources of the same seed, sizes, augmentation and device.
        weights: How often each is drawn, in any unit.
    """

    def __init__(self, sources: Sequence[EpisodeSource], weights: Sequence[float]):
        first = sources[0]
        super().__init__(
            first.seed,
            size=first.size,
            shots=first.shots,
            ways=first.ways,
            queries=first.queries,
            augmentation=first.augmentation,
            device=first.device,
        )
        self.sources = list(sources)
        self.weights = torch.tensor(weights, dtype=torch.float32)

    def draw(self, generator: torch.Generator) -> Draw:
        """See ``EpisodeSource.draw``."""
        chosen = int(torch.multinomial(self.weights, 1, generator=generator))
        return self.sources[chosen].draw(generator)


def episode_generator(seed: int, index: int) -> torch.Generator:
    """The CPU generator of episode ``index``; hashed, so that neighbours share nothing."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def choice(items: Sequence[T], generator: torch.Generator) -> T:
    """One of ``items``, drawn uniformly."""
    return items[int(torch.randint(len(items), (1,), generator=generator))]


def _at(centre: float, slices: Sequence[int]) -> int:
    """The slice at a relative position in the extent, 0 to 1; beyond it the first or last."""
    return slices[min(max(int(centre * len(slices)), 0), len(slices) - 1)]


def field_of_view(
    case: CaseSlices, label: Tensor, generator: torch.Generator
) -> tuple[tuple[float, float], float]:
    """A field of view around the foreground of a stored slice: its centre and its side in mm.

    Its side is two to eight diameters of the foreground (of the disc of its area), at most a tenth
    more than the slice; its centre lies up to a quarter of the side from the foreground's.
    """
    row, column = case.spacing[1:]
    inside = label.nonzero().float() + 0.5
    diameter = 2 * math.sqrt(max(len(inside), 1) * row * column / math.pi)
    draw = torch.rand(3, generator=generator).tolist()
    side = diameter * _WIDTHS[0] * (_WIDTHS[1] / _WIDTHS[0]) ** draw[0]
    side = min(max(side, _SMALLEST * max(row, column)), 1.1 * max(case.extent))
    middle = inside.mean(dim=0).tolist() if len(inside) else [n / 2 for n in label.shape]
    middle = [place * spacing for place, spacing in zip(middle, (row, column), strict=True)]
    return (
        middle[0] + (draw[1] - 0.5) / 2 * side,
        middle[1] + (draw[2] - 0.5) / 2 * side,
    ), side


def _nudge(
    case: CaseSlices, centre: tuple[float, float], side: float, generator: torch.Generator
) -> tuple[float, float]:
    """A centre near the given one, such that as little of the field as can be leaves the slice."""
    moved = []
    draw = torch.rand(2, generator=generator).tolist()
    for place, extent, random in zip(centre, case.extent, draw, strict=True):
        low, high = sorted((side / 2, extent - side / 2))
        moved.append(min(max(place + (2 * random - 1) * _NUDGE * side, low), high))
    return moved[0], moved[1]


def _cut(
    case: CaseSlices, position: int, label: Tensor, centre: tuple[float, float], side: float
) -> Cut:
    if case.upside_down:
        centre = case.extent[0] - centre[0], centre[1]
    image, label = case.upright(case.images[position]), case.upright(label)
    return Cut(image, label, case.extent, centre, side)


def _compactness(mask: Tensor) -> float:
    """Share of a mask's pixels whose neighbour to the right, or below, is in it too: near 1 for a
    piece as organs are, far lower for scattered pixels.
    """
    pairs = (mask[1:] & mask[:-1]).sum() + (mask[:, 1:] & mask[:, :-1]).sum()
    return float(pairs) / (2 * float(mask.sum()))


def _large(pixels: np.ndarray) -> list[int]:
    """The positions at which a supervoxel shows a large part of its largest cross-section."""
    return np.flatnonzero(pixels >= max(_LARGE * pixels.max(), 1)).tolist()


def _positions_of(
    case: CaseSlices, classes: Sequence[int], min_pixels: int
) -> dict[int, list[int]]:
    """Where in the case each class covers at least ``min_pixels``."""
    if case.labels is None:
        raise DatasetError(
            f"case {case.id}", found="slices without labels", allowed="a store with labels"
        )
    size = max(int(case.labels.max()), *classes) + 1
    counts = torch.stack([torch.bincount(s.flatten().int(), minlength=size) for s in case.labels])
    positions = {
        label: (counts[:, label] >= min_pixels).nonzero().flatten().tolist() for label in classes
    }
    return {label: found for label, found in sorted(positions.items()) if found}


def _renumber(labels: Tensor, chosen: Sequence[int]) -> Tensor:
    """``chosen[i]`` becomes i + 1 and everything else 0."""
    result = torch.zeros_like(labels, dtype=torch.uint8)
    for number, label in enumerate(chosen, start=1):
        result[labels == label] = number
    return result


def _where(case: CaseSlices, positions: Sequence[int]) -> str:
    return f"{case.id} slice {', '.join(str(case.numbers[p]) for p in positions)}"
