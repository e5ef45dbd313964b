# SPDX-License-Identifier: Apache-2.0
"""Episodes: small few-shot tasks drawn from labels or from superpixels.

An episode is a pure function of (seed, index): nothing is remembered from one to the next, so a
resumed run needs no loader state and any episode can be made again from a log line.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fastproto.errors import ArgumentError, DatasetError, LabelError
from fastproto.training.augment import Augmentation, AugmentParams, augment_batch
from fastproto.training.slices import CaseSlices, SliceStore

__all__ = [
    "Episode",
    "EpisodeSource",
    "LabelEpisodes",
    "MixedEpisodes",
    "SliceStore",
    "SuperpixelEpisodes",
]

T = TypeVar("T")

_ATTEMPTS = 100  # slices looked at for a superpixel before giving up
_LINK_IOU = 0.5  # overlap above which superpixels of neighbouring slices are one supervoxel


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


@dataclass(frozen=True)
class Draw:
    """One episode before augmentation: support slices first, then query slices.

    Attributes:
        images: [S + Q, H, W] floating point.
        labels: [S + Q, H, W] integers, already renumbered 0..ways.
        description: Where the slices are from.
    """

    images: Tensor
    labels: Tensor
    description: str


class EpisodeSource(ABC):
    """Draws episodes, augments them in one batch, and puts them on a device.

    Args:
        seed: First half of what an episode is a function of.
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
            if self.augmentation is not None:
                params.append(self.augmentation.draw(generator, *drawn.images.shape))
        images = torch.cat([drawn.images for drawn in draws])[:, None].to(self.device)
        labels = torch.cat([drawn.labels for drawn in draws]).to(self.device)
        if self.augmentation is None:
            images, labels = images.float(), labels.long()
        else:
            images, labels = augment_batch(images, labels, AugmentParams.cat(params))
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
        shots: int = 1,
        ways: int = 1,
        queries: int = 1,
        augmentation: Augmentation | None = None,
        device: torch.device | str = "cpu",
    ):
        super().__init__(
            seed, shots=shots, ways=ways, queries=queries, augmentation=augmentation, device=device
        )
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
        first = _choice(self.classes, generator)
        support_case = _choice(self._holders[first], generator)
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
        query_case = _choice(candidates, generator) if candidates else support_case
        present = [label for label in chosen if label in self._positions[query_case]]
        query = []
        for i in range(self.queries):
            label = present[i % len(present)]
            slices = self._positions[query_case][label]
            if query_case == support_case:
                slices = [s for s in slices if s not in support] or slices
            jitter = (float(torch.rand(1, generator=generator)) - 0.5) / 3
            query.append(_at(_choice(centres[label], generator) + jitter, slices))

        picked = [(self.store.cases[support_case], s) for s in support]
        picked += [(self.store.cases[query_case], s) for s in query]
        labels = torch.stack([_label_map(case, position) for case, position in picked])
        return Draw(
            images=torch.stack([case.images[position] for case, position in picked]),
            labels=_renumber(labels, chosen),
            description=(
                f"class {', '.join(self._name(label) for label in chosen)}, "
                f"support {_where(self.store.cases[support_case], support)}, "
                f"query {_where(self.store.cases[query_case], query)}"
            ),
        )

    def _name(self, label: int) -> str:
        return f"{label} ({self.names[label]})" if label in self.names else str(label)


