# SPDX-License-Identifier: Apache-2.0
"""The GPU suite's parts that need no GPU: peers, records, goals, failures, running out of time."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import baselines
import problems
import pytest
import record
import run_gpu
import suite as gpu_suite
import timers
import torch
from baselines import Call
from roofline import Ceilings
from support.problems import Problem
from timers import CudaTimer, HostTimer, Replay

from fastproto.op import backends, library


def make(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """Features, prototypes and bounds."""
    feat, protos, _ = problem.make(torch.float32)
    return feat, protos, problems.bounds_of(problem)


@pytest.mark.parametrize("bags", [((5,),), ((4, 4), (4, 4), (4, 4)), ((1,), (1,))], ids=str)
@pytest.mark.parametrize("name", ["eager", "eager_nchw", "sdpa"])
def test_batched_peers_compute_the_formula(name: str, bags: tuple[tuple[int, ...], ...]) -> None:
    problem = Problem("p", bags, queries=2, dim=24, height=3, width=4)
    feat, protos, bounds = make(problem)
    assert baselines.equal_bags(bounds)
    out = baselines.peers(bounds)[name](feat, protos, bounds)
    expected = baselines.eager(feat, protos, bounds)
    assert baselines.relative_error(out, expected) < 1e-5


def test_unequal_bags_loop() -> None:
    assert not baselines.equal_bags((0, 5, 8))
    assert not baselines.equal_bags((0, 0))
    assert baselines.peers((0, 5, 8))["sdpa"] is baselines.sdpa


def test_settings_are_unique_and_begin_with_the_goals() -> None:
    names = [setting.name for setting in problems.SETTINGS]
    assert len(set(names)) == len(names)
    goals = record.GOALS + record.NATIVE_GOALS
    wanted = {f"{size} bfloat16" for goal in goals for size in goal.sizes}
    assert set(names[: len(wanted)]) == wanted
    for setting in problems.SETTINGS:
        assert (setting.kind == "mixed") == (len({n for e in setting.problem.bags for n in e}) > 1)


def test_sets_exceed_the_cache() -> None:
    cache = 60 << 20
    for setting in problems.SETTINGS:
        sets = gpu_suite.sets_for(setting, cache)
        work = gpu_suite.roofline.forward(gpu_suite.size_of(setting))
        assert sets * work.bytes >= gpu_suite.CACHES * cache
        assert sets < gpu_suite.MOST_SETS


def case(size: str, what: str, us: dict[str, float], **more: Any) -> dict[str, Any]:
    """A row as the suite writes it: 1 MB and 100 MFLOP."""
    setting = f"{size} bfloat16"
    row = {"setting": setting, "size": size, "what": what, "dtype": "bfloat16", "us": us}
    return row | {"bytes": 1_000_000, "flops": 100_000_000} | more


def test_complete_compares_with_peers_and_ceilings() -> None:
    ceilings = Ceilings(4e12, {"bfloat16": 800e12})
    row = case("1x256", "forward", {"triton": 0.5, "native": 0.4, "eager": 2.0, "sdpa": 1.0})
    found = record.complete(row, "triton", ceilings)
    assert found["fastest_peer"] == "sdpa"
    assert found["peer_over_ours"] == 2.0
    assert (found["gb_per_s"], found["tflops"], found["of_copy"]) == (2000.0, 200.0, 0.5)
    assert (found["expected_us"], found["bound"]) == (0.25, "bytes")
    assert (found["of_matmul"], found["measured_over_expected"]) == (0.25, 2.0)


def test_complete_without_peers_ceilings_or_ours() -> None:
    alone, peer = (case("a", "both", {name: 1.0}) for name in ("triton", "eager"))
    assert "peer_over_ours" not in record.complete(alone, "triton", None)
    assert "gb_per_s" not in record.complete(peer, "triton", None)


def test_goals() -> None:
    wall = {"triton": 10.0, "eager": 60.0}
    ceilings = Ceilings(4e12, {"bfloat16": 800e12})
    rows = [
        case(size, "forward", {"triton": us, "eager": 20.0}, wall_us=wall)
        for size, us in zip(record.SMALL, (6.0, 7.0, 13.0, 9.0), strict=True)
    ]
    rows.append(case("512x256", "forward", {"triton": 0.3, "eager": 0.75}))
    rows.append(case("512x256", "both", {"triton": 1.0, "eager": 1.5}))
    completed = [record.complete(row, "triton", ceilings) for row in rows]
    found = record.compare_goals(completed, "triton")
    assert [(row["reached"], row["met"]) for row in found] == [
        (13.0, False),
        (6.0, True),
        (83.33, True),
        (2.5, True),
        (1.5, False),
        (None, None),
    ]
    assert found[0]["at"] == "1x64"
    assert found[5]["not_measured"] == ["1x256"]
    rows[0]["dtype"] = "float16"
    assert record.compare_goals(rows, "triton")[0]["not_measured"] == ["1x1"]


def test_goals_of_the_native_backend() -> None:
    us = {"triton": 12.0, "native": 6.0, "native sm80-latency": 3.0, "eager": 60.0}
    ceilings = Ceilings(4e12, {"bfloat16": 800e12})
    rows = [case(size, "forward", us) for size in record.SMALL + record.LARGE]
    rows += [case(size, "both", us | {"triton": 4.5}) for size in record.SMALL + record.LARGE]
    rows.append(case("16x4096", "backward", {"native": 0.25}))
    completed = [record.complete(row, "native", ceilings) for row in rows]
    assert completed[0]["fastest_peer"] == "eager"  # a family of our own kernels is no peer
    found = record.compare_goals(completed, "native", record.NATIVE_GOALS)
    assert [(row["reached"], row["met"]) for row in found] == [
        (6.0, True),
        (4.17, False),
        (2.08, False),
        (50.0, False),
        (2.0, True),
        (0.75, False),
    ]


class FakeSuite:
    """What a record is made of."""

    chosen = "triton"
    ours = ("native", "triton")
    cases = (case("1x256", "forward", {"triton": 12.0, "native": 6.0}),)


def test_every_goal_says_whose_it_is() -> None:
    rows = run_gpu.goal_rows(FakeSuite(), None)
    assert [row["backend"] for row in rows] == (
        ["triton"] * len(record.GOALS) + ["native"] * len(record.NATIVE_GOALS)
    )


def test_families_are_forced_while_a_call_runs_and_not_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str | None] = []

    def native(*arguments: Any) -> torch.Tensor:
        seen.append(os.environ.get("FASTPROTO_CUDA_KERNELS"))
        return torch.zeros(1)

    monkeypatch.delenv("FASTPROTO_CUDA_KERNELS", raising=False)
    monkeypatch.setattr(baselines, "native", native)
    family = baselines.Family("sm80-latency")
    empty = torch.zeros(1)
    family(empty, empty, (0, 1))
    family.around(lambda: [native()])()
    native()
    assert seen == ["sm80-latency", "sm80-latency", None]


@pytest.mark.skipif(not library.build_info(), reason="there is no native code")
def test_families_that_take_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H200, which the plan assumes where there is none."""
    monkeypatch.setattr(baselines, "ours", lambda device: {"native": None})
    problem = problems.bags(1, 64)
    both = [f"native {name}" for name in backends.CUDA_FAMILIES]
    assert baselines.families("cpu", problem, torch.bfloat16) == {}
    assert list(baselines.families("cuda", problem, torch.bfloat16)) == both
    assert list(baselines.families("cuda", problem, torch.float32)) == both[:2]


