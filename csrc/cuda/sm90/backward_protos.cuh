// SPDX-License-Identifier: Apache-2.0
// dP of 64 prototypes of one bag, summed over its queries. Symbols as in docs/math.md; the same
// algebra as backward_protos_kernel of fastproto/op/triton/backward.py.
//
//   S^T = P F^T      group 0                    dA^T = P dO^T    group 1
//   dS  = w (dA - delta) / t                    each group for half of the pixels
//   acc += (w 2^k) dO + (dS r(P) 2^k r(F)) F    each group for half of the channels
//
// Budget (D = 512)
//   tile      64 prototypes x 64 pixels x all channels
//   threads   2 consuming warpgroups, 232 registers each (64 x 256 accumulators: 128), and one of
//             producing warps: boxes of F and dY2; dO = dY2 * F in its place (2); statistics
//   shared    P 64 KiB (dP behind), a ring of 9 pairs of boxes 144 KiB, exchange 16 KiB
//   products  4 x 1024 cycles a tile; operands are read from shared memory at its full rate
//   traffic   128 KiB a tile, from the L2 cache where a bag has more tiles: 32 bytes a cycle
//
// Where that is too few blocks for the chip, those of a cluster take turns at the tiles of pixels
// and add up their accumulators (backward_tiles.cuh).
#pragma once

#include "../plan.h"
#include "backward_tiles.cuh"

namespace fastproto::cuda::sm90 {

struct BackwardProtosMaps {
  TensorMap feat;      // [E][Q]
  TensorMap enhanced;  // dY2 [E][Q][K]
  TensorMap protos;
  MapSteps feat_steps, grad_steps;
  Turns turns;
};

template <class T_, int Dim, bool ChannelsLast>
struct BackwardProtosTraits {
  using T = T_;
  static constexpr int kThreads = backward_threads();
  static constexpr int kMaxRegisters = kLaunchRegisters;
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kProducerRegisters = 40;
  static_assert(fits_launch<kThreads>(kConsumerRegisters, kProducerRegisters));
  static constexpr bool kChannelsLast = ChannelsLast;
  static constexpr int kBoxes = Dim / kBox;
  static constexpr int kOwned = kBoxes / 2;  // boxes of channels of one group
  static constexpr int kRing = backward_protos_ring(Dim);
  static constexpr int kPairBytes = 2 * kBoxBytes;  // F, then dO

  static constexpr int kProtos = 0;
  static constexpr int kRingAt = kProtos + kBoxes * kBoxBytes;
  static constexpr int kExchange = kRingAt + kRing * kPairBytes;
  // Two stages of a tile's means, reciprocal norms, lse and delta.
  static constexpr int kStats = kExchange + 2 * kExchangeBytes;
  // Means and reciprocal norms of the prototypes.
  static constexpr int kRows = kStats + 2 * 4 * kBox * 4;
  // log2(e) / t; first row, and end of the bag: registers are scarce.
  static constexpr int kScale = kRows + 2 * kBox * 4;
  static constexpr int kPlace = kScale + 2 * 4;
  static constexpr int kBarriers = kPlace + 2 * 4;
  static constexpr int kSharedBytes = kBarriers + 8 * (1 + 3 * kRing + 4);
  static_assert(kSharedBytes == backward_protos_bytes(Dim), "the plan");
  static_assert(Dim % (2 * kBox) == 0 && kSharedBytes <= kSharedLimit);
  static_assert(kOwned * 32 <= 128, "registers of the accumulator");
};

template <class Traits>
struct BackwardProtosShared {
  uint8_t* protos;
  uint8_t* ring;
  uint8_t* exchange;
  float* stats;
  float* rows;
  float* scale;
  int* place;
  Barrier* protos_full;
  Barrier* ring_full;    // F and dY2 are there
  Barrier* ring_formed;  // dO is
  Barrier* ring_empty;
  Barrier* stats_full;
  Barrier* stats_empty;

  explicit FP_DEVICE BackwardProtosShared(uint8_t* base)
      : protos(base + Traits::kProtos),
        ring(base + Traits::kRingAt),
        exchange(base + Traits::kExchange),
        stats(reinterpret_cast<float*>(base + Traits::kStats)),
        rows(reinterpret_cast<float*>(base + Traits::kRows)),
        scale(reinterpret_cast<float*>(base + Traits::kScale)),
        place(reinterpret_cast<int*>(base + Traits::kPlace)),
        protos_full(reinterpret_cast<Barrier*>(base + Traits::kBarriers)),
        ring_full(protos_full + 1),
        ring_formed(ring_full + Traits::kRing),
        ring_empty(ring_formed + Traits::kRing),
        stats_full(ring_empty + Traits::kRing),
        stats_empty(stats_full + 2) {}

