# SPDX-License-Identifier: Apache-2.0
"""Where an episode looks: fields of view around what is segmented, and slices near a place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastproto.defaults import IGNORE
from fastproto.training.augment import Cut
from fastproto.training.slices import CaseSlices

_WIDTHS = (2.0, 8.0)  # sides of the field of view in diameters of the foreground
_SMALLEST = 24  # pixels of the stored slice along the smallest field of view
_NUDGE = 0.1  # how far the fields of view of one episode lie apart, in sides


def field_of_view(
    case: CaseSlices, label: Tensor, generator: torch.Generator
) -> tuple[tuple[float, float], float]:
    """A field of view around the foreground of a stored slice: its centre and its side in mm.

    Its side is two to eight diameters of the foreground (of the disc of its area), at most a tenth
    more than the slice; its centre lies up to a quarter of the side from the foreground's.
    """
    row, column = case.spacing[1:]
    inside = (label > 0).nonzero().float() + 0.5
    diameter = 2 * math.sqrt(max(len(inside), 1) * row * column / math.pi)
    draw = torch.rand(3, generator=generator).tolist()
    side = diameter * _WIDTHS[0] * (_WIDTHS[1] / _WIDTHS[0]) ** draw[0]
    side = min(max(side, _SMALLEST * max(row, column)), 1.1 * max(case.extent))
    middle = inside.mean(dim=0).tolist() if len(inside) else [n / 2 for n in label.shape]
    down, right = ((random - 0.5) / 2 * side for random in draw[1:])
    return (middle[0] * row + down, middle[1] * column + right), side


def cut(
    case: CaseSlices,
    position: int,
    label: Tensor,
    centre: tuple[float, float],
    side: float,
    generator: torch.Generator,
) -> Cut:
    """A field of view near ``centre``, such that as little of it as can be leaves the slice."""
    moved = []
    draw = torch.rand(2, generator=generator).tolist()
    for place, extent, random in zip(centre, case.extent, draw, strict=True):
        low, high = sorted((side / 2, extent - side / 2))
        moved.append(min(max(place + (2 * random - 1) * _NUDGE * side, low), high))
    row, column = moved
    if case.upside_down:
        row = case.extent[0] - row
    image, label = case.upright(case.images[position]), case.upright(label)
    return Cut(image, label, case.extent, (row, column), side)


def renumber(labels: Tensor, chosen: Sequence[int], ignore: int | None = None) -> Tensor:
    """``chosen[i]`` becomes i + 1, the label ``ignore`` ``IGNORE`` and everything else 0."""
    result = torch.zeros_like(labels, dtype=torch.int8)
    for number, label in enumerate(chosen, start=1):
        result[labels == label] = number
    if ignore is not None:
        result[labels == ignore] = IGNORE
    return result


def where(case: CaseSlices, positions: Sequence[int]) -> str:
    return f"{case.id} slice {', '.join(str(case.numbers[p]) for p in positions)}"
