# SPDX-License-Identifier: Apache-2.0
"""A file that is made up, and damage that any format can suffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

Rng = np.random.Generator
T = TypeVar("T")
PRISTINE = 0.05  # of the cases stay whole, and must be read
STRUCTURED = 0.8  # of the damage knows the format; the rest is to bytes
DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8")


@dataclass
class Case:
    """Files to write and the one to read.

    Args:
        files: Name -> content, all in one folder.
        target: The file to read; "" for the folder.
        done: What was done to them, in words; nothing for a good file.
    """

    files: dict[str, bytes]
    target: str
    done: list[str] = field(default_factory=list)


def pick(rng: Rng, choices: Sequence[T]) -> T:
    """One of ``choices``, as it is: numpy's own choice would turn it into an array."""
    return choices[int(rng.integers(len(choices)))]


def rounds(rng: Rng) -> int:
    """How often to damage a file: mostly once."""
    return 0 if rng.random() < PRISTINE else pick(rng, (1, 1, 1, 2, 3))


def voxels(rng: Rng, dtypes: Sequence[str] = DTYPES) -> np.ndarray:
    """A small [x, y, z] array without two equal sizes, so that no axes can be mistaken."""
    shape = rng.permutation(np.arange(3, 9))[:3]
    dtype = np.dtype(pick(rng, dtypes))
    if dtype.kind == "f":
        return rng.normal(0, 300, shape).astype(dtype)
    low, high = max(np.iinfo(dtype).min, -2000), min(np.iinfo(dtype).max, 3000)
    return rng.integers(low, high, shape).astype(dtype)


def grid(rng: Rng) -> np.ndarray:
    """A 4 x 4 affine: axes turned, flipped or oblique, unequal voxel sizes, some place."""
    axes = np.eye(3)[rng.permutation(3)] * rng.choice((-1, 1), 3)
    if rng.random() < 0.4:
        axes = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3] = axes * np.round(rng.uniform(0.4, 5, 3), 3)
    affine[:3, 3] = np.round(rng.uniform(-300, 300, 3), 3)
    return affine


def damage(rng: Rng, data: bytes, start: int = 0) -> tuple[bytes, str]:
    """Change some bytes at or after ``start``, and say how."""
    array = bytearray(data)
    place = int(rng.integers(start, max(len(data), start + 1)))
    some = rng.bytes(int(pick(rng, (1, 2, 4, 8, 100))))
    kind = pick(rng, ("bit", "byte", "truncate", "insert", "delete", "append", "swap", "zero"))
    if kind == "bit" and place < len(array):
        array[place] ^= 1 << int(rng.integers(8))
    elif kind == "byte" and place < len(array):
        array[place] = pick(rng, (0, 1, 0x20, 0x0A, 0x7F, 0x80, 0xFF))
    elif kind == "truncate":
        del array[place if rng.random() < 0.5 else -len(some) :]
    elif kind == "insert":
        array[place:place] = some
    elif kind == "delete":
        del array[place : place + len(some)]
    elif kind == "append":
        array += pick(rng, (some, bytes(len(some)), bytes(512), bytes(array)))
    elif kind == "swap":
        array[place : place + 4] = array[place : place + 4][::-1]
    elif kind == "zero":
        array[place : place + len(some)] = bytes(len(array[place : place + len(some)]))
    return bytes(array), f"{kind} at byte {place} of {len(data)}"


NUMBERS = (
    "0", "-1", "1", "nan", "inf", "-inf", "1e-4", "1e30", "1e-320", "1e400", "0x10", "1,5", "",
    "99999999999", "-0", "+3", "3.0", "1e", "3 4", "abc", "0.001", "1000", "2.5e0", "007",
)  # fmt: skip


def numbers(rng: Rng, text: str) -> str:
    """Numbers of a text field, changed: one replaced, scaled, left out, moved, or one more."""
    words: list[Any] = text.split()
    if not words:
        return pick(rng, NUMBERS)
    place = int(rng.integers(len(words)))
    kind = pick(rng, ("edge", "edge", "scale", "drop", "swap", "add", "nudge"))
    if kind == "edge":
        words[place] = pick(rng, NUMBERS)
    elif kind in ("scale", "nudge"):
        factor = pick(rng, (-1, 2, 10, 0.1, 1e3, 1e-3) if kind == "scale" else (1.00001, 1.01))
        words[place] = scaled(words[place], factor)
    elif kind == "drop":
        del words[place]
    elif kind == "swap":
        other = int(rng.integers(len(words)))
        words[place], words[other] = words[other], words[place]
    else:
        words.insert(place, pick(rng, NUMBERS))
    return " ".join(words)


def scaled(word: str, factor: float) -> str:
    """A number as text, times ``factor``; whole numbers stay whole where they can."""
    try:
        value = float(word) * factor
    except ValueError:
        return word
    return str(int(value)) if np.isfinite(value) and value == int(value) else repr(value)


def lines(rng: Rng, header: list[str]) -> str:
    """Damage the lines of a text header in place, whatever they say; the first names the format."""
    place = int(rng.integers(len(header)))
    kind = pick(rng, ("drop", "repeat", "swap", "space", "comment", "blank", "case", "cr"))
    if kind == "drop":
        del header[place]
    elif kind == "repeat":
        header.insert(int(rng.integers(len(header) + 1)), header[place])
    elif kind == "swap":
        other = int(rng.integers(len(header)))
        header[place], header[other] = header[other], header[place]
    elif kind == "space":
        header[place] = pick(rng, (" {}", "{} ", "{}\t", "\t{}", "{}  x")).format(header[place])
    elif kind == "comment":
        header.insert(place, pick(rng, ("# a comment", "#", "Comment = x", "x:=y", "é: ü")))
    elif kind == "blank":
        header.insert(place, "")
    elif kind == "case":
        header[place] = header[place].upper() if rng.random() < 0.5 else header[place].lower()
    else:
        header[place] += "\r"
    return f"line {place}: {kind}"
