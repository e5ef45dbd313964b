# SPDX-License-Identifier: Apache-2.0
"""Measures one setting after the other until all are done or the time is up."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import baselines
import roofline
import torch
import torch._functorch.config as functorch_config
from baselines import TOLERANCE, Bounds, Call, Op, relative_error
from problems import WHATS, Setting, bounds_of
from timers import HostTimer, Replay, in_turns, medians, quartiles, rounds_for
from torch import Tensor

from fastproto.op import backends

SECONDS_PER_COMPARISON = 0.7
ROUNDS = (7, 51)
WALL_ROUNDS = 51
# Calls of one graph. With 512 channels, 256 pixels and a half type the smallest inputs and results
# are 0.8 MB: so many of them are three times the largest L2 cache there is, and more.
MOST_SETS = 512
COMPILED = {"compiled": "eager", "compiled_nchw": "eager_nchw"}
"""What torch.compile is applied to, by the name of the result."""
CACHES = 3  # inputs and results of all calls of a graph, in caches


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The operands of one call."""

    feat: Tensor
    protos: Tensor
    bounds: Bounds
    grad_out: Tensor

    @classmethod
    def random(cls, setting: Setting, device: str, seed: int) -> Inputs:
        """Made on the device."""
        problem, dtype = setting.problem, setting.dtype
        generator = torch.Generator(device).manual_seed(seed)
        bounds = bounds_of(problem)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        shape = (problem.episodes, problem.queries, problem.dim, problem.height, problem.width)
        # ReLU of normal numbers, as behind a ResNet's last block.
        feat = normal(*shape).relu_().to(dtype)
        protos = normal(bounds[-1], problem.dim).relu_().to(dtype)
        return cls(feat, protos, bounds, normal(*problem.out_shape).to(dtype))

    def forward(self, op: Op) -> Call:
        """A call without gradients."""

        def call() -> list[Tensor]:
            with torch.no_grad():
                return [op(self.feat, self.protos, self.bounds)]

        return call

    def backward(self, op: Op) -> Call:
        """The gradients of features and prototypes alone: one forward pass, kept for all calls."""
        leaves = self._leaves()
        out = op(*leaves, self.bounds)
        return lambda: list(torch.autograd.grad(out, leaves, self.grad_out, retain_graph=True))

    def both(self, op: Op) -> Call:
        """A forward pass that records, and its backward pass."""
        leaves = self._leaves()
        return lambda: list(torch.autograd.grad(op(*leaves, self.bounds), leaves, self.grad_out))

    def call(self, what: str, op: Op) -> Call:
        """Forward, backward or both."""
        make: Callable[[Op], Call] = getattr(self, what)
        return make(op)

    def exact(self, what: str) -> list[Tensor]:
        """What the formula gives in float32."""
        floats = (self.feat.float(), self.protos.float(), self.bounds, self.grad_out.float())
        return Inputs(*floats).call(what, baselines.eager)()

    def _leaves(self) -> tuple[Tensor, Tensor]:
        feat, protos = (x.detach().clone().requires_grad_() for x in (self.feat, self.protos))
        return feat, protos