  // Scales dS r(P) into the range of float16; bounded, because w is scaled with it. From shared
  // memory where it is wanted: registers are scarce.
  FP_DEVICE float power_of(int row, float eps) const {
    return fminf(fmaxf(power_of_two_near(of_constant(rows[kBox + row], eps)), 1.f), 1024.f);
  }
};

// Which part of the problem a block (a cluster) has. Bag b owns the tiles from offsets[b] / 64 + b
// on: a few more than it needs, and neither the host nor a scan over all bags has to know how many
// those are. Rows of no bag are those of the bag behind the last.
struct ProtoTile {
  int first;  // row
  int begin;  // of the bag
  int end;
  int episode;
  int way;
  bool is_bag;
  // A whole warp.
  FP_DEVICE ProtoTile(const Problem& s, const int32_t* offsets, int tile) {
    const int bags = s.episodes * s.ways;
    float others = 0;  // that begin here or before
    for (int bag = 1 + lane_index(); bag <= bags; bag += 32)
      // Twice, as an offset that makes no sense may be negative.
      others += bag <= tile && offsets[bag] / kBackwardProtosRows + bag <= tile ? 1.f : 0.f;
    FP_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) others += shuffle_xor(others, mask);
    const int bag = int(others);
    is_bag = bag < bags;
    begin = offsets[bag];
    end = is_bag ? offsets[bag + 1] : s.total;
    // The tile's number less those before begin's: in this order it cannot overflow.
    first = begin % kBackwardProtosRows + (tile - bag) * kBackwardProtosRows;
    episode = bag / s.ways;
    way = bag % s.ways;
  }
};

// Tiles of pixels: of one query, and of all queries those that are this block's.
FP_DEVICE int tiles_of_query(const Problem& s) { return (s.pixels + kBox - 1) / kBox; }
FP_DEVICE uint32_t tiles_of_block(const Problem& s, const Turns& turns) {
  return uint32_t(s.queries * tiles_of_query(s) + turns.size() - 1 - turns.rank()) >> turns.shift;
}
// Calls each(query, first pixel) for every tile of this block.
template <class Each>
FP_DEVICE void for_each_tile(const Problem& s, const Turns& turns, const Each& each) {
  const int per_query = tiles_of_query(s);
  for (int tile = turns.rank(); tile < s.queries * per_query; tile += turns.size())
    each(tile / per_query, tile % per_query * kBox);
}

// One lane: P, then F and dY2 of every tile of pixels.
template <class Traits>
FP_DEVICE void load_pixels(const Problem& s, const BackwardProtosMaps& maps,
                           const BackwardProtosShared<Traits>& shared, const ProtoTile& at) {
  using Place = Places<Traits::kRing>;
  barrier_arrive_expect(shared.protos_full, Traits::kBoxes * kBoxBytes);
  FP_NO_UNROLL
  for (int box = 0; box < Traits::kBoxes; ++box)
    tma_load(shared.protos + box * kBoxBytes, &maps.protos, shared.protos_full, box * kBox,
             at.first);
  uint32_t count = 0;
  for_each_tile(s, maps.turns, [&](int query, int pixel) {
    FP_NO_UNROLL
    for (int position = 0; position < Traits::kBoxes; ++position, ++count) {
      const int channel = box_at<Traits::kBoxes>(position) * kBox;
      const int x = Traits::kChannelsLast ? channel : pixel;
      const int y = Traits::kChannelsLast ? pixel : channel;
      const int slot = Place::slot(count);
      Barrier* full = shared.ring_full + slot;
      uint8_t* to = shared.ring + slot * Traits::kPairBytes;
      barrier_wait(shared.ring_empty + slot, Place::parity(count) ^ 1);
      barrier_arrive_expect(full, Traits::kPairBytes);
      tma_load(to, &maps.feat, full, x, y, query * maps.feat_steps.query,
               at.episode * maps.feat_steps.episode);
      tma_load(to + kBoxBytes, &maps.enhanced, full, x, y, at.way * maps.grad_steps.way,
               query * maps.grad_steps.query, at.episode * maps.grad_steps.episode);
    }
  });
}

