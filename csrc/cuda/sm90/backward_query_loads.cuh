// SPDX-License-Identifier: Apache-2.0
// Of backward_query.cuh: what a block has, and its producing warps.
#pragma once

#include "backward_tiles.cuh"

namespace fastproto::cuda::sm90 {

struct BackwardQueryMaps {
  TensorMap feat;       // [E][Q]
  TensorMap enhanced;   // dY2 [E][Q][K]
  TensorMap copy;       // dY1 [E][Q][K], with concat
  TensorMap agg;        // [E*Q*K]
  TensorMap grad_feat;  // [E*Q]
  TensorMap protos;
  MapSteps feat_steps, grad_steps;
  Turns turns;
};

template <class T, int Dim, bool ChannelsLast>
struct BackwardQueryTraits : BackwardTraits<T, Dim, ChannelsLast, 240, 24> {
  static constexpr int kBoxes = Dim / kBox;
  static constexpr int kRing = backward_query_ring(Dim);
  // Boxes of the next tile that the ring holds beside this one's.
  static constexpr int kAhead = kRing - kBoxes < kBoxes ? kRing - kBoxes : kBoxes;

  static constexpr int kFeat = 0;
  static constexpr int kGrad = kFeat + kBoxes * kBoxBytes;
  static constexpr int kRingAt = kGrad + kBoxes * kBoxBytes;
  static constexpr int kExchange = kRingAt + kRing * kBoxBytes;
  // Two stages of a tile's means and reciprocal norms.
  static constexpr int kStats = kExchange + 2 * kExchangeBytes;
  // Parts of sums over the two groups: [2][2][64].
  static constexpr int kSums = kStats + 2 * 2 * kBox * 4;
  // Means and reciprocal norms of the pixels.
  static constexpr int kRows = kSums + 2 * 2 * kBox * 4;
  // First pixel and image: registers are scarce.
  static constexpr int kPlace = kRows + 2 * kBox * 4;
  static constexpr int kBarriers = kPlace + 2 * 4;
  static constexpr int kSharedBytes = kBarriers + 8 * (kBoxes + 1 + 2 * kRing + 4);
  static_assert(kSharedBytes == backward_query_bytes(Dim), "the plan");
  static_assert(kSharedBytes <= kSharedLimit);
};

template <class Traits>
struct BackwardQueryShared {
  uint8_t* base = shared_memory();
  uint8_t* feat = base + Traits::kFeat;
  uint8_t* grad = base + Traits::kGrad;
  uint8_t* ring = base + Traits::kRingAt;
  uint8_t* exchange = base + Traits::kExchange;
  float* stats = reinterpret_cast<float*>(base + Traits::kStats);
  float* sums = reinterpret_cast<float*>(base + Traits::kSums);
  float* rows = reinterpret_cast<float*>(base + Traits::kRows);
  int* place = reinterpret_cast<int*>(base + Traits::kPlace);
  // dY2 of a class, and F with the first: [kBoxes].
  Barrier* grad_full = reinterpret_cast<Barrier*>(base + Traits::kBarriers);
  Barrier* grad_empty = grad_full + Traits::kBoxes;  // dO was read
  Barrier* ring_full = grad_empty + 1;
  Barrier* ring_empty = ring_full + Traits::kRing;
  Barrier* stats_full = ring_empty + Traits::kRing;
  Barrier* stats_empty = stats_full + 2;