def test_tag() -> None:
    assert record.tag("NVIDIA H200") == "h200"
    assert record.tag("NVIDIA A100-SXM4-80GB") == "a100-sxm4-80gb"


class FakeTimer(HostTimer):
    """The host's calls, and times that are said rather than measured."""

    def __init__(self, lost_after: int | None = None) -> None:
        super().__init__()
        self.replays, self.scopes, self.lost_after = 0, 0, lost_after

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        self.scopes += 1
        return contextlib.nullcontext()

    def replay(self, calls: Sequence[Call]) -> Replay:
        self.replays += 1
        assert self.scopes > 0
        replay = super().replay(calls)

        def sample() -> float:
            replay.sample()
            return 1e-6 * self.replays

        return dataclasses.replace(replay, sample=sample)

    def wall(self, call: Call) -> float:
        call()
        return 1e-3

    def alive(self) -> str | None:
        lost = self.lost_after is not None and self.replays > self.lost_after
        return "the CUDA context is lost: a test" if lost else None


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[problems.Setting]:
    """Two settings, with a plain function in the place of our backends."""
    monkeypatch.setattr(baselines, "ours", lambda device: {"triton": baselines.eager})
    return [
        problems.Setting(
            Problem(name, ((3,),), dim=8, height=2, width=2), problems.FP32, "one", False
        )
        for name in ("first", "second")
    ]


