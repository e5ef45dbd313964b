# SPDX-License-Identifier: Apache-2.0
"""Kernels that pack the prototypes a mask selects, so that no size has to reach the host.

A bag (one class of one episode) has C + 1 candidates: its C = S*hw cells and their weighted
average. Kept candidates of all bags come first, in their order; then, all zeros, a spare row for
every other candidate. So each row has one owner, and no atomics are needed.

``position`` holds a candidate's rank r among the kept ones of its bag, or -1 - r if it is not kept
itself: r then counts the kept ones before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastproto.triton.tiles import load_tile, store_tile

TINY = tl.constexpr(2.0**-126)  # the smallest normal float32 number


@triton.jit
def select_kernel(
    # inputs
    share,  # [E*K, C]
    # outputs
    position,  # [E*K, C + 1]
    counts,  # [E*K]: kept candidates
    mass,  # [E*K]: sum of the shares
    threshold,
    cells,
    APPEND_GLOBAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Which candidates of one bag are kept, and where."""
    bag = tl.program_id(0)
    share += bag * cells
    position += bag * (cells + 1)
    picked = 0
    total = 0.0
    for start in range(0, cells, BLOCK):
        cell = start + tl.arange(0, BLOCK)
        ok = cell < cells
        s = tl.load(share + cell, mask=ok, other=0.0)
        kept = ok & (s > threshold)
        one = kept.to(tl.int32)
        rank = picked + tl.cumsum(one, 0) - one
        tl.store(position + cell, tl.where(kept, rank, -1 - rank), mask=ok)
        picked += tl.sum(one, 0)
        total += tl.sum(s, 0)
    wanted = total > 0
    if not APPEND_GLOBAL:
        wanted = wanted & (picked == 0)
    tl.store(position + cells, tl.where(wanted, picked, -1 - picked))
    tl.store(counts + bag, picked + wanted.to(tl.int32))
    tl.store(mass + bag, total)


@triton.jit
def first_row(counts, bag, bags, BAGS: tl.constexpr):
    """First row of a bag, and the number of rows of all bags."""
    before = tl.zeros([BAGS], tl.int32)
    total = tl.zeros([BAGS], tl.int32)
    for start in range(0, bags, BAGS):
        other = start + tl.arange(0, BAGS)
        count = tl.load(counts + other, mask=other < bags, other=0)
        before += tl.where(other < bag, count, 0)
        total += count
    return tl.sum(before, 0), tl.sum(total, 0)


@triton.jit
def destination(position, candidate, bag, first, total, cells):
    """The row of a candidate."""
    rows_before = bag * (cells + 1) + candidate
    kept_before = first - 1 - position  # of one that is not kept
    row = tl.where(position >= 0, first + position, total + rows_before - kept_before)
    return row.to(tl.int64)


