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
import itertools
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Work:
    """What a kernel must do.

    Attributes:
        bytes: Read and written.
        flops: Of the matrix products.
    """

    bytes: int
    flops: int

    def __add__(self, other: Work) -> Work:
        """One after the other."""
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclasses.dataclass(frozen=True)
class Size:
    """A call of the op.

    Attributes:
        images: I = E*Q.
        maps: M = E*Q*K.
        prototypes: N of all bags together.
        rows: R: for every image the prototypes of all its bags.
        pixels: HW.
        dim: D.
        value_bytes: s, 2 for the half types.
    """

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
    def product(self) -> int:
        """Operations of one matrix product over all images and bags: 2 R HW D."""
        return 2 * self.rows * self.pixels * self.dim


def size_of(
    bounds: Sequence[int], episodes: int, queries: int, pixels: int, dim: int, value_bytes: int
) -> Size:
    """The size of a call with these ``bounds`` of its E*K bags."""
    counts = [b - a for a, b in itertools.pairwise(bounds)]
    ways = len(counts) // episodes
    images = episodes * queries
    prototypes = sum(counts)
    return Size(images, images * ways, prototypes, queries * prototypes, pixels, dim, value_bytes)


def forward(size: Size, *, concat: bool = True, save: bool = False) -> Work:
    """Y of all maps: two products, S = F P^T and G = A P.

    flops = 2 * 2 R HW D
    bytes = I D HW s (F) + N D s (P) + M c D HW s (Y; c is 2, or 1 without ``concat``)
    with ``save``, for the backward pass: + M D HW s (G) + M HW a (log-sum-exp) + 2 I HW a + 2 N a
    (means and norms of queries and prototypes).
    """
    moved = size.images * size.per_image + size.protos_bytes
    moved += size.maps * (2 if concat else 1) * size.per_image
    if save:
        moved += size.maps * (size.per_image + size.pixels * size.sum_bytes)
        moved += 2 * (size.images * size.pixels + size.prototypes) * size.sum_bytes
    return Work(moved, 2 * size.product)


def proto_stats(size: Size) -> Work:
    """Mean and norm of every prototype, where a kernel of its own computes them.

    flops = 0 (no matrix product); bytes = N D s + 2 N a.
    """
    return Work(size.protos_bytes + 2 * size.prototypes * size.sum_bytes, 0)


def backward_query(size: Size, *, concat: bool = True) -> Work:
    """DF alone: three products, S again, dA = dO P^T, and dF = dS P.

    flops = 3 * 2 R HW D
    bytes = M c D HW s (dY) + I D HW s (F) + N D s (P) + M D HW s (G) + I D HW s (dF)
    + 2 M HW a (log-sum-exp read, delta written) + 2 I HW a + 2 N a (means and norms).
    """
    moved = size.maps * (3 if concat else 2) * size.per_image + 2 * size.images * size.per_image
    moved += size.protos_bytes + 2 * size.maps * size.pixels * size.sum_bytes
    moved += 2 * (size.images * size.pixels + size.prototypes) * size.sum_bytes
    return Work(moved, 3 * size.product)


def backward_protos(size: Size) -> Work:
    """DP alone: four products, S and dA again, and dP = A^T dO + dS^T F.

    flops = 4 * 2 R HW D
    bytes = M D HW s (second half of dY) + I D HW s (F) + 2 N D s (P, dP) + 2 M HW a (log-sum-exp,
    delta) + 2 I HW a + 2 N a (means and norms).
    """
    moved = (size.maps + size.images) * size.per_image + 2 * size.protos_bytes
    moved += 2 * size.maps * size.pixels * size.sum_bytes
    moved += 2 * (size.images * size.pixels + size.prototypes) * size.sum_bytes
    return Work(moved, 4 * size.product)


def backward(size: Size, *, concat: bool = True) -> Work:
    """Both gradients at once: five products, S and dA being those of both.

    flops = 5 * 2 R HW D
    bytes = those of :func:`backward_query` without delta, + N D s (dP).
    """
    query = backward_query(size, concat=concat)
    delta = size.maps * size.pixels * size.sum_bytes
    return Work(query.bytes - delta + size.protos_bytes, 5 * size.product)


def work(size: Size, what: str, *, concat: bool = True) -> Work:
    """Of "forward", "backward" or "both": a forward pass that saves, and its backward pass."""
    if what == "forward":
        return forward(size, concat=concat)
    if what == "backward":
        return backward(size, concat=concat)
    if what == "both":
        return forward(size, concat=concat, save=True) + backward(size, concat=concat)
    raise ValueError(f"what: found {what!r}; allowed: forward, backward, both")


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


H200 = Ceilings(4.3e12, {"bfloat16": 788e12})
"""As measured on one: a copy, and a product of 8192 x 8192 matrices of random numbers."""


def expected_seconds(work: Work, dtype: str, ceilings: Ceilings = H200) -> float:
    """The longer of moving the bytes and doing the products; no version runs much faster."""
    return max(work.bytes / ceilings.bytes_per_second, work.flops / ceilings.rate(dtype))


def bound(work: Work, dtype: str, ceilings: Ceilings = H200) -> str:
    """Which of the two is longer: "bytes" or "products"."""
    moving = work.bytes / ceilings.bytes_per_second
    return "bytes" if moving >= work.flops / ceilings.rate(dtype) else "products"
