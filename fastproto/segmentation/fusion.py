# SPDX-License-Identifier: Apache-2.0
"""How what the network sees, an organ's place and several annotated scans become one claim."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastproto.segmentation.task import Organ, Task


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


@dataclass(frozen=True)
class Fusion:
    """How the network's evidence and the prior's make one decision; chosen on training patients.

    Args:
        network, prior: Factors of their log odds; 0 leaves one out.
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
        # Beside the prior the network counts by the odds of its Dice in slices left out: by 1/2 at
        # 0.8, by 1/8 at 0.5; by 1/4 where none could be left out.
        dice, trust = organ.expected_dice, self.network
        if self.prior:
            trust *= 0.25 if dice is None else min(dice / max(1 - dice, 1e-6) / 8, 1.5)
        return trust * (scores + organ.bias) + self.prior * place


FUSIONS = {"box": Fusion(blur=0.5), "affine": Fusion(blur=0.25), "deformable": Fusion(blur=0.12)}
"""By the kind of the prior; the sharper its place, the steeper its odds."""


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


def weigh(task: Task, found: Sequence[Evidence], fusion: Fusion) -> list[Claim]:
    """What the evidence for every organ of a task adds up to."""
    return [
        Claim(organ.value, box, fusion(scores, distance, organ), scores + organ.bias)
        for organ, (box, scores, distance) in zip(task.organs, found, strict=True)
    ]


def average(claims: Iterable[Claim]) -> list[Claim]:
    """Mean log odds of every organ over the tasks that know it.

    Where a task did not look, its log odds are the lowest that its prior gives.
    """
    by_value: dict[int, list[Claim]] = {}
    for claim in claims:
        by_value.setdefault(claim.value, []).append(claim)
    result = []
    for value, known in by_value.items():
        if len(known) == 1:
            result += known
            continue
        box = tuple(
            slice(min(side.start for side in sides), max(side.stop for side in sides))
            for sides in zip(*(claim.box for claim in known), strict=True)
        )
        total = torch.zeros(2, *(side.stop - side.start for side in box))
        for claim in known:
            whole = torch.full_like(total, -Fusion.limit)
            inner = tuple(
                slice(own.start - side.start, own.stop - side.start)
                for own, side in zip(claim.box, box, strict=True)
            )
            whole[0][inner], whole[1][inner] = claim.odds, claim.network
            total += whole
        result.append(Claim(value, box, *total / len(known)))
    return result
