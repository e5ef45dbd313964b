# SPDX-License-Identifier: Apache-2.0
"""What the kernels share: bags, row statistics, cosines. Symbols as in docs/math.md.

Tiles of pixels are [BLOCK_M, CHUNK], of prototypes [BLOCK_N, CHUNK]; D channels are NUM_CHUNKS
chunks, the last one padded with zeros. Sums are float32 (float64 for float64).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def own_slice(pid, D: tl.constexpr, CHUNK: tl.constexpr, OUT_CHUNKS: tl.constexpr):
    """Which OUT_CHUNKS of the chunks of channels a program computes, and what else it is of."""
    NUM_CHUNKS: tl.constexpr = (D + CHUNK - 1) // CHUNK
    SLICES: tl.constexpr = NUM_CHUNKS // OUT_CHUNKS
    tl.static_assert(SLICES * OUT_CHUNKS == NUM_CHUNKS, "a program without channels")
    return pid % SLICES, pid // SLICES


@triton.jit
def load_statistics(stats, rows, row_ok, step):
    """Mean and reciprocal norm of rows; the latter lie ``step`` behind the former."""
    stats += rows
    mean = tl.load(stats, mask=row_ok, other=0.0)
    return mean, tl.load(stats + step, mask=row_ok, other=0.0)


@triton.jit
def statistics_of(
    base, rows, row_stride, row_ok, channels, stride, D: tl.constexpr, EPS: tl.constexpr, ACC
):
    """Mean and reciprocal norm of rows, computed.

    From sums relative to the vector's first element, so that a constant vector gives exact zeros
    and a large mean costs few digits.
    """
    first = tl.load(base + rows * row_stride, mask=row_ok, other=0.0).to(ACC)
    total = tl.zeros_like(first)
    squares = tl.zeros_like(first)
    for ch in range(0, D, channels.shape[0]):
        tile = load_tile(base, rows, row_stride, row_ok, ch, channels, stride, D).to(ACC)
        shifted = zero_padding(tile - first[:, None], ch, channels, D)
        total += tl.sum(shifted, 1)
        squares += tl.sum(shifted * shifted, 1)
    return first + total / D, reciprocal_norm(squares - total * total / D, EPS)


@triton.jit
def load_bag(offsets, bag, n_total):
    """First row and size of a bag, and whether its offsets make sense (an empty bag if not)."""
    begin = tl.load(offsets + bag)
    end = tl.load(offsets + bag + 1)
    valid = (begin >= 0) & (begin <= end) & (end <= n_total) & ((bag > 0) | (begin == 0))
    return tl.where(valid, begin, 0), tl.where(valid, end - begin, 0), valid


@triton.jit
def exponent_scale(temperature, count, IS_TENSOR: tl.constexpr, ACC: tl.constexpr):
    """log2(e) / t; 0 for a bag of one, whose weight is 1 exactly; NaN for a t that is not above 0.

    A tensor's value cannot be checked without waiting for the device.
    """
    if IS_TENSOR:
        t = tl.load(temperature).to(ACC)
    else:
        t = tl.cast(temperature, ACC)  # torch.compile may hand a number over as float64
    scale = tl.where(t > 0, LOG2E / t, float("nan"))
    return tl.where(count == 1, scale * 0, scale)


@triton.jit
def reciprocal_norm(sum_of_squares, EPS: tl.constexpr):
    """1 / max(norm, EPS), and 0 for a constant vector, whose cosines are 0. NaN stays NaN."""
    norm = tl.sqrt(tl.where(sum_of_squares < 0, 0.0, sum_of_squares))
    clamped = tl.where(norm <= EPS, 1 / EPS, 1 / norm)
    return tl.where(sum_of_squares <= 0, 0.0, clamped)


@triton.jit
def of_constant(rnorm, EPS: tl.constexpr):
    """The reciprocal norm that a gradient is multiplied with: 1/EPS for a constant vector."""
    return tl.where(rnorm == 0, 1 / EPS, rnorm)


@triton.jit
def projection_factor(rnorm, EPS: tl.constexpr):
    """rnorm**2, or 0 where the norm was clamped and so is no function of the vector."""
    clamped = (rnorm == 0) | (rnorm == (rnorm * 0 + 1 / EPS))
    return tl.where(clamped, 0.0, rnorm * rnorm)


@triton.jit
def power_of_two_near(rnorm):
    """A power of two near the norm: scales to the range of float16 and costs no digit."""
    return tl.exp2(tl.ceil(-tl.log2(rnorm)))


@triton.jit
def load_tile(base, rows, row_stride, row_ok, first, channels, channel_stride, D: tl.constexpr):
    """[rows, channels first + channels] of a matrix; zeros outside.

    Tiles of other channels differ by a scalar alone, so that they share their offsets' registers.
    """
    CHUNK: tl.constexpr = channels.shape[0]
    offsets = rows[:, None] * row_stride + channels[None, :] * channel_stride
    mask = row_ok[:, None]
    if D // CHUNK * CHUNK != D:  # the interpreter has no int % constexpr
        mask = mask & (first + channels < D)[None, :]
    return tl.load(base + first * channel_stride + offsets, mask=mask, other=0.0)


@triton.jit
def store_tile(
    base, tile, rows, row_stride, row_ok, first, channels, channel_stride, D: tl.constexpr
):
    """The counterpart of load_tile."""
    CHUNK: tl.constexpr = channels.shape[0]
    offsets = rows[:, None] * row_stride + channels[None, :] * channel_stride
    mask = row_ok[:, None]
    if D // CHUNK * CHUNK != D:  # the interpreter has no int % constexpr
        mask = mask & (first + channels < D)[None, :]
    tl.store(base + first * channel_stride + offsets, tile, mask=mask)


@triton.jit
def zero_padding(tile, first, channels, D: tl.constexpr):
    """Zeros in the channels past D."""
    CHUNK: tl.constexpr = channels.shape[0]
    if D // CHUNK * CHUNK != D:  # the interpreter has no int % constexpr
        return tl.where((first + channels < D)[None, :], tile, 0.0)
    else:
        return tile


@triton.jit
def centre(tile, mean, first, channels, D: tl.constexpr, CENTRED: tl.constexpr):
    """Float32 tiles are centred on their way through registers; half ones algebraically."""
    if CENTRED:
        return zero_padding(tile - mean[:, None], first, channels, D)
    else:
        return tile


@triton.jit
def cosine(product, mean_a, mean_b, rnorm_a, rnorm_b, D: tl.constexpr, CENTRED: tl.constexpr):
    """Cosines [A, B] from the products of rows of tiles A and B."""
    if not CENTRED:
        product -= (D * mean_a)[:, None] * mean_b[None, :]
    return product * (rnorm_a[:, None] * rnorm_b[None, :])


@triton.jit
def load_grad_agg(
    feat, feat_d, feat_hw, grad, grad_d, grad_hw, pix, pix_ok, ch, channels, D: tl.constexpr
):
    """The gradient of G, dO = dY2 * F, in the dtype of the products; ``grad`` points at dY2."""
    f = load_tile(feat, pix, feat_hw, pix_ok, ch, channels, feat_d, D)
    dy = load_tile(grad, pix, grad_hw, pix_ok, ch, channels, grad_d, D)
    if f.dtype == tl.float64:
        return dy * f
    else:
        return (dy.to(tl.float32) * f.to(tl.float32)).to(f.dtype)