class SuperpixelEpisodes(EpisodeSource):
    """Episodes without labels: the foregrounds are superpixels, everything else is background.

    A slice is drawn uniformly from all, then ``ways`` of its superpixels. A slice with fewer of
    them (no body in it, or no link to the neighbour) is passed over and another is drawn.

    With ``source="slice"``, support and query are that one slice under different augmentations.
    With ``source="neighbours"``, the support is that slice and the query a neighbouring one (z + 1
    or z - 1): a superpixel counts when a superpixel of the neighbour overlaps it with an
    intersection over union above 0.5, and that one is its label there. This stands in for
    3-D supervoxels: links reach one slice far and are not transitive.

    Args:
        store: Slices; labels are not looked at.
        seed: See ``EpisodeSource``.
        source: "slice" or "neighbours".
        shots: See ``EpisodeSource``, as the remaining options.

    Raises:
        ArgumentError: An unknown source.
        DatasetError: From ``draw``: 100 slices in a row without superpixels enough.
    """

    def __init__(
        self,
        store: SliceStore,
        seed: int,
        *,
        source: str = "slice",
        shots: int = 1,
        ways: int = 1,
        queries: int = 1,
        augmentation: Augmentation | None = None,
        device: torch.device | str = "cpu",
    ):
        super().__init__(
            seed, shots=shots, ways=ways, queries=queries, augmentation=augmentation, device=device
        )
        if source not in ("slice", "neighbours"):
            raise ArgumentError("source", found=repr(source), allowed="slice or neighbours")
        self.store = store
        self.source = source
        self._slices = [(case, i) for case in store.cases for i in range(len(case.numbers))]

    def draw(self, generator: torch.Generator) -> Draw:
        """See ``EpisodeSource.draw``."""
        for _ in range(_ATTEMPTS):
            case, position = _choice(self._slices, generator)
            other = position
            if self.source == "neighbours":
                other += 2 * int(torch.randint(2, (1,), generator=generator)) - 1
                if not _adjacent(case, position, other):
                    continue
            support, query = case.superpixels(position), case.superpixels(other)
            links = _links(support, query)
            if len(links) >= self.ways:
                break
        else:
            raise DatasetError(
                "superpixels",
                found=f"{_ATTEMPTS} slices in a row with fewer than {self.ways} to draw",
                allowed="slices with body in them",
                fix="Use fewer ways, source 'slice', or train on labels.",
            )
        order = torch.randperm(len(links), generator=generator)[: self.ways].tolist()
        chosen = [links[i] for i in order]
        shots = self.shots * self.ways
        support_labels = _renumber(support, [pair[0] for pair in chosen])
        query_labels = _renumber(query, [pair[1] for pair in chosen])
        return Draw(
            images=torch.stack(
                [case.images[position]] * shots + [case.images[other]] * self.queries
            ),
            labels=torch.stack([support_labels] * shots + [query_labels] * self.queries),
            description=(
                f"superpixel {', '.join(str(pair[0]) for pair in chosen)}, "
                f"support {_where(case, [position])}, query {_where(case, [other])}"
            ),
        )


class MixedEpisodes(EpisodeSource):
    """Each episode from one of two sources, the second with a given probability.

    Args:
        first: The usual source; its seed, sizes, augmentation and device are taken over.
        second: The other one, with the same shots, ways and queries.
        fraction: Probability of ``second``, 0 to 1.
    """

    def __init__(self, first: EpisodeSource, second: EpisodeSource, fraction: float):
        super().__init__(
            first.seed,
            shots=first.shots,
            ways=first.ways,
            queries=first.queries,
            augmentation=first.augmentation,
            device=first.device,
        )
        self.first = first
        self.second = second
        self.fraction = fraction

    def draw(self, generator: torch.Generator) -> Draw:
        """See ``EpisodeSource.draw``."""
        other = float(torch.rand(1, generator=generator)) < self.fraction
        return (self.second if other else self.first).draw(generator)


def episode_generator(seed: int, index: int) -> torch.Generator:
    """The CPU generator of episode ``index``; hashed, so that neighbours share nothing."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def _choice(items: Sequence[T], generator: torch.Generator) -> T:
    return items[int(torch.randint(len(items), (1,), generator=generator))]


def _at(centre: float, slices: Sequence[int]) -> int:
    """The slice at a relative position in the extent, 0 to 1; beyond it the first or last."""
    return slices[min(max(int(centre * len(slices)), 0), len(slices) - 1)]


def _label_map(case: CaseSlices, position: int) -> Tensor:
    assert case.labels is not None
    return case.labels[position]


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


def _adjacent(case: CaseSlices, position: int, other: int) -> bool:
    """Whether two positions exist and are neighbouring slices of the volume."""
    if not 0 <= other < len(case.numbers):
        return False
    return abs(case.numbers[position] - case.numbers[other]) == 1


def _links(first: Tensor, second: Tensor) -> list[tuple[int, int]]:
    """Pairs of superpixels of two slices that are one piece of tissue."""
    rows, columns = int(first.max()) + 1, int(second.max()) + 1
    if first is second:
        return [(number, number) for number in range(1, rows)]
    pair = first.flatten().long() * columns + second.flatten()
    joint = torch.bincount(pair, minlength=rows * columns).view(rows, columns)
    union = joint.sum(1, keepdim=True) + joint.sum(0, keepdim=True) - joint
    linked = (joint > _LINK_IOU * union)[1:, 1:]
    return [(row + 1, column + 1) for row, column in linked.nonzero().tolist()]


def _where(case: CaseSlices, positions: Sequence[int]) -> str:
    return f"{case.id} slice {', '.join(str(case.numbers[p]) for p in positions)}"
