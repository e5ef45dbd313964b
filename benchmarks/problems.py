# SPDX-License-Identifier: Apache-2.0
"""The sizes and types that are measured: images x prototypes, 512 channels, 16 x 16 pixels."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from support.problems import Problem

WHATS = ("forward", "backward", "both")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclasses.dataclass(frozen=True)
class Setting:
    """A problem in a type.

    Attributes:
        problem: Its name is "BxN", B images with a bag of N prototypes each, or "mixed...".
        dtype: Of features, prototypes and results.
        kind: "one" image and class, "many" equal bags, or "mixed" ones.
        compile: Whether torch.compile takes part: on one of each kind, it takes a minute each.
    """

    problem: Problem
    dtype: torch.dtype
    kind: str = "one"
    compile: bool = False

    @property
    def name(self) -> str:
        """For a line of a log."""
        return f"{self.problem.name} {str(self.dtype)[6:]}"


# On a CPU: one bag of all images.
SINGLE = [
    Problem(f"{queries}x{count}", ((count,),), queries=queries)
    for queries, count in [(1, 8), (1, 32), (1, 64), (1, 256), (8, 256), (1, 1280), (8, 1280)]
]
# A training step of several episodes: large backgrounds, small organs. Native takes all of it in
# one call; the peers loop over the bags. And sixteen of them at once.
EPISODES = ((600, 3), (250, 40), (128, 12), (400, 90))
MIXED = Problem("mixed", EPISODES, queries=2)
MIXED_LARGE = Problem("mixed-large", EPISODES * 16, queries=2)
# For a test of the benchmarks themselves.
QUICK = Problem("quick", ((5, 3), (1, 6)), queries=2, dim=32, height=4, width=4)


def find(name: str) -> Problem:
    """The problem of a CPU called ``name``."""
    return next(problem for problem in (*SINGLE, MIXED, QUICK) if problem.name == name)


def bags(images: int, count: int) -> Problem:
    """``images`` query images, each compared with one bag of its own."""
    return Problem(f"{images}x{count}", ((count,),) * images)


def _one(count: int, dtype: torch.dtype, *, compile: bool = False) -> Setting:
    return Setting(bags(1, count), dtype, "one", compile)


def _many(images: int, count: int, dtype: torch.dtype, *, compile: bool = False) -> Setting:
    return Setting(bags(images, count), dtype, "many", compile)


# On a GPU, the most important first: time may run out.
SETTINGS = [
    _one(256, BF16, compile=True),
    _many(512, 256, BF16, compile=True),
    _one(1, BF16),
    _one(16, BF16),
    _one(64, BF16),
    _many(16, 4096, BF16),
    _many(512, 64, BF16),
    _many(512, 16, BF16),
    _many(64, 256, BF16),
    _many(8, 256, BF16),
    _one(1024, BF16),
    Setting(MIXED, BF16, "mixed", compile=True),
    _one(256, FP16),
    _many(512, 256, FP16),
    _one(256, FP32),
    _many(512, 256, FP32),
    Setting(MIXED_LARGE, BF16, "mixed"),
    _one(16, FP32),
    _many(64, 256, FP16),
    _many(64, 256, FP32),
]

# To try the suite itself: small enough for kernels that are interpreted.
QUICK_SETTINGS = [
    Setting(Problem("1x5", ((5,),), dim=16, height=4, width=2), FP32, "one"),
    Setting(Problem("mixed", ((5, 3),), queries=2, dim=16, height=2, width=2), FP32, "mixed"),
]


def bounds_of(problem: Problem) -> tuple[int, ...]:
    """Where each bag starts, and the end."""
    return (0, *itertools.accumulate(n for episode in problem.bags for n in episode))