def sets_for(setting: Setting, cache_bytes: int) -> int:
    """How many sets of inputs and results exceed the cache by a factor of ``CACHES``."""
    moved = roofline.forward(size_of(setting)).bytes
    return max(1, min(MOST_SETS, -(-CACHES * cache_bytes // moved)))


def size_of(setting: Setting) -> roofline.Size:
    """For the model."""
    p = setting.problem
    value_bytes = torch.empty(0, dtype=setting.dtype).element_size()
    return roofline.size_of(
        bounds_of(p), p.episodes, p.queries, p.height * p.width, p.dim, value_bytes
    )


class Suite:
    """One run: what was measured, what failed, and what was left out.

    Attributes:
        cases: One row per setting and pass.
        failed: {"what", "error"} rows.
        left_out: Names of settings, and why.
        ceilings: Measurements by rate: bytes or operations per second.
    """

    def __init__(
        self, timer: HostTimer, budget: float, quick: bool = False, families: bool = False
    ) -> None:
        self.timer, self.quick, self.families = timer, quick, families
        self._deadline = time.monotonic() + budget
        self.ours = baselines.ours(timer.device)
        chosen = backends.choose(timer.device)
        self.chosen = chosen if chosen in self.ours else next(iter(self.ours), chosen)
        """The backend that the goals are about: the one that users get."""
        self.cases: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []
        self.left_out: list[dict[str, str]] = []
        self.ceilings: dict[str, list[float]] = {}

    def run(self, settings: Sequence[Setting], after_each: Callable[[], None]) -> None:
        """Measure ``settings`` in their order; ``after_each`` writes what there is so far."""
        if not self.ours:
            self._fail("ours", "; ".join(map(self._why_not, baselines.OURS)))
            return
        self._guarded("ceilings", self.measure_ceilings)
        # A graph that is kept must not lend its buffers. Costs nothing that could be measured.
        functorch_config.donated_buffer = False
        reason: str | None = None
        for index, setting in enumerate(settings):
            reason = reason or self.timer.alive()
            if reason is None and time.monotonic() > self._deadline:
                reason = "the time was up"
            if reason is not None:
                self.left_out += [{"setting": s.name, "why": reason} for s in settings[index:]]
                break
            self._guarded(setting.name, lambda s=setting: self.measure(s))
            after_each()
        if reason is None and self.timer.alive() is None:
            self._guarded("ceilings", self.measure_ceilings)
        after_each()

    def measure(self, setting: Setting) -> None:
        """All passes of a setting."""
        began = time.monotonic()
        gc.collect()  # graphs of the setting before, and their memory
        if setting.compile:
            torch.compiler.reset()  # it would give up, silently, after eight shapes
        with self.timer.scope():
            sets = [
                Inputs.random(setting, self.timer.device, seed)
                for seed in range(sets_for(setting, self.timer.cache_bytes))
            ]
        peers = baselines.peers(sets[0].bounds)
        names = COMPILED if setting.compile else {}
        # By whether gradients are wanted: code is made for one or the other.
        compiled = [
            {name: baselines.compiled(peers[names[name]], fullgraph=True) for name in names}
            for _ in range(2)
        ]
        for what in WHATS:
            ops = {name: op for name, op in self.ours.items() if self._takes(name, setting)}
            if self.families:
                ops |= baselines.families(self.timer.device, setting.problem, setting.dtype)
            ops |= peers | compiled[what != "forward"]
            # Everything that was made here, graphs and their memory too, goes with this call.
            self._guarded(
                f"{setting.name} {what}",
                lambda w=what, o=ops: self._compare(setting, w, o, sets),
            )
            if self.timer.alive() is not None:
                return
        seconds = time.monotonic() - began
        print(f"    {setting.name}: {len(sets)} sets of inputs, {seconds:.0f} s", flush=True)

    def _takes(self, name: str, setting: Setting) -> bool:
        """Whether a backend has kernels for such features on this chip."""
        device, dim = self.timer.device, backends.padded_dim(setting.problem.dim)
        return device != "cuda" or backends.why_not(name, device, setting.dtype, dim) is None

    def _compare(
        self, setting: Setting, what: str, ops: Mapping[str, Op], sets: list[Inputs]
    ) -> None:
        """Times of one pass, of equals only."""
        label = f"{setting.name} {what}"
        with self.timer.scope():
            truth = sets[0].exact(what)
            replays: dict[str, Replay] = {}
            calls: dict[str, list[Call]] = {}
            errors: dict[str, float] = {}
            for name, op in ops.items():
                made = self._guarded(f"{label}: {name}", lambda o=op: self._ready(what, o, sets))
                if made is not None:
                    errors[name], wrong = self._check(setting.dtype, made[1], truth)
                    if wrong is None:
                        calls[name], replays[name] = made
                    else:
                        self._fail(f"{label}: {name}", wrong)
                elif self.timer.alive() is not None:
                    return
            del truth
            if not replays:
                return
            # Compiling is over; were anything compiled from here on, this would raise.
            with torch.compiler.set_stance("fail_on_recompile"):
                seconds = self._take_turns({n: r.sample for n, r in replays.items()})
                wall: dict[str, list[float]] = {}
                if setting.kind == "one" and what != "backward":
                    wall = self._take_wall_turns(calls)
            replays.clear()
            calls.clear()
        self._add_case(setting, what, len(sets), seconds, wall, errors)

    def _ready(self, what: str, op: Op, sets: list[Inputs]) -> tuple[list[Call], Replay]:
        """Calls of all sets, warm, and their replay."""
        calls = [inputs.call(what, op) for inputs in sets]
        if isinstance(op, baselines.Family):
            calls = [op.around(call) for call in calls]
        for _ in range(2):  # compiles, and fills the allocator
            calls[0]()
        return calls, self.timer.replay(calls)

    def _check(
        self, dtype: torch.dtype, replay: Replay, truth: list[Tensor]
    ) -> tuple[float, str | None]:
        """The error of a replay into poisoned memory, and what is wrong with it, if anything."""
        with torch.no_grad():
            for result in replay.results:
                result.fill_(float("nan"))
        replay.sample()
        error = max(map(relative_error, replay.results, truth))
        allowed = TOLERANCE[dtype]
        if not error < allowed:  # NaN is not
            return error, f"error {error:.1e} against the float32 formula; allowed {allowed:.0e}"
        return error, None

    def _take_turns(self, samples: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
        """Each once per round, in an order drawn anew for every round."""
        rounds = rounds_for(samples, SECONDS_PER_COMPARISON, *ROUNDS)
        return in_turns(samples, 2 if self.quick else rounds)

    def _take_wall_turns(self, calls: dict[str, list[Call]]) -> dict[str, list[float]]:
        """From the host, launches included; every round takes the next inputs."""
        rounds = 2 if self.quick else WALL_ROUNDS
        turn = dict.fromkeys(calls, 0)

        def sample(name: str) -> float:
            turn[name] += 1
            return self.timer.wall(calls[name][turn[name] % len(calls[name])])

        for name in calls:
            sample(name)
        return in_turns({name: lambda n=name: sample(n) for name in calls}, rounds)

    def _add_case(
        self,
        setting: Setting,
        what: str,
        sets: int,
        seconds: dict[str, list[float]],
        wall: dict[str, list[float]],
        errors: dict[str, float],
    ) -> None:
        work = roofline.work(size_of(setting), what)
        case: dict[str, Any] = {
            "setting": setting.name,
            "what": what,
            "size": setting.problem.name,
            "dtype": str(setting.dtype)[6:],
            "sets": sets,
            "rounds": len(next(iter(seconds.values()))),
            "bytes": work.bytes,
            "flops": work.flops,
            "us": medians(seconds, 1e6, 3),
            "quartiles_us": quartiles(seconds, 1e6, 3),
        }
        if wall:
            case["wall_us"] = medians(wall, 1e6, 3)
            case["wall_quartiles_us"] = quartiles(wall, 1e6, 3)
        case["relative_errors"] = {name: float(f"{error:.1e}") for name, error in errors.items()}
        self.cases.append(case)
        times = "  ".join(f"{name} {value:.1f}" for name, value in case["us"].items())
        print(f"{setting.name:<22} {what:<8} us: {times}", flush=True)

    def measure_ceilings(self) -> None:
        """Rates of a large copy and of large matrix products of random numbers."""
        device = self.timer.device
        elements, size = (1 << 12, 32) if self.quick else (1 << 29, 8192)  # 2 GiB
        rounds = 2 if self.quick else 5
        with self.timer.scope():
            self._copy_ceiling(elements, rounds)
            for name in ("bfloat16", "float16", "tf32", "float32"):
                dtype = torch.float32 if name == "tf32" else getattr(torch, name)
                a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
                out = torch.empty_like(a)
                before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
                try:
                    self._ceiling(
                        name,
                        2 * size**3,
                        rounds,
                        lambda a=a, b=b, out=out: [torch.mm(a, b, out=out)],
                    )
                finally:
                    torch.set_float32_matmul_precision(before)

    def _copy_ceiling(self, elements: int, rounds: int) -> None:
        source = torch.randn(elements, device=self.timer.device)
        target = torch.empty_like(source)
        self._ceiling("copy", 2 * source.nbytes, rounds, lambda: [target.copy_(source)])

    def _ceiling(self, name: str, amount: int, rounds: int, call: Call) -> None:
        for _ in range(2):
            call()
        replay = self.timer.replay([call] * 3)
        replay.sample()
        rate = amount / statistics.median(replay.sample() for _ in range(rounds))
        self.ceilings.setdefault(name, []).append(rate)
        print(f"ceiling {name}: {rate:.3e} per second", flush=True)

    def _guarded(self, what: str, function: Callable[[], Any]) -> Any:
        """The function's result; an error is noted, and the run goes on."""
        try:
            return function()
        except Exception as error:
            traceback.print_exc()
            self._fail(what, f"{type(error).__name__}: {error}")
            return None

    def _fail(self, what: str, error: str) -> None:
        text = " ".join(error.split())[:400]
        print(f"FAILED {what}: {text}", flush=True)
        self.failed.append({"what": what, "error": text})

    def _why_not(self, name: str) -> str:
        return f"{name}: {backends.why_not(name, self.timer.device)}"
