# SPDX-License-Identifier: Apache-2.0
"""Memory beyond inputs and results, ours and the leaner of the eager forms, in float32."""

from __future__ import annotations

import pytest
from measure import OURS, THREADS, Record
from peak_memory import peak_memory, why_not
from problems import MIXED, QUICK, SINGLE
from support.problems import Problem

PEER = "eager_nchw"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All problems, or the quick one."""
    problems = [QUICK] if metafunc.config.getoption("quick") else [*SINGLE, MIXED]
    metafunc.parametrize("problem", problems, ids=lambda problem: problem.name)


@pytest.mark.parametrize("what", ["forward", "both"])
def test_memory(problem: Problem, what: str, record: Record) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    threads = THREADS[-1]
    row = {"what": what, "size": problem.name, "dtype": "float32", "threads": threads}
    for name in (OURS, PEER):
        needed, kept = peak_memory(name, problem, what, threads)
        row |= {f"{name}_needed": needed, f"{name}_kept": kept}
    record.memory.append(row)