// One of two warps: dO in the place of dY2, in every second place of the ring. Not in every second
// pair of boxes: of a place, a warp must have seen every phase, or a parity may be that of the
// phase before the one that is not over.
template <class Traits>
FP_DEVICE void form_grads(const BackwardProtosShared<Traits>& shared, uint32_t pairs, int which) {
  using T = typename Traits::T;
  using Place = Places<Traits::kRing>;
  for (uint32_t count = 0; count < pairs; ++count) {
    const int slot = Place::slot(count);
    if (slot % 2 != which) continue;
    Vector16* feat = reinterpret_cast<Vector16*>(shared.ring + slot * Traits::kPairBytes);
    Vector16* grad = feat + kBoxBytes / 16;
    barrier_wait(shared.ring_full + slot, Place::parity(count));
    FP_NO_UNROLL
    for (int i = lane_index(); i < kBoxBytes / 16; i += 128) {
      Vector16 f[4], g[4];
      FP_UNROLL
      for (int j = 0; j < 4; ++j) {
        f[j] = feat[i + 32 * j];
        g[j] = grad[i + 32 * j];
      }
      FP_UNROLL
      for (int j = 0; j < 4; ++j) {
        FP_UNROLL
        for (int k = 0; k < 4; ++k) g[j].x[k] = multiply_pairs<T>(g[j].x[k], f[j].x[k]);
        grad[i + 32 * j] = g[j];
      }
    }
    fence_async();
    barrier_arrive(shared.ring_formed + slot);
  }
}

// One warp: statistics of the pixels of every tile; zeros past the image.
template <class Traits>
FP_DEVICE void load_pixel_stats(const BackwardParams& p, const BackwardProtosMaps& maps,
                                const BackwardProtosShared<Traits>& shared, const ProtoTile& at) {
  const Problem& s = p.problem;
  uint32_t count = 0;
  for_each_tile(s, maps.turns, [&](int query, int first) {
    const int64_t image = int64_t(at.episode) * s.queries + query;
    const float* query_stats = p.statistics.query + image * 2 * s.pixels;
    const int64_t map_row = (image * s.ways + at.way) * s.pixels;
    float* to = shared.stats + (count & 1) * 4 * kBox;
    barrier_wait(shared.stats_empty + (count & 1), (count >> 1 & 1) ^ 1);
    for (int i = lane_index(); i < kBox; i += 32) {
      const int pixel = first + i;
      const bool ok = pixel < s.pixels;
      to[i] = ok ? query_stats[pixel] : 0.f;
      to[kBox + i] = ok ? query_stats[s.pixels + pixel] : 0.f;
      to[2 * kBox + i] = ok ? p.statistics.lse[map_row + pixel] : 0.f;
      to[3 * kBox + i] = ok ? p.delta[map_row + pixel] : 0.f;
    }
    barrier_arrive(shared.stats_full + (count & 1));
    ++count;
  });
}

