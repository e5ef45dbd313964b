# SPDX-License-Identifier: Apache-2.0
"""Which tiles a problem runs with: an explicit table, and a pure function that reads it.

How the rows were found, and what each compiles to: docs/kernels/triton.md.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from fastproto.backends.chips import Chip


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes of one kernel.

    Attributes:
        block_m: Pixels of a tile.
        block_n: Prototypes of a tile.
        chunk: Channels of a tile.
        out_chunks: Chunks of the result that a program computes; 0 means all.
        resident: Whether a program keeps the tile it owns in all channels on the chip.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
        fused_stats: Forward only: whether statistics of the prototypes are computed on the way
            where nothing has to be saved (half types), which spares a launch.
    """

    block_m: int
    block_n: int
    chunk: int
    out_chunks: int
    resident: bool
    warps: int
    stages: int
    fused_stats: bool = False

    def chunks(self, dim: int) -> int:
        """Chunks of ``dim`` channels."""
        return -(-dim // self.chunk)

    def slices(self, dim: int) -> int:
        """Programs that share the channels of one result tile."""
        return self.chunks(dim) // (self.out_chunks or self.chunks(dim))

    def fit(self, dim: int) -> Config:
        """The same for ``dim`` channels: chunks no larger than they need, dealt out evenly.

        Evenly, because a program with a chunk past the last channel would have to mask it.
        """
        chunk = min(self.chunk, max(16, power_of_two_from(dim)))
        chunks = -(-dim // chunk)
        out_chunks = min(self.out_chunks, chunks)
        while out_chunks and chunks % out_chunks:
            out_chunks -= 1
        return dataclasses.replace(self, chunk=chunk, out_chunks=out_chunks)

    def streamed_constants(self, dim: int) -> dict[str, Any]:
        """Compile-time constants of a kernel that keeps no tile resident."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "CHUNK": self.chunk,
            "OUT_CHUNKS": self.out_chunks or self.chunks(dim),
        }

    def constants(self, dim: int) -> dict[str, Any]:
        """Compile-time constants of a kernel that may."""
        return self.streamed_constants(dim) | {"RESIDENT": self.resident}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the choice may depend on. Not the number of prototypes: the host does not know it."""

    episodes: int
    queries: int
    ways: int
    pixels: int
    dim: int
    dtype: torch.dtype


INTERPRETER = Chip(-1, 1, 0)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: where a configuration applies.

    Attributes:
        kernel: "forward", "backward_query" or "backward_protos".
        variant: "throughput", "small" or "any" (whatever the size).
        dtypes: Types of the features.
        capabilities: Lowest and highest compute capability, times ten.
        shared_memory: Bytes needed, at most, by any of its uses.
        max_dim: Largest D.
        config: The tiles.
    """

    kernel: str
    variant: str
    dtypes: tuple[torch.dtype, ...]
    capabilities: tuple[int, int]
    shared_memory: int
    max_dim: int
    config: Config


KERNELS = ("forward", "backward_query", "backward_protos")
HALF = (torch.bfloat16, torch.float16)
SINGLE = (torch.float32,)
ALL_TYPES = (*HALF, *SINGLE, torch.float64)
ANY_DIM = 2**20
ALL = (0, 999)
SM80 = (80, 89)
SM90 = (90, 99)
INTERPRETED = (-1, -1)
KIB = 1024

# Of the rows that apply the first is taken.
TABLE: tuple[Row, ...] = (
    *(
        # The fewest programs: the interpreter takes milliseconds for each.
        Row(kernel, "any", ALL_TYPES, INTERPRETED, 0, ANY_DIM, Config(64, 64, 128, 0, True, 4, 1))
        for kernel in KERNELS
    ),
    Row("forward", "throughput", HALF, ALL, 101 * KIB, 512, Config(32, 64, 128, 0, True, 8, 2)),
    Row("forward", "throughput", HALF, ALL, 67 * KIB, 512, Config(32, 32, 128, 0, True, 8, 2)),
    Row("forward", "small", HALF, ALL, 99 * KIB, 512, Config(16, 64, 128, 1, True, 4, 2, True)),
    Row("forward", "any", HALF, SM90, 48 * KIB, ANY_DIM, Config(64, 64, 64, 4, False, 8, 3)),
    Row("forward", "any", HALF, ALL, 10 * KIB, ANY_DIM, Config(32, 32, 64, 2, False, 8, 2)),
    Row("forward", "any", SINGLE, ALL, 17 * KIB, ANY_DIM, Config(32, 32, 32, 2, False, 8, 2)),
    Row(
        "backward_query",
        "throughput",
        HALF,
        ALL,
        101 * KIB,
        512,
        Config(16, 64, 128, 0, True, 8, 2),
    ),
    Row("backward_query", "small", HALF, ALL, 116 * KIB, 512, Config(16, 64, 64, 2, True, 8, 2)),
    Row("backward_query", "any", HALF, SM90, 25 * KIB, ANY_DIM, Config(64, 32, 64, 4, False, 8, 2)),
    Row("backward_query", "any", HALF, ALL, 13 * KIB, ANY_DIM, Config(32, 32, 64, 4, False, 8, 2)),
    Row("backward_query", "any", SINGLE, ALL, 9 * KIB, ANY_DIM, Config(16, 32, 32, 4, False, 8, 2)),
    Row(
        "backward_protos",
        "throughput",
        HALF,
        SM90,
        29 * KIB,
        ANY_DIM,
        Config(32, 64, 64, 4, False, 8, 2),
    ),
    Row(
        "backward_protos",
        "throughput",
        HALF,
        SM80,
        13 * KIB,
        ANY_DIM,
        Config(32, 32, 64, 4, False, 8, 2),
    ),
    Row(
        "backward_protos",
        "throughput",
        HALF,
        ALL,
        21 * KIB,
        ANY_DIM,
        Config(64, 32, 64, 2, False, 8, 2),
    ),
    Row("backward_protos", "any", HALF, ALL, 7 * KIB, ANY_DIM, Config(16, 16, 64, 1, False, 4, 2)),
    Row(
        "backward_protos", "any", SINGLE, ALL, 7 * KIB, ANY_DIM, Config(16, 16, 32, 2, False, 4, 2)
    ),
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A configuration for every kernel."""

    variant: str
    stats: Config
    forward: Config
    backward_query: Config
    backward_protos: Config


def power_of_two_from(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def variant_of(shape: Shape, chip: Chip) -> str:
    """Which form: "small" where throughput's tiles would leave multiprocessors idle."""
    tiles = shape.episodes * shape.queries * shape.ways * -(-shape.pixels // 32)
    return "throughput" if tiles >= chip.multiprocessors else "small"


def config_of(kernel: str, shape: Shape, chip: Chip) -> Config:
    """That of the first row of the table that applies."""
    variant = variant_of(shape, chip)
    found = [
        row.config.fit(shape.dim)
        for row in TABLE
        if row.kernel == kernel
        and row.variant in (variant, "any")
        and shape.dtype in row.dtypes
        and row.capabilities[0] <= chip.capability <= row.capabilities[1]
        and row.shared_memory <= chip.shared_memory
        and shape.dim <= row.max_dim
    ]
    if not found:
        raise ValueError(f"{kernel}: no row of the table for {shape.dtype} on {chip}")
    return found[0]


def stats_config(dim: int) -> Config:
    """Of the kernel that computes the statistics of the prototypes."""
    chunk = min(512, max(16, power_of_two_from(dim)))
    return Config(1, max(1, 4096 // chunk), chunk, 0, False, 4, 1)


@functools.cache
def choose(shape: Shape, chip: Chip) -> Plan:
    """The plan of a problem: the first row of the table that applies, for every kernel."""
    return Plan(
        variant_of(shape, chip),
        stats_config(shape.dim),
        *(config_of(kernel, shape, chip) for kernel in KERNELS),
    )
