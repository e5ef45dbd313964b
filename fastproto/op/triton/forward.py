# SPDX-License-Identifier: Apache-2.0
"""Forward kernels: row statistics of the prototypes, and the fused op. See docs/kernels/triton.md.

One program computes BLOCK_M pixels of one image and class, for OUT_CHUNKS of the NUM_CHUNKS chunks
of channels. Pixels and prototypes are read again for every block of prototypes, so any D will do.

``n_total`` is not specialised: no kernel is compiled anew as the number of prototypes changes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastproto.op.triton.tiles import (
    centre,
    cosine,
    exponent_scale,
    load_bag,
    load_statistics,
    load_tile,
    own_slice,
    statistics_of,
    store_tile,
)


@triton.jit(do_not_specialize=["n_total"])
def proto_stats_kernel(
    # inputs
    protos,  # [N_total, D]
    # outputs
    proto_stats,  # [2, N_total]: mean, reciprocal norm
    n_total,
    D: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Mean and reciprocal norm of every row."""
    ACC: tl.constexpr = proto_stats.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < n_total
    channels = tl.arange(0, CHUNK)
    mean, rnorm = statistics_of(protos, rows, D, row_ok, channels, 1, D, EPS, ACC)
    tl.store(proto_stats + rows, mean, mask=row_ok)
    tl.store(proto_stats + n_total + rows, rnorm, mask=row_ok)


@triton.jit(do_not_specialize=["n_total"])
def forward_kernel(
    # inputs
    feat,  # [E, Q, D, HW]
    protos,  # [N_total, D]
    offsets,  # [E*K + 1]
    temperature,  # number, or tensor with one element
    proto_stats,  # [2, N_total]
    # outputs
    out,  # [E, Q, K, 2D or D, HW]
    agg,  # [E, Q, K, D, HW], or None: G
    lse,  # [E, Q, K, HW], or None: log2 of the sum of exp2(c log2(e) / t)
    query_stats,  # [E, Q, 2, HW], or None: mean, reciprocal norm
    n_total,
    queries,
    ways,
    pixels,
    feat_e,
    feat_q,
    feat_d,
    feat_hw,
    out_d,
    out_hw,
    agg_d,
    agg_hw,
    D: tl.constexpr,
    EPS: tl.constexpr,
    CONCAT: tl.constexpr,
    SAVE: tl.constexpr,
    TEMPERATURE_IS_TENSOR: tl.constexpr,
    ONLINE_MAX: tl.constexpr,  # a running maximum instead of the bound |c| <= 1
    CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    OUT_CHUNKS: tl.constexpr,
):
    """Y = [F ; G*F] of BLOCK_M pixels."""
    ACC: tl.constexpr = tl.float64 if feat.dtype.element_ty == tl.float64 else tl.float32
    dtype = feat.dtype.element_ty

    # Neighbouring programs share their prototypes: slices, tiles, images, then bags.
    part, pid = own_slice(tl.program_id(0), D, CHUNK, OUT_CHUNKS)
    tiles = tl.cdiv(pixels, BLOCK_M)
    tile = pid % tiles
    pid //= tiles
    query = pid % queries
    bag = pid // queries
    episode = bag // ways
    image = episode * queries + query
    map_index = (image * ways + bag % ways).to(tl.int64)

    pix = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    pix_ok = pix < pixels
    channels = tl.arange(0, CHUNK)
    feat += episode.to(tl.int64) * feat_e + query.to(tl.int64) * feat_q

    mean_q, rnorm_q = statistics_of(feat, pix, feat_hw, pix_ok, channels, feat_d, D, EPS, ACC)

    begin, count, valid = load_bag(offsets, bag, n_total)
    scale = exponent_scale(temperature, count, TEMPERATURE_IS_TENSOR, ACC)
    bag_protos = protos + begin.to(tl.int64) * D

    row_sum = tl.zeros([BLOCK_M], ACC)
    row_max = tl.full([BLOCK_M], float("-inf"), ACC)
    acc = ()
    for _ in tl.static_range(OUT_CHUNKS):
        acc = acc + (tl.zeros([BLOCK_M, CHUNK], ACC),)

    for start in range(0, count, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        row_ok = rows < count
        mean_p, rnorm_p = load_statistics(proto_stats + begin, rows, row_ok, n_total)

        product = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        for ch in range(0, D, CHUNK):
            f = load_tile(feat, pix, feat_hw, pix_ok, ch, channels, feat_d, D)
            p = load_tile(bag_protos, rows, D, row_ok, ch, channels, 1, D)
            f = centre(f, mean_q, ch, channels, D, CENTRED)
            p = centre(p, mean_p, ch, channels, D, CENTRED)
            product = tl.dot(f, tl.trans(p), product, input_precision=PRECISION, out_dtype=ACC)

        exponent = cosine(product, mean_q, mean_p, rnorm_q * scale, rnorm_p, D, CENTRED)
        if ONLINE_MAX:
            exponent = tl.where(row_ok[None, :], exponent, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(exponent, 1))
            w = tl.exp2(exponent - new_max[:, None])
            rescale = tl.exp2(row_max - new_max)
            row_sum = row_sum * rescale + tl.sum(w, 1)
            row_max = new_max
        else:
            w = tl.where(row_ok[None, :], tl.exp2(exponent - scale), 0.0)
            row_sum += tl.sum(w, 1)

        weights = w.to(dtype)
        updated = ()
        for i in tl.static_range(OUT_CHUNKS):
            ch = (part * OUT_CHUNKS + i) * CHUNK
            value = load_tile(bag_protos, rows, D, row_ok, ch, channels, 1, D)
            old = acc[i]
            if ONLINE_MAX:
                old = old * rescale[:, None]
            updated = updated + (
                tl.dot(weights, value, old, input_precision=PRECISION, out_dtype=ACC),
            )
        acc = updated

    inverse = tl.where(row_sum == 0, 0.0, 1 / row_sum)  # an empty bag
    inverse = tl.where(valid, inverse, float("nan"))
    out += map_index * (2 * D if CONCAT else D) * pixels
    if SAVE:
        agg += map_index * D * pixels
    for i in tl.static_range(OUT_CHUNKS):
        ch = (part * OUT_CHUNKS + i) * CHUNK
        f = load_tile(feat, pix, feat_hw, pix_ok, ch, channels, feat_d, D)
        g = acc[i] * inverse[:, None]
        enhanced = (g * f.to(ACC)).to(dtype)
        if CONCAT:
            store_tile(out, f, pix, out_hw, pix_ok, ch, channels, out_d, D)
            store_tile(out + D * out_d, enhanced, pix, out_hw, pix_ok, ch, channels, out_d, D)
        else:
            store_tile(out, enhanced, pix, out_hw, pix_ok, ch, channels, out_d, D)
        if SAVE:
            store_tile(agg, g.to(dtype), pix, agg_hw, pix_ok, ch, channels, agg_d, D)
    if SAVE:
        if part == 0:
            bound = row_max if ONLINE_MAX else scale
            tl.store(lse + map_index * pixels + pix, bound + tl.log2(row_sum), mask=pix_ok)
            if bag % ways == 0:
                stats = query_stats + image.to(tl.int64) * 2 * pixels + pix
                tl.store(stats, mean_q, mask=pix_ok)
                tl.store(stats + pixels, rnorm_q, mask=pix_ok)
