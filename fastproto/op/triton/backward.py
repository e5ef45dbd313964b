# SPDX-License-Identifier: Apache-2.0
"""Backward kernels: one for the queries, one for the prototypes; no atomics, so deterministic.

Both recompute the weights A from the products and the saved ``lse``. Symbols as in docs/math.md;
dO = dY2 * F is the gradient of G, dA = <dO, P>, dS that of the cosine.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastproto.op.triton.tiles import (
    LN2,
    centre,
    cosine,
    exponent_scale,
    load_bag,
    load_grad_agg,
    load_statistics,
    load_tile,
    of_constant,
    own_slice,
    power_of_two_near,
    projection_factor,
    store_tile,
)


@triton.jit(do_not_specialize=["n_total"])
def backward_query_kernel(
    # inputs
    grad_out,  # [E, Q, K, 2D or D, HW]
    feat,  # [E, Q, D, HW]
    protos,  # [N_total, D]
    offsets,  # [E*K + 1]
    temperature,  # number, or tensor with one element
    proto_stats,  # [2, N_total]
    agg,  # [E, Q, K, D, HW]
    lse,  # [E, Q, K, HW]
    query_stats,  # [E, Q, 2, HW]
    # outputs
    grad_feat,  # [E, Q, D, HW]
    delta,  # [E, Q, K, HW]: <dO, G>, for the other kernel
    temperature_terms,  # [E, Q, tiles]: sum of dS c
    n_total,
    queries,
    ways,
    pixels,
    feat_e,
    feat_q,
    feat_d,
    feat_hw,
    grad_e,
    grad_q,
    grad_k,
    grad_d,
    grad_hw,
    agg_d,
    agg_hw,
    D: tl.constexpr,
    EPS: tl.constexpr,
    CONCAT: tl.constexpr,
    TEMPERATURE_IS_TENSOR: tl.constexpr,
    CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    OUT_CHUNKS: tl.constexpr,
):
    """Gradient dF of BLOCK_M pixels, summed over the classes."""
    ACC: tl.constexpr = tl.float64 if feat.dtype.element_ty == tl.float64 else tl.float32
    dtype = feat.dtype.element_ty

    part, pid = own_slice(tl.program_id(0), D, CHUNK, OUT_CHUNKS)
    tiles = tl.cdiv(pixels, BLOCK_M)
    tile = pid % tiles
    image = pid // tiles
    query = image % queries
    episode = image // queries

    pix = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    pix_ok = pix < pixels
    channels = tl.arange(0, CHUNK)
    feat += episode.to(tl.int64) * feat_e + query.to(tl.int64) * feat_q
    grad_out += episode.to(tl.int64) * grad_e + query.to(tl.int64) * grad_q
    grad_enhanced = grad_out + (D * grad_d if CONCAT else 0)

    query_stats += image.to(tl.int64) * 2 * pixels
    mean_q, rnorm_q = load_statistics(query_stats, pix, pix_ok, pixels)
    # The accumulator holds dF times a power of two near the norm of F, see docs/kernels/triton.md.
    power = power_of_two_near(of_constant(rnorm_q, EPS))
    rnorm_power = of_constant(rnorm_q, EPS) * power

    acc = ()
    for _ in tl.static_range(OUT_CHUNKS):
        acc = acc + (tl.zeros([BLOCK_M, CHUNK], ACC),)
    sum_cos = tl.zeros([BLOCK_M], ACC)  # sum_j dS c
    sum_mean = tl.zeros([BLOCK_M], ACC)  # sum_j dS r(P) mean(P), scaled as the accumulator

    for way in range(ways):
        begin, count, valid = load_bag(offsets, episode * ways + way, n_total)
        scale = exponent_scale(temperature, count, TEMPERATURE_IS_TENSOR, ACC)
        scale = tl.where(valid, scale, float("nan"))
        bag_protos = protos + begin.to(tl.int64) * D
        map_index = (image * ways + way).to(tl.int64)
        bag_grad = grad_enhanced + tl.cast(way, tl.int64) * grad_k
        bag_agg = agg + map_index * D * pixels
        lse_q = tl.load(lse + map_index * pixels + pix, mask=pix_ok, other=0.0)

        # dO, and delta = <dO, G>.
        delta_q = tl.zeros([BLOCK_M], ACC)
        sum_grad = tl.zeros([BLOCK_M], ACC)  # sum_d dO
        for ch in range(0, D, CHUNK):
            do = load_grad_agg(
                feat, feat_d, feat_hw, bag_grad, grad_d, grad_hw, pix, pix_ok, ch, channels, D
            )
            g = load_tile(bag_agg, pix, agg_hw, pix_ok, ch, channels, agg_d, D)
            delta_q += tl.sum(do.to(ACC) * g.to(ACC), 1)
            sum_grad += tl.sum(do.to(ACC), 1)
        if part == 0:
            tl.store(delta + map_index * pixels + pix, delta_q, mask=pix_ok)

        for start in range(0, count, BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N)
            row_ok = rows < count
            mean_p, rnorm_p = load_statistics(proto_stats + begin, rows, row_ok, n_total)

            product = tl.zeros([BLOCK_M, BLOCK_N], ACC)
            grad_weight = tl.zeros([BLOCK_M, BLOCK_N], ACC)  # dA
            for ch in range(0, D, CHUNK):
                f = load_tile(feat, pix, feat_hw, pix_ok, ch, channels, feat_d, D)
                do = load_grad_agg(
                    feat, feat_d, feat_hw, bag_grad, grad_d, grad_hw, pix, pix_ok, ch, channels, D
                )
                p = load_tile(bag_protos, rows, D, row_ok, ch, channels, 1, D)
                pt = tl.trans(centre(p, mean_p, ch, channels, D, CENTRED))
                f = centre(f, mean_q, ch, channels, D, CENTRED)
                product = tl.dot(f, pt, product, input_precision=PRECISION, out_dtype=ACC)
                grad_weight = tl.dot(do, pt, grad_weight, input_precision=PRECISION, out_dtype=ACC)
            if CENTRED:
                grad_weight += sum_grad[:, None] * mean_p[None, :]

            cos = cosine(product, mean_q, mean_p, rnorm_q, rnorm_p, D, CENTRED)
            a = tl.where(row_ok[None, :], tl.exp2(cos * scale - lse_q[:, None]), 0.0)
            grad_cos = a * (grad_weight - delta_q[:, None]) * (scale * LN2)  # dS
            sum_cos += tl.sum(grad_cos * cos, 1)
            # A constant prototype has c = 0 whatever F is: its reciprocal norm is 0 here.
            coefficients = (grad_cos * (rnorm_power[:, None] * rnorm_p[None, :])).to(dtype)
            if not CENTRED:
                sum_mean += tl.sum(coefficients.to(ACC) * mean_p[None, :], 1)
            updated = ()
            for i in tl.static_range(OUT_CHUNKS):
                ch = (part * OUT_CHUNKS + i) * CHUNK
                key = load_tile(bag_protos, rows, D, row_ok, ch, channels, 1, D)
                key = centre(key, mean_p, ch, channels, D, CENTRED)
                updated = updated + (
                    tl.dot(coefficients, key, acc[i], input_precision=PRECISION, out_dtype=ACC),
                )
            acc = updated

        # A bag whose offsets make no sense: its pixels get NaN, as in the forward.
        sum_cos = tl.where(valid, sum_cos, float("nan"))

    projection = projection_factor(rnorm_q, EPS) * sum_cos
    grad_feat += image.to(tl.int64) * D * pixels
    agg += image.to(tl.int64) * ways * D * pixels
    for i in tl.static_range(OUT_CHUNKS):
        ch = (part * OUT_CHUNKS + i) * CHUNK
        f = load_tile(feat, pix, feat_hw, pix_ok, ch, channels, feat_d, D).to(ACC)
        df = (acc[i] - sum_mean[:, None]) / power[:, None]
        df -= (f - mean_q[:, None]) * projection[:, None]
        # The steps from class to class are 64 bits wide; as pointers they cost fewest registers.
        way_grad = grad_enhanced
        way_copy = grad_out
        way_agg = agg
        for _ in range(ways):
            dy = load_tile(way_grad, pix, grad_hw, pix_ok, ch, channels, grad_d, D)
            g = load_tile(way_agg, pix, agg_hw, pix_ok, ch, channels, agg_d, D)
            df += dy.to(ACC) * g.to(ACC)
            if CONCAT:
                dy = load_tile(way_copy, pix, grad_hw, pix_ok, ch, channels, grad_d, D)
                df += dy.to(ACC)
            way_grad += grad_k
            way_copy += grad_k
            way_agg += D * pixels
        store_tile(grad_feat, df.to(dtype), pix, agg_hw, pix_ok, ch, channels, agg_d, D)
    if part == 0:
        tl.store(temperature_terms + image * tiles + tile, tl.sum(sum_cos, 0))


@triton.jit
def find_bag(offsets, tile, bags, BLOCK_N: tl.constexpr, SEARCH: tl.constexpr):
    """The bag that owns tile ``tile`` of the prototypes; ``bags`` for the rows of no bag.

    Bag b owns the tiles from offsets[b] // BLOCK_N + b on: a few more than it needs, and neither
    the host nor a scan over all bags has to know how many those are.
    """
    owners = tl.zeros([SEARCH], tl.int32)
    for start in range(0, bags + 1, SEARCH):
        bag = start + tl.arange(0, SEARCH)
        ok = bag <= bags
        # Clamped, so that no offset, whatever it is, leads to a row before the first.
        first_row = tl.maximum(tl.load(offsets + bag, mask=ok, other=0), 0)
        first_tile = first_row // BLOCK_N + bag
        owners += (ok & (first_tile <= tile)).to(tl.int32)
    return tl.maximum(tl.sum(owners, 0) - 1, 0)


@triton.jit(do_not_specialize=["n_total"])
def backward_protos_kernel(
    # inputs
    grad_out,  # [E, Q, K, 2D or D, HW]
    feat,  # [E, Q, D, HW]
    protos,  # [N_total, D]
    offsets,  # [E*K + 1]
    temperature,  # number, or tensor with one element
    proto_stats,  # [2, N_total]
    lse,  # [E, Q, K, HW]
    query_stats,  # [E, Q, 2, HW]
    delta,  # [E, Q, K, HW]
    # outputs
    grad_protos,  # [N_total, D]
    n_total,
    bags,
    queries,
    ways,
    pixels,
    feat_e,
    feat_q,
    feat_d,
    feat_hw,
    grad_e,
    grad_q,
    grad_k,
    grad_d,
    grad_hw,
    D: tl.constexpr,
    EPS: tl.constexpr,
    CONCAT: tl.constexpr,
    TEMPERATURE_IS_TENSOR: tl.constexpr,
    CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    OUT_CHUNKS: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """Gradient dP of BLOCK_N prototypes of one bag, summed over its queries."""
    ACC: tl.constexpr = tl.float64 if feat.dtype.element_ty == tl.float64 else tl.float32
    dtype = feat.dtype.element_ty

    part, tile = own_slice(tl.program_id(0), D, CHUNK, OUT_CHUNKS)
    bag = find_bag(offsets, tile, bags, BLOCK_N, SEARCH)
    first_row = tl.load(offsets + bag)
    is_bag = bag < bags
    end = tl.load(offsets + bag + 1, mask=is_bag, other=n_total)
    first_row = tl.maximum(first_row, 0)
    end = tl.minimum(end, n_total)
    count = tl.where(is_bag, end - first_row, 0)
    first_row += (tile - first_row // BLOCK_N - bag) * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    row_ok = first_row + rows < end
    protos += first_row.to(tl.int64) * D
    grad_protos += first_row.to(tl.int64) * D

    channels = tl.arange(0, CHUNK)
    mean_p, rnorm_p = load_statistics(proto_stats + first_row, rows, row_ok, n_total)
    # Scales dS r(P) into the range of float16; bounded, because A is scaled with it.
    power = tl.minimum(tl.maximum(power_of_two_near(of_constant(rnorm_p, EPS)), 1.0), 1024.0)
    rnorm_power = of_constant(rnorm_p, EPS) * power
    scale = exponent_scale(temperature, count, TEMPERATURE_IS_TENSOR, ACC)

    acc = ()
    for _ in tl.static_range(OUT_CHUNKS):
        acc = acc + (tl.zeros([BLOCK_N, CHUNK], ACC),)
    sum_cos = tl.zeros([BLOCK_N], ACC)  # sum_i dS c
    sum_mean = tl.zeros([BLOCK_N], ACC)  # sum_i dS r(F) mean(F), scaled as the accumulator

    tiles = tl.cdiv(pixels, BLOCK_M)
    # Tiles past the end of their bag have nothing to do.
    steps = tl.where(is_bag & (first_row < end), queries * tiles, 0)
    episode = bag // ways
    way = bag % ways
    feat += episode.to(tl.int64) * feat_e
    grad_out += episode.to(tl.int64) * grad_e + way.to(tl.int64) * grad_k
    if CONCAT:
        grad_out += D * grad_d
    for step in range(steps):
        query = step // tiles
        pix = (step % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        pix_ok = pix < pixels
        image = (episode * queries + query).to(tl.int64)
        maps = feat + query.to(tl.int64) * feat_q
        grads = grad_out + query.to(tl.int64) * grad_q
        image_stats = query_stats + image * 2 * pixels
        mean_q, rnorm_q = load_statistics(image_stats, pix, pix_ok, pixels)
        map_pixels = (image * ways + way) * pixels + pix
        lse_q = tl.load(lse + map_pixels, mask=pix_ok, other=0.0)
        delta_q = tl.load(delta + map_pixels, mask=pix_ok, other=0.0)

        product = tl.zeros([BLOCK_N, BLOCK_M], ACC)
        grad_weight = tl.zeros([BLOCK_N, BLOCK_M], ACC)  # dA
        sum_grad = tl.zeros([BLOCK_M], ACC)
        for ch in range(0, D, CHUNK):
            f = load_tile(maps, pix, feat_hw, pix_ok, ch, channels, feat_d, D)
            do = load_grad_agg(
                maps, feat_d, feat_hw, grads, grad_d, grad_hw, pix, pix_ok, ch, channels, D
            )
            p = load_tile(protos, rows, D, row_ok, ch, channels, 1, D)
            p = centre(p, mean_p, ch, channels, D, CENTRED)
            f = centre(f, mean_q, ch, channels, D, CENTRED)
            if CENTRED:
                sum_grad += tl.sum(do, 1)
            product = tl.dot(p, tl.trans(f), product, input_precision=PRECISION, out_dtype=ACC)
            grad_weight = tl.dot(
                p, tl.trans(do), grad_weight, input_precision=PRECISION, out_dtype=ACC
            )
        if CENTRED:
            grad_weight += mean_p[:, None] * sum_grad[None, :]

        cos = cosine(product, mean_p, mean_q, rnorm_p, rnorm_q, D, CENTRED)
        a = tl.exp2(cos * scale - lse_q[None, :])
        grad_cos = a * (grad_weight - delta_q[None, :]) * (scale * LN2)  # dS
        sum_cos += tl.sum(grad_cos * cos, 1)
        # A constant pixel has c = 0 whatever P is: its reciprocal norm is 0 here.
        coefficients = (grad_cos * (rnorm_power[:, None] * rnorm_q[None, :])).to(dtype)
        if not CENTRED:
            sum_mean += tl.sum(coefficients.to(ACC) * mean_q[None, :], 1)
        weights = (a * power[:, None]).to(dtype)
        updated = ()
        for i in tl.static_range(OUT_CHUNKS):
            ch = (part * OUT_CHUNKS + i) * CHUNK
            f = load_tile(maps, pix, feat_hw, pix_ok, ch, channels, feat_d, D)
            f = centre(f, mean_q, ch, channels, D, CENTRED)
            do = load_grad_agg(
                maps, feat_d, feat_hw, grads, grad_d, grad_hw, pix, pix_ok, ch, channels, D
            )
            new = tl.dot(weights, do, acc[i], input_precision=PRECISION, out_dtype=ACC)
            new = tl.dot(coefficients, f, new, input_precision=PRECISION, out_dtype=ACC)
            updated = updated + (new,)
        acc = updated

    projection = projection_factor(rnorm_p, EPS) * sum_cos
    for i in tl.static_range(OUT_CHUNKS):
        ch = (part * OUT_CHUNKS + i) * CHUNK
        p = load_tile(protos, rows, D, row_ok, ch, channels, 1, D).to(ACC)
        dp = (acc[i] - sum_mean[:, None]) / power[:, None]
        dp -= (p - mean_p[:, None]) * projection[:, None]
        dp = tl.where(is_bag, dp, 0.0)  # rows of no bag may hold anything
        store_tile(grad_protos, dp.to(dtype), rows, D, row_ok, ch, channels, 1, D)
