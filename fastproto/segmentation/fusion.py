# SPDX-License-Identifier: Apache-2.0
"""How what the network sees, an organ's place and several annotated scans become one claim."""

from __future__ import annotations

from collections.abc import Sequence
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
        total = torch.zeros(2, *(side.stop - side.start for side in box))
        for claim in known:
            whole = torch.full_like(total, -Fusion.limit)
            inner = [slice(None)] + [
                slice(own.start - side.start, own.stop - side.start)
                for own, side in zip(claim.box, box, strict=True)
            ]
            whole[tuple(inner)] = torch.stack([claim.odds, claim.network])
            total += whole
        result.append(Claim(value, box, *total / len(known)))
    return result
