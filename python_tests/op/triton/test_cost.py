# SPDX-License-Identifier: Apache-2.0
"""What the table's rows cost on an H200 by arithmetic, against the times of eager PyTorch there.

No measurement: a lower bound, which docs/kernels/triton.md puts in its place.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import SETTINGS
from support.problems import Problem

from fastproto.op.triton.configs import Config, choose

LAUNCH = 2.5e-6  # seconds
MEMORY = 4e12  # bytes a second
MULTIPROCESSORS = 132
CACHE = 64 * 1.7e9  # bytes of the L2 cache a second, of one multiprocessor
PRODUCTS = 400e12  # mma.sync, operations a second
VALUE_BYTES = 2

Program = tuple[float, float]  # bytes read through the L2 cache, operations
PROBLEMS = {setting.name: setting.problem for setting in SETTINGS}
RECORD = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "2026-11-27-h200.json"
MEASURED = [
    case
    for case in json.loads(RECORD.read_text())["cases"]
    if case["what"] in ("forward", "backward") and "eager" in case["us"]
]


def program(
    config: Config, dim: int, steps: int, pixels: float, prototypes: float, products: float
) -> Program:
    """One that reads some tiles of each kind and multiplies some, in each of its steps."""
    read = pixels * config.block_m + prototypes * config.block_n
    pair = 2 * config.block_m * config.block_n * dim
    return steps * read * dim * VALUE_BYTES, steps * products * pair


def forward(config: Config, problem: Problem) -> Iterable[Program]:
    part = 1 / config.slices(problem.dim)
    tiles = -(-problem.height * problem.width // config.block_m)
    for bag in (count for episode in problem.bags for count in episode):
        steps = -(-bag // config.block_n)
        one = program(config, problem.dim, steps, 1, 1 + part, 1 + part)
        once, _ = program(config, problem.dim, 1, 1 + part, 0, 0)  # statistics; F of the result
        yield from [(one[0] + once, one[1])] * (problem.queries * tiles * round(1 / part))


def backward_query(config: Config, problem: Problem) -> Iterable[Program]:
    part = 1 / config.slices(problem.dim)
    tiles = -(-problem.height * problem.width // config.block_m)
    for episode in problem.bags:
        steps = sum(-(-count // config.block_n) for count in episode)
        one = program(config, problem.dim, steps, 2, 1 + part, 2 + part)
        # F, dY and G for delta; dY, dY and G of every class, and F, of the result.
        once, _ = program(config, problem.dim, 1, len(episode) * (3 + 3 * part) + part, 0, 0)
        yield from [(one[0] + once, one[1])] * (problem.queries * tiles * round(1 / part))


def backward_protos(config: Config, problem: Problem) -> Iterable[Program]:
    part = 1 / config.slices(problem.dim)
    steps = problem.queries * -(-problem.height * problem.width // config.block_m)
    one = program(config, problem.dim, steps, 2 + 2 * part, 1, 2 + 2 * part)
    for bag in (count for episode in problem.bags for count in episode):
        yield from [one] * (-(-bag // config.block_n) * round(1 / part))


def seconds(programs: list[Program]) -> float:
    """Of one kernel: programs are dealt out to the multiprocessors in turn."""
    dealt = (programs[i::MULTIPROCESSORS] for i in range(MULTIPROCESSORS))
    busiest = max(sum(read for read, _ in mine) for mine in dealt)
    return max(busiest / CACHE, sum(operations for _, operations in programs) / PRODUCTS)


@pytest.mark.parametrize("case", MEASURED, ids=lambda case: f"{case['setting']}-{case['what']}")
def test_by_arithmetic_no_slower_than_eager_pytorch(case: dict[str, Any]) -> None:
    problem = PROBLEMS[case["setting"]]
    plan = choose(getattr(torch, case["dtype"]), problem.dim)
    if case["what"] == "forward":
        kernels = [forward(plan.forward, problem)]
    else:
        kernels = [
            backward_query(plan.backward_query, problem),
            backward_protos(plan.backward_protos, problem),
        ]
    computing = sum(seconds(list(programs)) for programs in kernels)
    modelled = 2 * LAUNCH + max(case["bytes"] / MEMORY, computing)  # two launches in each pass
    assert 1e6 * modelled < case["us"]["eager"]
