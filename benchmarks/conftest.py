# SPDX-License-Identifier: Apache-2.0
"""Options of the benchmarks, and the record of a session.

pytest benchmarks                               # prints, writes nothing
pytest benchmarks --record benchmarks/results   # writes <date>-cpu-<machine>.json there
pytest benchmarks -k "1x256 and float32"        # a part
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from measure import OURS, Ceilings, Record

_RECORD = pytest.StashKey[Record]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this folder."""
    group = parser.getgroup("fastproto benchmarks")
    group.addoption(
        "--record", metavar="FOLDER", type=Path, help="write the measurements to a file there"
    )
    group.addoption(
        "--quick",
        action="store_true",
        help="one tiny problem, two rounds, no torch.compile: do the benchmarks run?",
    )


def pytest_report_header() -> str:
    """Why there are no tests of a GPU's kernels here."""
    gpu = "" if torch.cuda.is_available() else "; torch finds no CUDA device here"
    return f"benchmarks/run_gpu.py is a program of its own, not collected: make gpu-check{gpu}"


def pytest_configure(config: pytest.Config) -> None:
    """Start the record."""
    ceilings = Ceilings(sizes=(64,), tries=1) if config.getoption("quick") else Ceilings()
    config.stash[_RECORD] = Record(ceilings)


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether this is a test of the benchmarks, not a measurement."""
    return bool(request.config.getoption("quick"))


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Record:
    """Where measurements go."""
    return request.config.stash[_RECORD]


@pytest.fixture(autouse=True, scope="module")
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's table
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    """Print ours beside the peers, and write the record if one was asked for."""
    record, folder = config.stash[_RECORD], config.getoption("record")
    if record.cases:
        terminalreporter.section("medians: ms of native, and how many times as long each peer took")
    for case in record.cases:
        native = case["ms"][OURS]
        peers = "  ".join(f"{k} {v / native:.2f}" for k, v in case["ms"].items() if k != OURS)
        label = f"{case['what']:<8} {case['size']:<6} {case['dtype']:<8} {case['threads']}t"
        terminalreporter.write_line(
            f"{label} {native:9.3f} ms {case['native_gflops']:6.1f} GFLOP/s  {peers}"
        )
    if record.network:
        terminalreporter.section("medians of the whole network, ms")
    for row in record.network:
        times = "  ".join(f"{name} {value:.1f}" for name, value in row["ms"].items())
        label = f"{row['what']:<9} {row['batch']:>2} {row['dtype']:<8} {row['device']}"
        terminalreporter.write_line(f"{label}: {times}")
    doubt = record.ceilings.doubt()
    if doubt:
        terminalreporter.write_line(f"Warning: {doubt}", yellow=True)
    if folder and exitstatus == pytest.ExitCode.OK:
        path = record.write(folder, config.invocation_params.args)
        terminalreporter.write_line(f"Result: {path}")
    elif folder:
        terminalreporter.write_line("No record is written: not everything passed.")