// dP from the accumulator and its sums, in the place of P; then to rows of whole vectors.
template <class Traits>
FP_DEVICE void finish_pixel_tiles(const BackwardParams& p, const BackwardProtosMaps& maps,
                                  const BackwardProtosShared<Traits>& shared,
                                  const float (&acc)[Traits::kOwned][32], float (&sum_cos)[2],
                                  float (&sum_mean)[2]) {
  using T = typename Traits::T;
  constexpr int kOwned = Traits::kOwned;
  const Problem& s = p.problem;
  const int index = thread_index_again(), group = index / 128, thread = index % 128;
  const int warp = thread / 32, lane = thread % 32, row = 16 * warp + lane / 4;  // and row + 8
  float* parts = reinterpret_cast<float*>(shared.exchange);
  sync_some(kConsumersBarrier, kConsumers);
  share_sums(parts, group, row, lane, sum_cos, sum_mean);
  const int base = fragment_base<true>(warp, lane);
  const int first = shared.place[0], end = shared.place[1];
  const auto finish = [&](const auto& for_boxes) {
    shared_sums(maps.turns, parts, row, sum_cos, sum_mean);
    float mean_p[2], inverse_power[2], projection[2];
    FP_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int r = row + 8 * h;
      mean_p[h] = shared.rows[r];
      projection[h] = projection_factor(shared.rows[kBox + r], s.eps) * sum_cos[h];
      inverse_power[h] = 1 / shared.power_of(r, s.eps);
    }
    for_boxes([&](int index, const float (&sum)[32]) {
      uint8_t* box = shared.protos + index * kBoxBytes;
      FP_UNROLL
      for (int step = 0; step < 4; ++step) {
        const int offset = fragment_offset<true>(base, step);
        uint32_t x[4];
        load_matrix<false>(x, box + offset);
        FP_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int h = i & 1;
          const int c = 8 * step + 4 * (i / 2) + 2 * h;
          float p0, p1;
          unpack<T>(x[i], &p0, &p1);
          x[i] = pack<T>(
              (sum[c] - sum_mean[h]) * inverse_power[h] - (p0 - mean_p[h]) * projection[h],
              (sum[c + 1] - sum_mean[h]) * inverse_power[h] - (p1 - mean_p[h]) * projection[h]);
        }
        sync_warp();
        store_matrix<false>(box + offset, x);
      }
      sync_warp();
      const int piece = lane % 8, channel = index * kBox + 8 * piece;
      FP_UNROLL
      for (int i = 0; i < 16; i += 4) {
        const int r = 16 * warp + i + lane / 8;
        if (first + r < end && channel < s.dim)
          *reinterpret_cast<Vector16*>(static_cast<T*>(p.grad_protos) + int64_t(first + r) * s.dim +
                                       channel) =
              *reinterpret_cast<const Vector16*>(box + box_offset(r, piece));
      }
    });
  };
  if (maps.turns.size() == 1) {
    finish([&](const auto& finish_box) {
      FP_UNROLL
      for (int q = 0; q < kOwned; ++q) finish_box(group * kOwned + q, acc[q]);
    });
  } else {
    publish_products(shared.ring, group, thread, acc);
    sync_cluster();
    finish([&](const auto& finish_box) {
      gather_products<kOwned>(maps.turns, shared.ring, group, thread, finish_box);
    });
  }
}

