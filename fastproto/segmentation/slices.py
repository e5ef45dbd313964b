# SPDX-License-Identifier: Apache-2.0
"""Which slices of an annotated scan teach an organ, and which of them check what the others taught.

Whoever wants other slices changes this file alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fastproto.errors import require
from fastproto.segmentation.adapt import AnnotatedOrgan

AROUND = 2  # slices beyond either end of an organ that show what it ends in
LEFT_OUT = 3  # every third of the chosen slices checks what the others taught


def choose(
    masks: Tensor, name: str, wanted: int | Sequence[int], shown: Tensor | None = None
) -> tuple[int, ...]:
    """Numbers of the slices to learn the organ ``name`` from, ascending.

    ``masks`` is ``[n, S, S]`` bool, the organ in every slice; it is in some of them. ``wanted`` is
    how many, spread evenly over the organ, to which those beyond its ends come; or their numbers.
    Slices of which no pixel counts, as ``shown`` [n] says, are passed over.

    Raises:
        ArgumentError: Numbers that do not exist, or none of which shows the organ.
    """
    present = masks.flatten(1).any(dim=1).numpy()
    occupied = np.flatnonzero(present)
    if isinstance(wanted, int):
        chosen = spread(occupied, wanted)
        step = max(1, round(len(occupied) / len(chosen)))
        numbers = np.arange(len(masks)) if shown is None else np.flatnonzero(shown)
        first, last = np.searchsorted(numbers, occupied[[0, -1]])
        for way in range(step, AROUND * step + 1, step):
            beyond = [first - way, last + way]
            chosen += [int(numbers[place]) for place in beyond if 0 <= place < len(numbers)]
    else:
        chosen = [int(number) for number in wanted]
        fits = chosen and 0 <= min(chosen) <= max(chosen) < len(masks) and present[chosen].any()
        allowed = f"0 to {len(masks) - 1}, and some of those with {name!r} among them: "
        allowed += ", ".join(map(str, occupied))
        require(fits, "slices", found=", ".join(map(str, chosen)), allowed=allowed)
    return tuple(sorted(set(chosen)))


def spread(slices: np.ndarray, number: int) -> list[int]:
    """The middles of ``number`` equal parts of ``slices``, or all of them if there are fewer."""
    middles = (int((part + 0.5) * len(slices) / number) for part in range(number))
    return sorted({int(slices[middle]) for middle in middles})


def split(organ: AnnotatedOrgan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The slices that teach, and those of the organ's inside that are left out to check it."""
    left_out = organ.inside[1:-1:LEFT_OUT] if len(organ.inside) >= 4 else []
    return tuple(n for n in organ.slices if n not in left_out), tuple(left_out)
