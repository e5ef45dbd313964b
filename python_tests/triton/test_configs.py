# SPDX-License-Identifier: Apache-2.0
"""The table of configurations and the pure function that reads it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastproto.backends.chips import H200, Chip
from fastproto.triton.configs import (
    INTERPRETED,
    INTERPRETER,
    KERNELS,
    TABLE,
    Shape,
    choose,
    config_of,
    variant_of,
)

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
            assert config_of(kernel, MANY, chip) in fits
    assert choose(MANY, RTX_4090).forward.block_n == 32


def test_the_number_of_prototypes_has_no_say() -> None:
    assert "protos" not in {field.name for field in dataclasses.fields(Shape)}


def test_every_row_is_taken_somewhere() -> None:
    chips = [INTERPRETER, *CHIPS.values()]
    types = (torch.bfloat16, torch.float32)
    shapes = [
        dataclasses.replace(shape, dim=dim, dtype=dtype)
        for shape in (ONE, MANY)
        for dim in (512, 2048)
        for dtype in types
    ]
    taken = {
        (kernel, config_of(kernel, shape, chip))
        for kernel in KERNELS
        for shape in shapes
        for chip in chips
    }
    assert {(row.kernel, row.config) for row in TABLE} <= taken


def test_rows_say_where_they_apply() -> None:
    for row in TABLE:
        assert row.kernel in KERNELS
        assert row.capabilities == INTERPRETED or row.shared_memory > 0
        if row.config.resident and row.capabilities != INTERPRETED:
            assert row.max_dim <= 512