template <class Traits>
FP_DEVICE void consume_pixel_tiles(const BackwardParams& p, const BackwardProtosMaps& maps,
                                   const BackwardProtosShared<Traits>& shared) {
  using T = typename Traits::T;
  using Place = Places<Traits::kRing>;
  constexpr bool kChannelsLast = Traits::kChannelsLast;
  constexpr int kOwned = Traits::kOwned;
  const Problem& s = p.problem;
  const int warp = warp_index() % 4, group = warp_index() / 4, lane = lane_index();
  const int thread = thread_index() % 128;
  const int row = 16 * warp + lane / 4;  // and row + 8

  // Descriptors of the operands: with 64 numbers of M or N, `leading` says nothing.
  const uint64_t protos = matrix_descriptor(shared.protos, 0, 1024);
  const uint64_t ring = matrix_descriptor(shared.ring, 0, 1024);

  float acc[kOwned][32];
  FP_UNROLL
  for (int q = 0; q < kOwned; ++q) {
    FP_UNROLL
    for (int i = 0; i < 32; ++i) acc[q][i] = 0;
  }
  float sum_cos[2] = {0, 0};   // sum_i dS c
  float sum_mean[2] = {0, 0};  // sum_i dS r(F) mean(F), scaled as the accumulator

  barrier_wait(shared.protos_full, 0);
  const uint32_t tiles = tiles_of_block(s, maps.turns);
  for (uint32_t tile = 0; tile < tiles; ++tile) {
    const uint32_t count = tile * Traits::kBoxes;  // pairs of boxes that went through the ring
    float frag[32];
    Barrier* ready = group == 0 ? shared.ring_full : shared.ring_formed;
    FP_UNROLL
    for (int position = 0; position < Traits::kBoxes; ++position) {
      const int slot = Place::slot(count + position);
      const uint64_t a = advance(protos, box_at<Traits::kBoxes>(position) * kBoxBytes);
      const uint64_t b = advance(ring, slot * Traits::kPairBytes + group * kBoxBytes);
      barrier_wait(ready + slot, Place::parity(count + position));
      wgmma_begin();
      FP_UNROLL
      for (int step = 0; step < 4; ++step)
        Wgmma<T, 64, false, !kChannelsLast>::run(frag, advance(a, step * kStepBytes<false>),
                                                 advance(b, step * kStepBytes<!kChannelsLast>),
                                                 position + step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(frag);

    float own[16];
    send_products(shared.exchange, group, warp, thread, frag, own);

    const float* stats = shared.stats + (tile & 1) * 4 * kBox + 32 * group + lane % 4 * 2;
    barrier_wait(shared.stats_full + (tile & 1), tile >> 1 & 1);
    const float scale = shared.scale[0], gradient_scale = scale * kLn2;  // 1 / t
    float dim_mean_p[2], rnorm_p[2], rnorm_power[2], power[2];
    FP_UNROLL
    for (int h = 0; h < 2; ++h) {
      dim_mean_p[h] = float(s.dim) * shared.rows[row + 8 * h];
      rnorm_p[h] = shared.rows[kBox + row + 8 * h];
      power[h] = shared.power_of(row + 8 * h, s.eps);
      rnorm_power[h] = of_constant(rnorm_p[h], s.eps) * power[h];
    }
    uint32_t mine[16], theirs[16];  // [4 k + h]: w, [4 k + 2 + h]: dS
    FP_UNROLL
    for (int k = 0; k < 4; ++k) {
      const Vector16 received = received_products(shared.exchange, group, thread, k);
      float mean_q[2], rnorm_q[2], lse[2], delta[2];
      FP_UNROLL
      for (int e = 0; e < 2; ++e) {
        mean_q[e] = stats[8 * k + e];
        rnorm_q[e] = stats[kBox + 8 * k + e];
        lse[e] = stats[2 * kBox + 8 * k + e];
        delta[e] = stats[3 * kBox + 8 * k + e];
      }
      FP_UNROLL
      for (int h = 0; h < 2; ++h) {
        float weight[2], coefficient[2], terms = 0;
        FP_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int i = 4 * k + 2 * h + e;
          const float other = bits_to_float(received.x[2 * h + e]);
          const float product = group == 0 ? own[i] : other;
          const float grad_weight = group == 0 ? other : own[i];
          const float cos = (product - dim_mean_p[h] * mean_q[e]) * (rnorm_p[h] * rnorm_q[e]);
          const float w = exp2_fast(multiply_add(cos, scale, -lse[e]));
          const float grad_cos = w * (grad_weight - delta[e]) * gradient_scale;
          terms = e == 0 ? grad_cos * cos : multiply_add(grad_cos, cos, terms);
          weight[e] = w * power[h];
          // A constant pixel has c = 0 whatever P is: its reciprocal norm is 0 here.
          coefficient[e] = grad_cos * (rnorm_power[h] * rnorm_q[e]);
        }
        mine[4 * k + h] = pack<T>(weight[0], weight[1]);
        sum_cos[h] += terms;  // short chains: long ones hold registers
        // The means come out of the sum with the rounded coefficients that went into it.
        const uint32_t pair = pack<T>(coefficient[0], coefficient[1]);
        float rounded[2];
        unpack<T>(pair, &rounded[0], &rounded[1]);
        sum_mean[h] += multiply_add(rounded[1], mean_q[1], rounded[0] * mean_q[0]);
        mine[4 * k + 2 + h] = pair;
      }
    }
    sync_warp();
    if (lane == 0) barrier_arrive(shared.stats_empty + (tile & 1));
    exchange_coefficients(shared.exchange, group, warp, thread, mine, theirs);

    // acc += w dO + dS F. Group 0 saw F alone so far.
    FP_UNROLL
    for (int q = 0; q < kOwned; ++q) {
      const int slot = Place::slot(count + 2 * q + group);
      const uint64_t b = advance(ring, slot * Traits::kPairBytes);
      if (group == 0) barrier_wait(shared.ring_formed + slot, Place::parity(count + 2 * q));
      wgmma_begin();
      FP_UNROLL
      for (int i = 0; i < 4; ++i) {
        // The weights belong to dO, the second box of a pair.
        const int step = i / 2, from = 8 * step + i % 2 * 2;
        const int box = i % 2 == 0 ? kBoxBytes : 0;
        const uint32_t a[4] = {mine[from], mine[from + 1], mine[from + 4], mine[from + 5]};
        const uint32_t c[4] = {theirs[from], theirs[from + 1], theirs[from + 4], theirs[from + 5]};
        Wgmma<T, 64, false, kChannelsLast>::run(
            acc[q], a, advance(b, box + (2 * group + step) * kStepBytes<kChannelsLast>), 1);
        Wgmma<T, 64, false, kChannelsLast>::run(
            acc[q], c, advance(b, box + (2 - 2 * group + step) * kStepBytes<kChannelsLast>), 1);
      }
      wgmma_commit();
    }
    release_in_turn<kOwned>([&](int q) {
      if (lane == 0) barrier_arrive(shared.ring_empty + Place::slot(count + 2 * q + group));
    });
    FP_UNROLL
    for (int q = 0; q < kOwned; ++q) wgmma_hold(acc[q]);
  }

  finish_pixel_tiles(p, maps, shared, acc, sum_cos, sum_mean);
}

template <class Traits>
FP_KERNEL FP_LAUNCH_BOUNDS(Traits::kThreads, 1)
    backward_protos_kernel(FP_GRID_CONSTANT BackwardParams p,
                           FP_GRID_CONSTANT BackwardProtosMaps maps) {
  const Problem& s = p.problem;
  const BackwardProtosShared<Traits> shared(shared_memory());
  const ProtoTile at(s, p.offsets, maps.turns.cluster_index());
  if (at.first >= at.end) return;  // more than the bag needs
  // Rows of no bag may hold anything, their gradient is zero; offsets that make no sense give NaN.
  if (!at.is_bag || at.begin < 0 || at.end > s.total) {
    using T = typename Traits::T;
    const uint32_t fill = at.is_bag ? pack<T>(not_a_number(), not_a_number()) : 0;
    Vector16* to =
        reinterpret_cast<Vector16*>(static_cast<T*>(p.grad_protos) + int64_t(at.first) * s.dim);
    for (int i = thread_index(); i < kBox * s.dim / 8; i += Traits::kThreads) {
      const int row = at.first + i / (s.dim / 8);
      if (row >= 0 && row < at.end && row < s.total) to[i] = {{fill, fill, fill, fill}};
    }
    return;
  }
  if (thread_index() == 0) {
    shared.scale[0] = exponent_scale(s, at.end - at.begin);
    shared.place[0] = at.first;
    shared.place[1] = at.end;
    barrier_init(shared.protos_full, 1);
    for (int i = 0; i < Traits::kRing; ++i) {
      barrier_init(shared.ring_full + i, 1);
      barrier_init(shared.ring_formed + i, 32);
      barrier_init(shared.ring_empty + i, 4);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared.stats_full + i, 32);
      barrier_init(shared.stats_empty + i, 8);
    }
    barrier_init_fence();
  }
  if (thread_index() < 2 * kBox) {
    const int row = thread_index() % kBox, which = thread_index() / kBox;
    const bool ok = at.first + row < at.end;
    shared.rows[thread_index()] =
        ok ? p.statistics.protos[int64_t(which) * s.total + at.first + row] : 0.f;
  }
  sync_block();

  const int warp = warp_index();
  if (warp >= kConsumers / 32) {
    registers_fewer<Traits::kProducerRegisters>();
    if (warp == 8 && lane_index() == 0) load_pixels<Traits>(s, maps, shared, at);
    if (warp == 9 || warp == 10)
      form_grads<Traits>(shared, tiles_of_block(s, maps.turns) * Traits::kBoxes, warp - 9);
    if (warp == 11) load_pixel_stats<Traits>(p, maps, shared, at);
    attend_sums(maps.turns);
  } else {
    registers_more<Traits::kConsumerRegisters>();
    consume_pixel_tiles<Traits>(p, maps, shared);
  }
}

template <class Traits>
const char* launch_backward_protos_as(const BackwardParams& p, const KernelPlan& plan,
                                      void* stream) {
  const Problem& s = p.problem;
  BackwardProtosMaps maps = {
      {}, {}, {}, MapSteps(p.feat), MapSteps(p.grad_out), Turns(plan.cluster)};
  BackwardMapMaker<Traits> make{p};
  make.features(&maps.feat);
  make.gradients(&maps.enhanced, s.concat ? s.dim : 0);
  make.protos(&maps.protos);
  if (make.error != nullptr) return make.error;
  const Grid grid{plan.blocks, Traits::kThreads, Traits::kSharedBytes, plan.cluster, stream};
  return launch<backward_protos_kernel<Traits>>(grid, p, maps);
}

template <class T>
const char* launch_backward_protos_of(const BackwardParams& p, const KernelPlan& plan,
                                      void* stream) {
  return with_traits<T, BackwardProtosTraits>(p.problem.dim, is_channels_last(p), [&](auto tag) {
    return launch_backward_protos_as<typename decltype(tag)::type>(p, plan, stream);
  });
}

}  // namespace fastproto::cuda::sm90
