// SPDX-License-Identifier: Apache-2.0
// Of backward_protos.cuh: what a block has, and its producing warps.
#pragma once

#include "backward_tiles.cuh"

namespace fastproto::cuda::sm90 {

struct BackwardProtosMaps {
  TensorMap feat;      // [E][Q]
  TensorMap enhanced;  // dY2 [E][Q][K]
  TensorMap protos;
  MapSteps feat_steps, grad_steps;
  Turns turns;
};

template <class T, int Dim, bool ChannelsLast>
struct BackwardProtosTraits : BackwardTraits<T, Dim, ChannelsLast, 232, 40> {
  static constexpr int kRing = backward_protos_ring(Dim);
  static constexpr int kPairBytes = 2 * kBoxBytes;  // F, then dO

  static constexpr int kProtos = 0;
  static constexpr int kRingAt = kProtos + Dim / kBox * kBoxBytes;
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
  static_assert(kSharedBytes <= kSharedLimit);
};

template <class Traits>
struct BackwardProtosShared {
  uint8_t* base = shared_memory();
  uint8_t* protos = base + Traits::kProtos;
  uint8_t* ring = base + Traits::kRingAt;
  uint8_t* exchange = base + Traits::kExchange;
  float* stats = reinterpret_cast<float*>(base + Traits::kStats);
  float* rows = reinterpret_cast<float*>(base + Traits::kRows);
  float* scale = reinterpret_cast<float*>(base + Traits::kScale);
  int* place = reinterpret_cast<int*>(base + Traits::kPlace);
  Barrier* protos_full = reinterpret_cast<Barrier*>(base + Traits::kBarriers);
  Barrier* ring_full = protos_full + 1;              // F and dY2 are there
  Barrier* ring_formed = ring_full + Traits::kRing;  // dO is
  Barrier* ring_empty = ring_formed + Traits::kRing;
  Barrier* stats_full = ring_empty + Traits::kRing;
  Barrier* stats_empty = stats_full + 2;

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

}  // namespace fastproto::cuda::sm90
