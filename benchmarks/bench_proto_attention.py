# SPDX-License-Identifier: Apache-2.0
"""Speed of proto_attention beside its peers: forward, backward alone, and both.

One process; in every round each implementation runs once, in changing order; medians over rounds.
pytest-benchmark's table shows ours. Before the clock starts, every implementation has run twice and
its result has been compared with the float32 formula's.
"""

from __future__ import annotations

import baselines
import pytest
import roofline
import torch
from baselines import TOLERANCE, Op, relative_error
from measure import OURS, THREADS, Record, milliseconds, take_turns
from problems import MIXED, QUICK, SINGLE, WHATS, Setting
from pytest_benchmark.fixture import BenchmarkFixture
from suite import Inputs, size_of
from timers import rounds_for, seconds_of

# The broadcasting cosine is tens of times slower: it takes part while it is bearable, and after the
# others: its hundreds of megabytes drive them out of every cache and the heap back to the system.
BROADCAST_PROTOTYPES = 32
BROADCAST_ROUNDS = 7


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All problems, dtypes and numbers of threads, or the quick problem."""
    problems, dtypes = [*SINGLE, MIXED], list(TOLERANCE)
    if metafunc.config.getoption("quick"):
        problems, dtypes = [QUICK], [torch.float32]
    # The half types on all threads only: torch.compile needs seconds for each of these settings.
    configurations = [
        (p, d, t)
        for d in dtypes
        for p in problems
        for t in (THREADS if d == torch.float32 else THREADS[-1:])
    ]
    metafunc.parametrize(
        "case",
        configurations,
        ids=[f"{p.name}-{str(d)[6:]}-{t}t" for p, d, t in configurations],
        indirect=True,
        scope="module",
    )


class Case:
    """Inputs and implementations for one setting and number of threads."""

    def __init__(self, setting: Setting, threads: int, compile: bool) -> None:
        self.setting, self.threads = setting, threads
        problem, dtype = setting.problem, setting.dtype
        feat, protos, offsets = problem.make(dtype)
        grad_out = torch.randn(problem.out_shape, generator=torch.Generator().manual_seed(1))
        self.inputs = Inputs(feat, protos, tuple(offsets.tolist()), grad_out.to(dtype))
        ops: dict[str, Op] = {
            name: getattr(baselines, name) for name in (OURS, "eager", "eager_nchw", "sdpa")
        }
        if problem.queries * self.inputs.bounds[-1] <= BROADCAST_PROTOTYPES:
            ops["broadcast"] = baselines.broadcast
        self.ops = {what: dict(ops) for what in WHATS}
        if compile:
            # The columns are the faster form to differentiate, the rows the faster one without
            # gradients (in bfloat16; in float32 the forward passes are level). The number of
            # threads is built into the code; saying it keeps code for another number out of the
            # caches of torch versions that do not look.
            options = {"cpp.threads": threads}
            gradient = baselines.compiled(baselines.eager_nchw, options=options)
            self.ops["forward"]["compiled"] = baselines.compiled(baselines.eager, options=options)
            self.ops["backward"]["compiled"] = self.ops["both"]["compiled"] = gradient


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, quick: bool, record: Record) -> Case:
    """The setting, its number of threads, and a torch.compile that has seen nothing yet."""
    problem, dtype, threads = request.param
    torch.set_num_threads(threads)
    record.ceilings.sample(dtype)
    compile = not quick
    if compile:
        # Eight shapes into one process torch.compile gives up and runs eager, silently.
        torch.compiler.reset()
        # A graph that is kept must not lend its buffers. Costs nothing that could be measured.
        torch._functorch.config.donated_buffer = False
    return Case(Setting(problem, dtype), threads, compile)


@pytest.mark.parametrize("what", WHATS)
def test_proto_attention(
    benchmark: BenchmarkFixture, case: Case, what: str, quick: bool, record: Record
) -> None:
    setting, inputs = case.setting, case.inputs
    calls = {name: inputs.call(what, op) for name, op in case.ops[what].items()}
    exact = inputs.exact(what)
    errors = {}
    for name, call in calls.items():  # warms up, compiles, and lets only equals compete
        errors[name] = max(map(relative_error, call(), exact))
        assert errors[name] < TOLERANCE[setting.dtype], f"{name}: {errors[name]:.1e}"
    del exact
    broadcast = calls.pop("broadcast", None)
    for call in calls.values():
        call()
    rounds = 2 if quick else rounds_for(calls)
    dtype = str(setting.dtype)[6:]
    benchmark.group = f"{what}, {dtype}, {case.threads} threads"
    # Compiling is over; were anything compiled from here on, this would raise.
    with torch.compiler.set_stance("fail_on_recompile"):
        seconds = take_turns(benchmark, calls, rounds)
        if broadcast is not None:
            tries = 2 if quick else BROADCAST_ROUNDS
            seconds["broadcast"] = [seconds_of(broadcast) for _ in range(tries)]
    if not seconds[OURS]:
        return
    measured = milliseconds(seconds)
    operations = roofline.work(size_of(setting), what).flops
    measured["native_gflops"] = round(operations / measured["ms"][OURS] / 1e6, 1)
    measured["relative_errors"] = {name: float(f"{error:.1e}") for name, error in errors.items()}
    benchmark.extra_info.update(measured)
    row = {"what": what, "size": setting.problem.name, "dtype": dtype, "threads": case.threads}
    record.cases.append(row | measured)
