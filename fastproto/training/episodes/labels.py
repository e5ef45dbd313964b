# SPDX-License-Identifier: Apache-2.0
"""Episodes of annotated classes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from fastproto.errors import ArgumentError, DatasetError, LabelError
from fastproto.training.augment import Cut
from fastproto.training.episodes.source import Draw, EpisodeSource, choice
from fastproto.training.episodes.views import (
    cut,
    field_of_view,
    nearest_slice,
    nudge,
    renumber,
    where,
)
from fastproto.training.slices import CaseSlices, SliceStore


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
            support += [nearest_slice(centre, slices) for centre in centres[label]]

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
            query.append(nearest_slice(choice(centres[label], generator) + jitter, slices))

        picked = [(self.store.cases[support_case], s) for s in support]
        picked += [(self.store.cases[query_case], s) for s in query]
        cuts: list[Cut] = []
        for case, position in picked:
            assert case.labels is not None
            label = renumber(case.labels[position], chosen)
            centre, own = field_of_view(case, label, generator)
            side = cuts[0].side if cuts else own  # one scale an episode, the first slice's
            cuts.append(cut(case, position, label, nudge(case, centre, side, generator), side))
        return Draw(
            cuts,
            f"class {', '.join(self._name(label) for label in chosen)}, "
            f"support {where(self.store.cases[support_case], support)}, "
            f"query {where(self.store.cases[query_case], query)}",
        )

    def _name(self, label: int) -> str:
        return f"{label} ({self.names[label]})" if label in self.names else str(label)


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