  // The accumulator holds dF times a power of two near the norm of F: the coefficients stay in the
  // range of float16. From shared memory where it is wanted: registers are scarce.
  FP_DEVICE float power_of(int row, float eps) const {
    return power_of_two_near(of_constant(rows[kBox + row], eps));
  }
};

// Which part of the problem a block (a cluster) has.
struct PixelTile {
  int first;  // pixel
  int episode;
  int query;
  int image;
  FP_DEVICE PixelTile(const Problem& s, int tile) {
    const int tiles = (s.pixels + kBackwardQueryPixels - 1) / kBackwardQueryPixels;
    first = tile % tiles * kBackwardQueryPixels;
    image = tile / tiles;
    episode = image / s.queries;
    query = image % s.queries;
  }
};

// One lane: everything that comes through the ring, in the order the consumers want it.
template <class Traits>
FP_DEVICE void load_ring(const BackwardParams& p, const BackwardQueryMaps& maps,
                         const BackwardQueryShared<Traits>& shared, const PixelTile& at) {
  using Place = Places<Traits::kRing>;
  const Problem& s = p.problem;
  uint32_t count = 0;
  const auto next = [&](auto load) {
    const int slot = Place::slot(count);
    barrier_wait(shared.ring_empty + slot, Place::parity(count) ^ 1);
    barrier_arrive_expect(shared.ring_full + slot, kBoxBytes);
    load(shared.ring + slot * kBoxBytes, shared.ring_full + slot);
    ++count;
  };
  for (int way = 0; way < s.ways; ++way) {
    FP_NO_UNROLL
    for (int position = 0; position < Traits::kBoxes; ++position) {
      const int channel = box_at<Traits::kBoxes>(position) * kBox;
      const int x = Traits::kChannelsLast ? channel : at.first;
      const int y = Traits::kChannelsLast ? at.first : channel;
      next([&](uint8_t* to, Barrier* full) {
        tma_load(to, &maps.agg, full, x, y, at.image * s.ways + way);
      });
      if (s.concat)
        next([&](uint8_t* to, Barrier* full) {
          tma_load(to, &maps.copy, full, x, y, way * maps.grad_steps.way,
                   at.query * maps.grad_steps.query, at.episode * maps.grad_steps.episode);
        });
    }
    const Bag bag = load_bag(p.offsets, at.episode * s.ways + way, s.total);
    for (int row = maps.turns.rank() * kBox; row < bag.count; row += maps.turns.size() * kBox) {
      FP_NO_UNROLL
      for (int position = 0; position < Traits::kBoxes; ++position) {
        const int channel = box_at<Traits::kBoxes>(position) * kBox;
        next([&](uint8_t* to, Barrier* full) {
          tma_load(to, &maps.protos, full, channel, bag.begin + row);
        });
      }
    }
  }
}

// One lane: F, and dY2 of every class.
template <class Traits>
FP_DEVICE void load_grads(const BackwardParams& p, const BackwardQueryMaps& maps,
                          const BackwardQueryShared<Traits>& shared, const PixelTile& at) {
  for (int way = 0; way < p.problem.ways; ++way) {
    if (way > 0) barrier_wait(shared.grad_empty, (way - 1) & 1);
    FP_NO_UNROLL
    for (int position = 0; position < Traits::kBoxes; ++position) {
      const int box = box_at<Traits::kBoxes>(position);
      const int x = Traits::kChannelsLast ? box * kBox : at.first;
      const int y = Traits::kChannelsLast ? at.first : box * kBox;
      Barrier* full = shared.grad_full + box;
      barrier_arrive_expect(full, way == 0 ? 2 * kBoxBytes : kBoxBytes);
      if (way == 0)
        tma_load(shared.feat + box * kBoxBytes, &maps.feat, full, x, y,
                 at.query * maps.feat_steps.query, at.episode * maps.feat_steps.episode);
      tma_load(shared.grad + box * kBoxBytes, &maps.enhanced, full, x, y, way * maps.grad_steps.way,
               at.query * maps.grad_steps.query, at.episode * maps.grad_steps.episode);
    }
  }
}

// One warp: means and reciprocal norms of every tile of prototypes; zeros past the bag.
template <class Traits>
FP_DEVICE void load_proto_stats(const BackwardParams& p, const BackwardQueryMaps& maps,
                                const BackwardQueryShared<Traits>& shared, const PixelTile& at) {
  const Problem& s = p.problem;
  uint32_t count = 0;
  for (int way = 0; way < s.ways; ++way) {
    const Bag bag = load_bag(p.offsets, at.episode * s.ways + way, s.total);
    const float* mean = p.statistics.protos + bag.begin;
    const int step = maps.turns.size() * kBox;
    for (int first = maps.turns.rank() * kBox; first < bag.count; first += step, ++count) {
      float* to = shared.stats + (count & 1) * 2 * kBox;
      barrier_wait(shared.stats_empty + (count & 1), (count >> 1 & 1) ^ 1);
      for (int i = lane_index(); i < kBox; i += 32) {
        const bool ok = first + i < bag.count;
        to[i] = ok ? mean[first + i] : 0.f;
        to[kBox + i] = ok ? mean[s.total + first + i] : 0.f;
      }
      barrier_arrive(shared.stats_full + (count & 1));
    }
  }
}

}  // namespace fastproto::cuda::sm90
