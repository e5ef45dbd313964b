# SPDX-License-Identifier: Apache-2.0
"""Speed of proto_attention beside its peers: forward, backward alone, and both.

One process; in every round each implementation runs once, in changing order; medians over rounds.
pytest-benchmark's table shows ours. Before the clock starts, every implementation has run twice and
its result has been compared with the float32 formula's.
"""

from __future__ import annotations

from collections.abc import Callable

import baselines
import pytest
import torch
from baselines import TOLERANCE, Op, relative_error
from measure import (
    OURS,
    THREADS,
    Call,
    Record,
    flops,
    milliseconds,
    rounds_for,
    seconds_of,
    take_turns,
)
from problems import MIXED, QUICK, SINGLE
from pytest_benchmark.fixture import BenchmarkFixture
from support.problems import Problem
from torch import Tensor

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
        "setting",
        configurations,
        ids=[f"{p.name}-{str(d)[6:]}-{t}t" for p, d, t in configurations],
        indirect=True,
        scope="module",
    )


class Setting:
    """Inputs and implementations for one problem, dtype and number of threads."""

    def __init__(self, problem: Problem, dtype: torch.dtype, threads: int, compile: bool) -> None:
        self.problem, self.dtype, self.threads = problem, dtype, threads
        feat, protos, offsets = problem.make(dtype)
        self.inputs = (feat, protos)
        self.bounds = tuple(offsets.tolist())
        self.grad_out = torch.randn(problem.out_shape, generator=torch.Generator().manual_seed(1))
        self.grad_out = self.grad_out.to(dtype)
        ops: dict[str, Op] = {
            name: getattr(baselines, name) for name in (OURS, "eager", "eager_nchw", "sdpa")
        }
        if problem.queries * self.bounds[-1] <= BROADCAST_PROTOTYPES:
            ops["broadcast"] = baselines.broadcast
        self.forward, self.gradient = dict(ops), dict(ops)
        if compile:
            self.forward["compiled"] = baselines.compiled(False, threads)
            self.gradient["compiled"] = baselines.compiled(True, threads)

    def exact(self, what: str) -> list[Tensor]:
        """What the formula gives in float32."""
        inputs = tuple(x.float() for x in self.inputs)
        return WHATS[what](baselines.eager, inputs, self.bounds, self.grad_out.float())()


def forward(
    op: Op, inputs: tuple[Tensor, ...], bounds: baselines.Bounds, grad_out: Tensor
) -> Callable[[], list[Tensor]]:
    """A call without gradients."""

    def call() -> list[Tensor]:
        with torch.no_grad():
            return [op(*inputs, bounds)]

    return call


def backward(
    op: Op, inputs: tuple[Tensor, ...], bounds: baselines.Bounds, grad_out: Tensor
) -> Callable[[], list[Tensor]]:
    """The gradients of features and prototypes alone: one forward pass, kept for all calls."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
    out = op(*leaves, bounds)
    return lambda: list(torch.autograd.grad(out, leaves, grad_out, retain_graph=True))


def both(
    op: Op, inputs: tuple[Tensor, ...], bounds: baselines.Bounds, grad_out: Tensor
) -> Callable[[], list[Tensor]]:
    """A forward pass that records, and its backward pass."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
    return lambda: list(torch.autograd.grad(op(*leaves, bounds), leaves, grad_out))


WHATS = {"forward": forward, "backward": backward, "both": both}


@pytest.fixture(scope="module")
def setting(request: pytest.FixtureRequest, quick: bool, record: Record) -> Setting:
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
    return Setting(problem, dtype, threads, compile)


def _timed(call: Callable[[], list[Tensor]]) -> Call:
    def run() -> None:
        call()  # the result is dropped here: everyone's clock includes freeing it

    return run


@pytest.mark.parametrize("what", WHATS)
def test_proto_attention(
    benchmark: BenchmarkFixture, setting: Setting, what: str, quick: bool, record: Record
) -> None:
    ops = setting.forward if what == "forward" else setting.gradient
    calls = {
        name: WHATS[what](op, setting.inputs, setting.bounds, setting.grad_out)
        for name, op in ops.items()
    }
    exact = setting.exact(what)
    errors = {}
    for name, call in calls.items():  # warms up, compiles, and lets only equals compete
        errors[name] = max(map(relative_error, call(), exact))
        assert errors[name] < TOLERANCE[setting.dtype], f"{name}: {errors[name]:.1e}"
    del exact
    timed = {name: _timed(call) for name, call in calls.items()}
    broadcast = timed.pop("broadcast", None)
    for call in timed.values():
        call()
    rounds = 2 if quick else rounds_for(timed)
    problem, dtype = setting.problem, str(setting.dtype)[6:]
    benchmark.group = f"{what}, {dtype}, {setting.threads} threads"
    # Compiling is over; were anything compiled from here on, this would raise.
    with torch.compiler.set_stance("fail_on_recompile"):
        seconds = take_turns(benchmark, timed, rounds)
        if broadcast is not None:
            tries = 2 if quick else BROADCAST_ROUNDS
            seconds["broadcast"] = [seconds_of(broadcast) for _ in range(tries)]
    if not seconds[OURS]:
        return
    measured = milliseconds(seconds)
    pixels = problem.height * problem.width
    operations = flops(setting.bounds, problem.queries, pixels, problem.dim, what)
    measured["native_gflops"] = round(operations / measured["ms"][OURS] / 1e6, 1)
    measured["relative_errors"] = {name: float(f"{error:.1e}") for name, error in errors.items()}
    benchmark.extra_info.update(measured)
    case = {"what": what, "size": problem.name, "dtype": dtype, "threads": setting.threads}
    record.cases.append(case | measured)
