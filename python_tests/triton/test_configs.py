# SPDX-License-Identifier: Apache-2.0
"""The table of configurations and the pure function that reads it; measured plans."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fastproto.backends.chips import H200, Chip
from fastproto.triton.configs import (
    INTERPRETED,
    KERNELS,
    TABLE,
    Config,
    Plan,
    Shape,
    candidates,
    choose,
    variant_of,
)

tuning = pytest.importorskip("fastproto.triton.tuning", reason="triton is not installed")

A100 = Chip(80, 108, 163 * 1024)
RTX_4090 = Chip(89, 128, 99 * 1024)
B200 = Chip(100, 148, 227 * 1024)
MI300 = Chip(0, 304, 64 * 1024)
CHIPS = {"H200": H200, "A100": A100, "RTX 4090": RTX_4090, "B200": B200, "MI300": MI300}
ONE = Shape(1, 1, 1, 256, 512, torch.bfloat16)
MANY = dataclasses.replace(ONE, episodes=512)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [1, 16, 100, 256, 512, 768, 2048, 5000])
@pytest.mark.parametrize("episodes", [1, 512])
def test_every_problem_has_a_plan(chip: Chip, dtype: torch.dtype, dim: int, episodes: int) -> None:
    plan = choose(Shape(episodes, 1, 2, 100, dim, dtype), chip)
    for config in (plan.forward, plan.backward_query, plan.backward_protos):
        assert 16 <= config.chunk <= 128
        assert config.chunk & (config.chunk - 1) == 0
        chunks = config.chunks(dim)
        out_chunks = config.out_chunks or chunks
        assert config.slices(dim) * out_chunks == chunks  # no program without channels
        assert not config.resident or chunks * config.chunk <= 512  # what fits on a chip
    if dtype == torch.float32:
        assert not plan.forward.fused_stats


def test_few_tiles_are_a_small_problem_and_many_are_not() -> None:
    assert variant_of(ONE, H200) == "small"
    assert variant_of(MANY, H200) == "throughput"
    small, throughput = choose(ONE, H200), choose(MANY, H200)
    assert small.forward.fused_stats  # one launch
    tiles = -(-ONE.pixels // small.forward.block_m)
    assert tiles * small.forward.slices(512) >= 64  # programs for one image and class
    assert throughput.forward.slices(512) == 1  # no product is computed twice
    assert throughput.backward_query.slices(512) == 1


def test_hopper_runs_its_own_matrix_instructions_on_prototypes() -> None:
    assert choose(MANY, H200).backward_protos.block_n == 64  # rows of a warp group's tile
    assert choose(MANY, A100).backward_protos.block_n == 32


def test_a_chip_with_little_shared_memory_gets_smaller_tiles() -> None:
    for chip in (RTX_4090, MI300):
        for kernel in KERNELS:
            fits = {row.config.fit(512) for row in TABLE if row.shared_memory <= chip.shared_memory}
            assert set(candidates(kernel, MANY, chip)) <= fits
    assert choose(MANY, RTX_4090).forward.block_n == 32


def test_the_number_of_prototypes_has_no_say() -> None:
    assert "protos" not in {field.name for field in dataclasses.fields(Shape)}


def test_rows_say_where_they_apply() -> None:
    for row in TABLE:
        assert row.kernel in KERNELS
        assert row.capabilities == INTERPRETED or row.shared_memory > 0
        if row.config.resident and row.capabilities != INTERPRETED:
            assert row.max_dim <= 512


class Clock:
    """Seconds that a test decides on: the last candidate of every kernel is the fastest."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Config]] = []

    def __call__(self, shape: Shape, kernel: str, plan: Plan) -> float:
        config = getattr(plan, kernel)
        self.calls.append((kernel, config))
        found = candidates(kernel, shape, H200)
        return float(len(found) - found.index(config))


def test_a_measured_plan_is_the_fastest_and_is_remembered(tmp_path: Path) -> None:
    file, clock = tmp_path / "cache" / "plans.json", Clock()
    plan = tuning.Tuner(file, clock, "GPU; 1").plan(MANY, H200, may_measure=True)
    for kernel in KERNELS:
        found = candidates(kernel, MANY, H200)
        assert len(found) > 1
        assert getattr(plan, kernel) == found[-1]
    assert len(clock.calls) == sum(len(candidates(k, MANY, H200)) for k in KERNELS)

    again = Clock()
    tuner = tuning.Tuner(file, again, "GPU; 1")
    assert tuner.plan(MANY, H200, may_measure=False) == plan
    assert not again.calls
    # Another shape or another GPU is another choice.
    assert tuner.plan(ONE, H200, may_measure=False) == choose(ONE, H200)
    other = tuning.Tuner(file, again, "GPU; 2")
    assert other.plan(MANY, H200, may_measure=False) == choose(MANY, H200)
    assert not again.calls


def test_an_unreadable_file_of_plans_is_said_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "plans.json"
    file.write_text("{ half a", encoding="utf-8")
    tuning.Tuner(file, Clock(), "GPU").plan(MANY, H200, may_measure=True)
    assert f"{file} cannot be read" in caplog.text
    assert json.loads(file.read_text(encoding="utf-8"))


def test_a_remembered_configuration_that_left_the_table_is_not_used(tmp_path: Path) -> None:
    file = tmp_path / "plans.json"
    key = f"GPU; {MANY}"
    known = {"forward": {"[1, 2, 3]": 0.1}, "backward_query": "fast"}
    file.write_text(json.dumps({key: known}), encoding="utf-8")
    plan = tuning.Tuner(file, Clock(), "GPU").plan(MANY, H200, may_measure=False)
    assert plan == choose(MANY, H200)


def test_without_a_gpu_the_table_decides() -> None:
    assert tuning.plan_for(ONE, H200, torch.device("cpu")) == choose(ONE, H200)
