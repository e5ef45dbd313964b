# SPDX-License-Identifier: Apache-2.0
"""Which tiles the kernels run with: an explicit table, and a pure function that reads it.

How the rows were found, and what each compiles to: docs/kernels/triton.md.
"""

from __future__ import annotations

import dataclasses
import functools

import torch


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes of one kernel.

    Attributes:
        block_m: Pixels of a tile.
        block_n: Prototypes of a tile.
        chunk: Channels of a tile.
        out_chunks: Chunks of the result that a program computes.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
    """

    block_m: int
    block_n: int
    chunk: int
    out_chunks: int
    warps: int
    stages: int

    def slices(self, dim: int) -> int:
        """Programs that share the channels of one result tile."""
        return -(-dim // self.chunk) // self.out_chunks

    def fit(self, dim: int) -> Config:
        """The same for ``dim`` channels: chunks no larger than they need, dealt out evenly.

        Evenly, because a program with a chunk past the last channel would have to mask it.
        """
        chunk = min(self.chunk, max(16, power_of_two_from(dim)))
        chunks = -(-dim // chunk)
        out_chunks = min(self.out_chunks, chunks)
        while chunks % out_chunks:
            out_chunks -= 1
        return dataclasses.replace(self, chunk=chunk, out_chunks=out_chunks)

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time constants of a kernel."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "CHUNK": self.chunk,
            "OUT_CHUNKS": self.out_chunks,
        }


@dataclasses.dataclass(frozen=True)
class Plan:
    """A configuration for every kernel but that of the prototypes' statistics."""

    forward: Config
    backward_query: Config
    backward_protos: Config

    def fit(self, dim: int) -> Plan:
        """The same for ``dim`` channels."""
        return Plan(*(getattr(self, kernel).fit(dim) for kernel in KERNELS))


KERNELS = ("forward", "backward_query", "backward_protos")

# For every GPU. Neither the size of the problem nor the chip has a say.
HALF = Plan(
    forward=Config(32, 32, 64, 8, 8, 3),
    backward_query=Config(32, 64, 64, 4, 8, 2),
    backward_protos=Config(64, 32, 64, 2, 8, 2),
)
SINGLE = Plan(
    forward=Config(32, 32, 32, 2, 8, 2),
    backward_query=Config(16, 32, 32, 4, 8, 2),
    backward_protos=Config(16, 16, 32, 2, 4, 2),
)
# The fewest programs: the interpreter takes milliseconds for each.
INTERPRETED = Plan(*(Config(64, 64, 128, 8, 4, 1) for _ in KERNELS))
TABLE = {torch.bfloat16: HALF, torch.float16: HALF, torch.float32: SINGLE}


def power_of_two_from(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def stats_config(dim: int) -> Config:
    """Of the kernel that computes the statistics of the prototypes."""
    chunk = min(512, max(16, power_of_two_from(dim)))
    return Config(1, max(1, 4096 // chunk), chunk, 1, 4, 1)


@functools.cache
def choose(dtype: torch.dtype, dim: int, interpreted: bool = False) -> Plan:
    """The plan for features of a type and ``dim`` channels."""
    if interpreted:
        return INTERPRETED.fit(dim)
    if dtype not in TABLE:
        raise ValueError(f"no row of the table for {dtype}; allowed: {', '.join(map(str, TABLE))}")
    return TABLE[dtype].fit(dim)
