# SPDX-License-Identifier: Apache-2.0
"""Which tiles a problem runs with: an explicit table and a pure function that reads it."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Config:
    block_m: int
    block_n: int
    chunk: int
    out_chunks: int  # 0: all
    resident: bool
    warps: int
    stages: int
    fused_stats: bool = False
    dim: int = 512

    def slices(self, dim):
        n = -(-dim // self.chunk)
        return -(-n // (self.out_chunks or n))

    @property
    def constants(self):
        n = -(-self.dim // self.chunk)
        return dict(BLOCK_M=self.block_m, BLOCK_N=self.block_n, CHUNK=self.chunk, OUT_CHUNKS=self.out_chunks or n, RESIDENT=self.resident)

@dataclasses.dataclass(frozen=True)
class Plan:
    stats: Config
    forward: Config
    backward_query: Config
    backward_protos: Config
