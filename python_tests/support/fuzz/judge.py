# SPDX-License-Identifier: Apache-2.0
"""Whether fastproto's reading of a case is right: refused by an error of our own, or equal."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastproto.data import Volume, read_volume
from fastproto.errors import InputError, ResourceError
from support.fuzz.mutate import Case, Rng

# No corner further apart than this part of the smallest voxel side: axes that are sheared by
# rounding (up to 1e-3) may be mended.
_GRID_TOLERANCE = 0.02
_SPACING_TOLERANCE = 0.002
_VALUE_TOLERANCE = 1e-6  # a float32 result of a scaling, and what cancels in it
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class Unreadable(Exception):
    """The independent reader cannot use the file. Whoever reads it all the same must say why."""


class Unverified(Exception):
    """The file says something valid of which the independent reader makes nothing."""


@dataclass
class Reading:
    """What the independent reader makes of a file.

    Args:
        array: [x, y, z], scaled.
        affine: 4 x 4, voxel index -> mm in RAS.
        intercept: Largest number that was added to the stored values, for rounding.
        assumed: What the file leaves open, where it does. Reading it without a warning is wrong.
    """

    array: np.ndarray
    affine: np.ndarray
    intercept: float = 0.0
    assumed: list[str] = field(default_factory=list)


class Format(NamedTuple):
    """How the cases of a format are made, read by others, and by fastproto."""

    make: Callable[[Rng], Case]
    read: Callable[[Path], Reading]
    ours: Callable[[Path], Volume] = read_volume


class Verdict(NamedTuple):
    """Kind: those of ``RIGHT``, everything else is a failure."""

    kind: str
    why: str = ""


RIGHT = ("refused", "equal", "unverified")


def judge(case: Case, format_: Format, folder: Path) -> Verdict:
    """Read the files of a case, which lie in ``folder``, twice."""
    path = folder / case.target
    said: list[str] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours = format_.ours(path)
        said = [str(item.message) for item in caught]
    except (InputError, ResourceError) as error:
        if case.done:
            return Verdict("refused")
        return Verdict("a good file refused", str(error))
    except Exception as error:
        return Verdict("foreign exception", f"{type(error).__name__}: {error}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = format_.read(path)
    except Unverified:
        return Verdict("unverified")
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        return Verdict("read what the other refuses", why[:300])
    if difference := compare(ours, theirs):
        return Verdict(difference.kind, f"{difference.why} {said}")
    if theirs.assumed and not said:
        return Verdict("no warning", "; ".join(theirs.assumed))
    return Verdict("equal")


def compare(ours: Volume, theirs: Reading) -> Verdict | None:
    """The first difference between two readings."""
    shape = ours.array.shape[::-1]
    if shape != theirs.array.shape:
        return Verdict("other size", f"{shape} for {theirs.array.shape}")
    axes = np.eye(4)
    axes[:3, :3] = np.reshape(ours.direction, (3, 3)) * ours.spacing
    axes[:3, 3] = ours.origin
    index = np.indices((2, 2, 2)).reshape(3, 8).T * (np.array(shape) - 1)
    index = np.column_stack([index, np.ones(8)])
    place, right = (index @ (affine.T) for affine in (LPS_TO_RAS @ axes, theirs.affine))
    apart = np.abs(place - right).max()
    spacing = np.linalg.norm(theirs.affine[:3, :3], axis=0)
    rounding = 1e-6 * np.abs(right).max()
    if not apart <= _GRID_TOLERANCE * spacing.min() + rounding:
        return Verdict("other place", f"corners lie {apart:.4g} mm apart")
    if not np.allclose(ours.spacing, spacing, rtol=_SPACING_TOLERANCE, atol=0):
        return Verdict("other spacing", f"{ours.spacing} for {spacing.tolist()}")
    values, expected = ours.array.transpose(2, 1, 0), theirs.array
    if values.dtype.kind != "f" and expected.dtype.kind != "f":
        wrong = values != expected
    else:
        values, expected = values.astype(np.float64), expected.astype(np.float64)
        with np.errstate(all="ignore"):
            slack = _VALUE_TOLERANCE * (np.abs(expected) + theirs.intercept) + 1e-37
            wrong = ~(np.abs(values - expected) <= slack)
    if not wrong.any():
        return None
    examples = f"{values[wrong][:3].tolist()} for {expected[wrong][:3].tolist()}"
    return Verdict("other values", f"{wrong.mean():.0%} of them, {examples}")
