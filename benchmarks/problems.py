# SPDX-License-Identifier: Apache-2.0
"""The sizes that are measured: queries x prototypes at 512 channels and 16 x 16 pixels."""

from __future__ import annotations

from support.problems import Problem

SINGLE = [
    Problem(f"{queries}x{count}", ((count,),), queries=queries)
    for queries, count in [(1, 8), (1, 32), (1, 64), (1, 256), (8, 256), (1, 1280), (8, 1280)]
]
# A training step of several episodes: large backgrounds, small organs. Native takes all of it in
# one call; the peers loop over the bags.
MIXED = Problem("mixed", ((600, 3), (250, 40), (128, 12), (400, 90)), queries=2)
# For a test of the benchmarks themselves.
QUICK = Problem("quick", ((5, 3), (1, 6)), queries=2, dim=32, height=4, width=4)


def find(name: str) -> Problem:
    """The problem called ``name``."""
    return next(problem for problem in (*SINGLE, MIXED, QUICK) if problem.name == name)