@triton.jit
def copy_cells(
    features,
    position,
    counts,
    protos,
    pid,
    bags,
    ways,
    shots,
    pixels,
    feat_e,
    feat_s,
    feat_d,
    feat_hw,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BAGS: tl.constexpr,
):
    """The rows of BLOCK cells of one shot and bag, CHUNK channels of them."""
    CHUNKS: tl.constexpr = (D + CHUNK - 1) // CHUNK
    ch = pid % CHUNKS * CHUNK
    pid //= CHUNKS
    tiles = tl.cdiv(pixels, BLOCK)
    pix = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    pix_ok = pix < pixels
    pid //= tiles
    shot = pid % shots
    bag = pid // shots

    cells = shots * pixels
    cell = shot * pixels + pix
    first, total = first_row(counts, bag, bags, BAGS)
    place = tl.load(position + bag * (cells + 1) + cell, mask=pix_ok, other=-1)
    row = destination(place, cell, bag, first, total, cells)
    channels = tl.arange(0, CHUNK)
    features += (bag // ways).to(tl.int64) * feat_e + shot.to(tl.int64) * feat_s
    tile = load_tile(
        features, pix.to(tl.int64), feat_hw, place >= 0, ch, channels.to(tl.int64), feat_d, D
    )
    store_tile(protos, tile, row, D, pix_ok, ch, channels, 1, D)


@triton.jit
def write_average(
    features,
    share,
    position,
    counts,
    mass,
    protos,
    offsets,
    pid,
    bags,
    ways,
    shots,
    pixels,
    feat_e,
    feat_s,
    feat_d,
    feat_hw,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BAGS: tl.constexpr,
):
    """The row of one bag's average, CHUNK channels of it, and the end of the bag."""
    ACC: tl.constexpr = tl.float64 if features.dtype.element_ty == tl.float64 else tl.float32
    CHUNKS: tl.constexpr = (D + CHUNK - 1) // CHUNK
    part = pid % CHUNKS
    bag = pid // CHUNKS
    ch = part * CHUNK

    cells = shots * pixels
    place = tl.load(position + bag * (cells + 1) + cells)
    channels = tl.arange(0, CHUNK)
    wide_channels = channels.to(tl.int64)
    features += (bag // ways).to(tl.int64) * feat_e
    share += bag * cells
    tiles = tl.cdiv(pixels, BLOCK)
    acc = tl.zeros([BLOCK, CHUNK], ACC)
    for step in range(tl.where(place >= 0, shots * tiles, 0)):
        shot = step // tiles
        pix = step % tiles * BLOCK + tl.arange(0, BLOCK)
        pix_ok = pix < pixels
        s = tl.load(share + shot * pixels + pix, mask=pix_ok, other=0.0)
        shot_features = features + shot.to(tl.int64) * feat_s
        f = load_tile(
            shot_features, pix.to(tl.int64), feat_hw, pix_ok, ch, wide_channels, feat_d, D
        )
        acc += s.to(ACC)[:, None] * f.to(ACC)
    first, total = first_row(counts, bag, bags, BAGS)
    row = destination(place, cells, bag, first, total, cells)
    if part == 0:
        tl.store(offsets + bag + 1, first + tl.load(counts + bag))
        if bag == 0:
            tl.store(offsets, first)
    average = tl.sum(acc, 0) / tl.maximum(tl.load(mass + bag), TINY).to(ACC)
    target = protos + row * D + ch + channels
    tl.store(target, average.to(protos.dtype.element_ty), mask=ch + channels < D)


@triton.jit
def pack_kernel(
    # inputs
    features,  # [E, S, D, hw]
    share,  # [E*K, C]
    position,  # [E*K, C + 1]
    counts,  # [E*K]
    mass,  # [E*K]
    # outputs
    protos,  # [E*K*(C + 1), D]
    offsets,  # [E*K + 1]
    bags,
    ways,
    shots,
    pixels,
    feat_e,
    feat_s,
    feat_d,
    feat_hw,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    AVERAGE_BLOCK: tl.constexpr,
    AVERAGE_CHUNK: tl.constexpr,
    BAGS: tl.constexpr,
):
    """Every row of the prototypes; the averages' programs, which take longest, come first."""
    pid = tl.program_id(0)
    averages = bags * ((D + AVERAGE_CHUNK - 1) // AVERAGE_CHUNK)
    if pid < averages:
        write_average(
            features,
            share,
            position,
            counts,
            mass,
            protos,
            offsets,
            pid,
            bags,
            ways,
            shots,
            pixels,
            feat_e,
            feat_s,
            feat_d,
            feat_hw,
            D,
            AVERAGE_BLOCK,
            AVERAGE_CHUNK,
            BAGS,
        )
    else:
        copy_cells(
            features,
            position,
            counts,
            protos,
            pid - averages,
            bags,
            ways,
            shots,
            pixels,
            feat_e,
            feat_s,
            feat_d,
            feat_hw,
            D,
            BLOCK,
            CHUNK,
            BAGS,
        )


@triton.jit
def pack_backward_kernel(
    # inputs
    grad_protos,  # [E*K*(C + 1), D]
    share,  # [E*K, C]
    position,  # [E*K, C + 1]
    mass,  # [E*K]
    offsets,  # [E*K + 1]
    # outputs
    grad_features,  # [E, S, D, hw]
    ways,
    shots,
    pixels,
    feat_d,
    feat_hw,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gradient of BLOCK cells of one shot, CHUNK channels of it, summed over the classes."""
    ACC: tl.constexpr = tl.float64 if grad_protos.dtype.element_ty == tl.float64 else tl.float32
    CHUNKS: tl.constexpr = (D + CHUNK - 1) // CHUNK
    pid = tl.program_id(0)
    ch = pid % CHUNKS * CHUNK
    pid //= CHUNKS
    tiles = tl.cdiv(pixels, BLOCK)
    pix = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    pix_ok = pix < pixels
    image = pid // tiles
    shot = image % shots
    episode = image // shots

    cells = shots * pixels
    cell = shot * pixels + pix
    channels = tl.arange(0, CHUNK)
    acc = tl.zeros([BLOCK, CHUNK], ACC)
    for way in range(ways):
        bag = episode * ways + way
        bag_position = position + bag * (cells + 1)
        bag_grad = grad_protos + tl.load(offsets + bag).to(tl.int64) * D
        place = tl.load(bag_position + cell, mask=pix_ok, other=-1)
        grad = load_tile(bag_grad, place.to(tl.int64), D, place >= 0, ch, channels, 1, D)
        average = tl.load(bag_position + cells)
        grad_average = tl.load(
            bag_grad + average.to(tl.int64) * D + ch + channels,
            mask=ch + channels < tl.where(average >= 0, D, 0),
            other=0.0,
        )
        weight = tl.load(share + bag * cells + cell, mask=pix_ok, other=0.0).to(ACC)
        weight /= tl.maximum(tl.load(mass + bag), TINY).to(ACC)
        acc += grad.to(ACC) + weight[:, None] * grad_average.to(ACC)[None, :]
    grad_features += image.to(tl.int64) * D * pixels
    store_tile(
        grad_features,
        acc.to(grad_features.dtype.element_ty),
        pix.to(tl.int64),
        feat_hw,
        pix_ok,
        ch,
        channels.to(tl.int64),
        feat_d,
        D,
    )