def test_a_peer_that_fails_or_strays_does_not_stop_the_run(
    settings: list[problems.Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(feat: torch.Tensor, protos: torch.Tensor, bounds: Any) -> torch.Tensor:
        raise RuntimeError("no such\nkernel")

    def stray(feat: torch.Tensor, protos: torch.Tensor, bounds: Any) -> torch.Tensor:
        return baselines.eager(feat, protos, bounds) * 1.01

    monkeypatch.setattr(
        baselines,
        "peers",
        lambda bounds: {"eager": broken, "eager_nchw": stray, "sdpa": baselines.sdpa},
    )
    suite = gpu_suite.Suite(FakeTimer(), budget=60, quick=True)
    written = []
    suite.run(settings, lambda: written.append(len(suite.cases)))
    assert written == [3, 6, 6]
    assert all(set(case["us"]) == {"triton", "sdpa"} for case in suite.cases)
    assert len(suite.failed) == 2 * 3 * 2
    assert suite.failed[0]["what"] == "first float32 forward: eager"
    assert suite.failed[0]["error"] == "RuntimeError: no such kernel"
    assert "against the float32 formula; allowed 1e-04" in suite.failed[1]["error"]


def test_time_that_runs_out_is_said(settings: list[problems.Setting]) -> None:
    suite = gpu_suite.Suite(FakeTimer(), budget=-1, quick=True)
    suite.run(settings, lambda: None)
    assert suite.cases == suite.failed == []
    assert [row["setting"] for row in suite.left_out] == ["first float32", "second float32"]
    assert {row["why"] for row in suite.left_out} == {"the time was up"}
    assert len(suite.ceilings["copy"]) == 1  # the second measurement is the end's


def test_a_lost_device_ends_the_run(settings: list[problems.Setting]) -> None:
    suite = gpu_suite.Suite(FakeTimer(lost_after=5), budget=60, quick=True)
    suite.run(settings, lambda: None)
    assert [row["setting"] for row in suite.left_out] == ["second float32"]
    assert "the CUDA context is lost" in suite.left_out[0]["why"]


def test_one_setting_of_each_kind_is_compiled(
    settings: list[problems.Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = [setting.kind for setting in problems.SETTINGS if setting.compile]
    assert sorted(compiled) == ["many", "mixed", "one"]
    monkeypatch.setattr(baselines, "compiled", lambda op, **options: op)
    suite = gpu_suite.Suite(FakeTimer(), budget=60, quick=True)
    first, second = settings
    suite.run([dataclasses.replace(first, compile=True), second], lambda: None)
    both, none = (set(case["us"]) & set(gpu_suite.COMPILED) for case in suite.cases[::3])
    assert both == set(gpu_suite.COMPILED)
    assert not none


def test_without_a_backend_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "ours", lambda device: {})
    suite = gpu_suite.Suite(FakeTimer(), budget=60, quick=True)
    suite.run(problems.QUICK_SETTINGS, lambda: None)
    assert suite.cases == []
    assert suite.failed[0]["what"] == "ours"


def test_turns_are_fair() -> None:
    order: list[str] = []

    def sample(name: str) -> float:
        order.append(name)
        return 1.0

    seconds = timers.in_turns({n: lambda n=n: sample(n) for n in "abc"}, 20)
    assert seconds == {name: [1.0] * 20 for name in "abc"}
    rounds = [tuple(order[i : i + 3]) for i in range(0, 60, 3)]
    assert all(set(turn) == set("abc") for turn in rounds)
    assert len(set(rounds)) > 3


class FakeCuda:
    """What CudaTimer uses of torch.cuda, writing down the order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.clock = 0.0
        fake = self

        class Stream:
            pass

        class Graph:
            def replay(self) -> None:
                fake.log.append("replay")
                fake.clock += 6.0

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                fake.log.append("record")
                self.at = fake.clock

            def synchronize(self) -> None:
                fake.log.append("wait")

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Properties:
            name, major, minor = "NVIDIA H200", 9, 0
            multi_processor_count, total_memory, L2_cache_size = 132, 139 << 30, 1 << 10

        class Buffer:
            def zero_(self) -> None:
                fake.log.append("flush")
                fake.clock += 1.0

        @contextlib.contextmanager
        def entered(name: str) -> Any:
            fake.log.append(name)
            yield
            fake.log.append(f"/{name}")

        def graph(graph: Graph, stream: Stream) -> Any:
            assert isinstance(stream, Stream)
            return entered("capture")

        for name, value in {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "Event": Event,
            "graph": graph,
            "stream": lambda stream: entered("stream"),
            "_sleep": lambda cycles: fake.log.append("sleep"),
            "synchronize": lambda: fake.log.append("synchronize"),
            "get_device_properties": lambda device: Properties,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        real = torch.empty

        def empty(*shape: int, **options: Any) -> Any:
            return Buffer() if options.get("device") == "cuda" else real(*shape, **options)

        monkeypatch.setattr(torch, "empty", empty)


def test_cuda_timer_flushes_outside_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    timer = CudaTimer()
    results = [[torch.full((1,), float(i))] for i in range(3)]
    with timer.scope():
        replay = timer.replay([lambda r=r: r for r in results])
        fake.log.clear()
        assert replay.sample() == pytest.approx(6e-3 / 3)
        assert fake.log == [*["flush"] * 3, "sleep", "record", "replay", "record", "wait"]
        fake.log.clear()
        assert timer.wall(lambda: results[1]) > 0
        assert fake.log == ["synchronize"] * 2
    assert replay.results is results[0]
    assert fake.log[-2:] == ["/stream", "synchronize"]
    described = timer.describe()
    assert (described["capability"], described["multiprocessors"]) == ("9.0", 132)
