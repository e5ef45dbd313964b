# SPDX-License-Identifier: Apache-2.0
"""The table of configurations and the pure function that reads it."""

from __future__ import annotations

import pytest
import torch

from fastproto.op.triton.configs import HALF, KERNELS, TABLE, choose


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize("dtype", TABLE, ids=str)
@pytest.mark.parametrize("dim", [1, 16, 100, 256, 512, 768, 832, 2048, 5000])
def test_every_problem_has_a_plan(dtype: torch.dtype, dim: int, interpreted: bool) -> None:
    plan = choose(dtype, dim, interpreted)
    for config in (getattr(plan, kernel) for kernel in KERNELS):
        assert 16 <= config.chunk <= 128
        assert config.chunk & (config.chunk - 1) == 0
        chunks = -(-dim // config.chunk)
        assert config.slices(dim) * config.out_chunks == chunks  # no program without channels


def test_512_channels_are_one_program_s_in_the_forward() -> None:
    assert HALF.forward.fit(512).slices(512) == 1  # no product is computed twice


def test_a_type_without_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no row of the table for torch\.float64"):
        choose(torch.float64, 512)
    assert choose(torch.float64, 512, interpreted=True)
