# SPDX-License-Identifier: Apache-2.0
"""Episodes of annotated classes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from fastproto.errors import DatasetError, LabelError, require
from fastproto.training.augment import Cut
from fastproto.training.episodes.source import Draw, EpisodeSource, choice
from fastproto.training.episodes.views import cut, field_of_view, renumber, where
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
        ignore: A label whose pixels count nowhere: they are ``IGNORE`` in every episode.
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
        ignore: int | None = None,
        min_pixels: int = 30,
        **options: Any,
    ):
        super().__init__(seed, **options)
        both = sorted(set(classes) & set(excluded))
        require(
            not both and 0 not in classes and ignore not in classes,
            "classes",
            found=f"{both or [label for label in classes if label in (0, ignore)]}",
            allowed="foreground labels that are neither held out nor ignored",
        )
        self.ignore = ignore
        self.store = store
        self.names = dict(names or {})
        positions = [_positions_of(case, classes, min_pixels) for case in store.cases]
        wanted = sorted(set(classes))
        self._query_holders: dict[int, list[int]] = {}  # the cases that have a class
        for label in wanted:
            cases = [case for case, held in enumerate(positions) if label in held]
            if len(cases) > 1 or (cases and len(positions[cases[0]][label]) > self.shots):
                self._query_holders[label] = cases
        usable = self._query_holders.keys()
        require(
            usable,
            "classes",
            found=f"too few slices with {min_pixels} pixels of "
            + ", ".join(map(self._called, wanted)),
            allowed=f"a class in two patients, or in {self.shots + 1} slices of one",
            fix="Choose other classes or cases, or lower min_pixels.",
            error=LabelError,
        )
        # positions[case][label]: the case's slices of that class, in order
        self._positions = [{n: held[n] for n in held if n in usable} for held in positions]
        self._holders = {  # those of them that have classes enough
            label: [case for case in cases if len(self._positions[case]) >= self.ways]
            for label, cases in self._query_holders.items()
        }
        self.classes = [label for label, cases in self._holders.items() if cases]
        most = max(map(len, self._positions))
        allowed = f"at most {most}, the classes of one patient"
        require(self.ways <= most, "ways", found=str(self.ways), allowed=allowed)

    def draw(self, generator: torch.Generator) -> Draw:
        """See ``EpisodeSource.draw``."""
        first = choice(self.classes, generator)
        support_case = choice(self._holders[first], generator)
        others = [label for label in self._positions[support_case] if label != first]
        order = torch.randperm(len(others), generator=generator)[: self.ways - 1].tolist()
        chosen = [first, *(others[i] for i in order)]

        support: list[int] = []
        centres = {}
        for label in chosen:
            slices = self._positions[support_case][label]
            parts = torch.arange(self.shots) + torch.rand(self.shots, generator=generator)
            centres[label] = (parts / self.shots).tolist()
            support += [_nearest_slice(centre, slices) for centre in centres[label]]

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
            query.append(_nearest_slice(choice(centres[label], generator) + jitter, slices))

        taught, asked = self.store.cases[support_case], self.store.cases[query_case]
        cuts: list[Cut] = []
        for case, position in [(taught, s) for s in support] + [(asked, s) for s in query]:
            assert case.labels is not None
            label = renumber(case.labels[position], chosen, self.ignore)
            centre, own = field_of_view(case, label, generator)
            side = cuts[0].side if cuts else own  # one scale an episode, the first slice's
            cuts.append(cut(case, position, label, centre, side, generator))
        return Draw(
            cuts,
            f"class {', '.join(map(self._called, chosen))}, "
            f"support {where(taught, support)}, query {where(asked, query)}",
        )

    def _called(self, label: int) -> str:
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


def _nearest_slice(centre: float, slices: Sequence[int]) -> int:
    """The slice at a relative position in the extent, 0 to 1; beyond it the first or last."""
    return slices[min(max(int(centre * len(slices)), 0), len(slices) - 1)]
