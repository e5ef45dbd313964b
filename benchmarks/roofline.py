# SPDX-License-Identifier: Apache-2.0
"""The least that proto_attention must do, and how long a machine needs for it at its ceilings.

Bytes: each input read once, each output written once. Floating-point operations: those of the
matrix products of the algorithm (docs/math.md), two per multiply-add; the rest, exponentials and
sums over channels, is linear in what is read and not counted. What an implementation moves or
computes beyond that is its own doing.

Symbols of the formulas, all of one call: I = E*Q images, M = E*Q*K maps (one per image and class),
N = prototypes of all bags, R = sum over images and bags of the bag's prototypes (Q*N), HW pixels,
D channels, s bytes per value, a bytes per value of a sum (4; 8 for float64).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Work:
    """What a kernel must do: bytes read and written, and operations of the matrix products."""

    bytes: int
    flops: int

    def __add__(self, other: Work) -> Work:
        """One after the other."""
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclasses.dataclass(frozen=True)
class Size:
    """A call of the op: I, M, N, R, HW, D and s."""

    images: int
    maps: int
    prototypes: int
    rows: int
    pixels: int
    dim: int
    value_bytes: int

    @property
    def sum_bytes(self) -> int:
        """Bytes a of a sum: float32, or float64 for float64."""
        return max(4, self.value_bytes)

    @property
    def per_image(self) -> int:
        """Bytes of one map of D channels: D HW s."""
        return self.dim * self.pixels * self.value_bytes

    @property
    def protos_bytes(self) -> int:
        """Bytes of all prototypes: N D s."""
        return self.prototypes * self.dim * self.value_bytes

    @property
    def statistics_bytes(self) -> int:
        """Bytes of log-sum-exp, and of means and norms of queries and prototypes.

        M HW a + 2 I HW a + 2 N a.
        """
        vectors = self.images * self.pixels + self.prototypes
        return (self.maps * self.pixels + 2 * vectors) * self.sum_bytes

    @property
    def product(self) -> int:
        """Operations of one matrix product over all images and bags: 2 R HW D."""
        return 2 * self.rows * self.pixels * self.dim


def size_of(
    bounds: Sequence[int], episodes: int, queries: int, pixels: int, dim: int, value_bytes: int
) -> Size:
    """The size of a call with these ``bounds`` of its E*K bags."""
    images, prototypes = episodes * queries, bounds[-1] - bounds[0]
    maps = images * ((len(bounds) - 1) // episodes)
    return Size(images, maps, prototypes, queries * prototypes, pixels, dim, value_bytes)


def forward(size: Size, *, save: bool = False) -> Work:
    """Y of all maps: two products, S = F P^T and G = A P.

    flops = 2 * 2 R HW D
    bytes = I D HW s (F) + N D s (P) + 2 M D HW s (Y)
    with ``save``, for the backward pass: + M D HW s (G) + the statistics.
    """
    moved = (size.images + 2 * size.maps) * size.per_image + size.protos_bytes
    if save:
        moved += size.maps * size.per_image + size.statistics_bytes
    return Work(moved, 2 * size.product)


def backward(size: Size) -> Work:
    """Both gradients: five products, S again, dA = dO P^T, dF = dS P, dP = A^T dO + dS^T F.

    flops = 5 * 2 R HW D
    bytes = 2 M D HW s (dY) + M D HW s (G) + 2 I D HW s (F, dF) + 2 N D s (P, dP) + the statistics.
    """
    moved = (3 * size.maps + 2 * size.images) * size.per_image
    return Work(moved + 2 * size.protos_bytes + size.statistics_bytes, 5 * size.product)


def work(size: Size, what: str) -> Work:
    """Of "forward", "backward" or "both": a forward pass that saves, and its backward pass."""
    if what == "both":
        return forward(size, save=True) + backward(size)
    return {"forward": forward, "backward": backward}[what](size)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the machine reaches at best.

    Attributes:
        bytes_per_second: Of a large copy, read and written.
        flops_per_second: Of a large matrix product, by "bfloat16", "float16", "tf32", "float32".
    """

    bytes_per_second: float
    flops_per_second: Mapping[str, float]

    def rate(self, dtype: str) -> float:
        """Of products whose result has the digits of ``dtype``.

        float32 may be the sum of three TF32 products: the faster of the two ways counts.
        """
        rates = self.flops_per_second
        if dtype == "float32" and "tf32" in rates:
            return max(rates["float32"], rates["tf32"] / 3)
        return rates[dtype]

    def expected_seconds(self, work: Work, dtype: str) -> float:
        """The longer of moving the bytes and doing the products; no version runs much faster."""
        return max(work.bytes / self.bytes_per_second, work.flops / self.rate(dtype))

    def bound(self, work: Work, dtype: str) -> str:
        """Which of the two is longer: "bytes" or "products"."""
        moving = work.bytes / self.bytes_per_second
        return "bytes" if moving >= work.flops / self.rate(dtype) else "products"
