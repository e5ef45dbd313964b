// SPDX-License-Identifier: Apache-2.0
// Of forward.cuh: what a block has, its producing warp, and the statistics of its queries.
#pragma once

#include "forward.h"
#include "tiles.cuh"

namespace fastproto::cuda::sm90 {

template <class Type, int Dim, bool IsChannelsLast>
struct ForwardTraits {
  using T = Type;
  static constexpr bool kChannelsLast = IsChannelsLast;
  static constexpr int kDim = Dim;
  static constexpr int kTile = kBox;  // queries of a block; prototypes of a tile
  static constexpr int kSlices = kDim / kBox;
  static constexpr int kHalfSlices = kSlices / 2;  // one consumer's channels of G
  static constexpr int kHalf = kDim / 2;
  static constexpr int kStages = forward_stages(kDim);
  static constexpr int kConsumers = 256;
  static constexpr int kThreads = kConsumers + 128;
  static constexpr int kStagings = 4;  // two boxes for each consumer; W of the stages before that

  static constexpr int kTileBytes = kSlices * kBoxBytes;
  static constexpr int kQuery = 0;
  static constexpr int kProtos = kQuery + kTileBytes;
  static constexpr int kWeights = kProtos + kStages * kTileBytes;
  static constexpr int kBarriers = kWeights + kStagings * kBoxBytes;
  static constexpr int kNumBarriers = kStages * (kSlices + 2) + kSlices + 2;
  static constexpr int kQueryStats = kBarriers + 8 * kNumBarriers;  // [2][kTile] floats
  static constexpr int kProtoStats = kQueryStats + 8 * kTile;       // [consumer][2][kTile]
  static constexpr int kRowSums = kProtoStats + 16 * kTile;         // [consumer][kTile]
  static constexpr int kRowMaxima = kRowSums + 8 * kTile;           // [consumer][kTile]
  static constexpr int kSharedBytes = kRowMaxima + 8 * kTile;

  static_assert(kDim == 256 || kDim == 512, "WGMMA is 128 or 256 columns wide");
  static_assert(kStages <= kStagings, "a W for each stage");
  static_assert(8 * 2 * 4 * kTile <= kStages * kBoxBytes, "partial sums lie where W does");
  static_assert(kSharedBytes == forward_bytes(kDim) && kThreads == forward_threads(), "the plan");
  static_assert(kSharedBytes <= kSharedLimit, "shared memory of a multiprocessor");
};

struct ForwardMaps {
  TensorMap feat;        // 4D: pixels, channels (or swapped), Q, E
  TensorMap protos;      // 2D: channels, rows
  TensorMap out_feat;    // 3D: pixels, channels (or swapped), E*Q*K: the first half of Y
  TensorMap out_second;  // G*F
  TensorMap agg;
  MapSteps feat_steps;
};

namespace forward_detail {

// Named barriers.
constexpr int kAllConsumers = 1;
constexpr int kOneConsumer = 2;  // + warpgroup

template <class Traits>
struct Shared {
  uint8_t* base = shared_memory();

  FP_DEVICE uint8_t* query(int slice) const { return base + Traits::kQuery + slice * kBoxBytes; }
  FP_DEVICE uint8_t* protos(int slot, int slice) const {
    return base + Traits::kProtos + (slot * Traits::kSlices + slice) * kBoxBytes;
  }
  FP_DEVICE uint8_t* weights(int slot) const { return base + Traits::kWeights + slot * kBoxBytes; }
  FP_DEVICE uint8_t* staging(int group, int i) const { return weights(2 * group + i); }
  FP_DEVICE float* floats(int at) const { return reinterpret_cast<float*>(base + at); }

  FP_DEVICE Barrier* barriers() const {
    return reinterpret_cast<Barrier*>(base + Traits::kBarriers);
  }
  // A slice of a tile has come.
  FP_DEVICE Barrier* full(int slot, int slice) const {
    return barriers() + slot * Traits::kSlices + slice;
  }
  // Consumer `group` needs its half of the tile's channels no more. It says so after it has seen
  // the weights of the tile, for which all channels were read.
  FP_DEVICE Barrier* empty(int slot, int group) const {
    return barriers() + Traits::kStages * Traits::kSlices + 2 * slot + group;
  }
  FP_DEVICE Barrier* query_full(int slice) const {
    return barriers() + Traits::kStages * (Traits::kSlices + 2) + slice;
  }
  FP_DEVICE Barrier* query_empty(int group) const {
    return barriers() + Traits::kStages * (Traits::kSlices + 2) + Traits::kSlices + group;
  }
};

// A block's piece of work: 64 pixels of an image, for one class. Neighbours share prototypes.
struct Work {
  int pixel;
  int query;
  int episode;
  int bag;
  int way;
  int image;
  int map;
};
FP_DEVICE Work find_work(const Problem& p, int tiles, int item) {
  Work w;
  w.pixel = item % tiles * kBox;
  item /= tiles;
  w.query = item % p.queries;
  w.bag = item / p.queries;
  w.episode = w.bag / p.ways;
  w.way = w.bag % p.ways;
  w.image = w.episode * p.queries + w.query;
  w.map = w.image * p.ways + w.way;
  return w;
}

// ---------------------------------------------------------------- producer

// The slice of prototypes that consumer `group` multiplies `i`-th: its own half first, which was
// given back first.
template <class Traits>
FP_DEVICE int slice_in_order(int group, int i) {
  return (group * Traits::kHalfSlices + i) % Traits::kSlices;
}

template <class Traits>
FP_DEVICE void load_half_tile(const Shared<Traits>& shared, const TensorMap* map, uint32_t count,
                              int half, int row) {
  const int slot = Places<Traits::kStages>::slot(count);
  barrier_wait(shared.empty(slot, half), Places<Traits::kStages>::parity(count) ^ 1);
  FP_UNROLL
  for (int i = 0; i < Traits::kHalfSlices; ++i) {
    const int slice = slice_in_order<Traits>(half, i);
    barrier_arrive_expect(shared.full(slot, slice), kBoxBytes);
    tma_load(shared.protos(slot, slice), map, shared.full(slot, slice), slice * kBox, row);
  }
}

// The two tiles of a step, or the last one alone: halves in the order in which they are used.
template <class Traits>
FP_DEVICE void load_step(const Shared<Traits>& shared, const TensorMap* map, uint32_t count,
                         int begin, int tile, int tiles) {
  const int row = begin + tile * Traits::kTile;
  load_half_tile(shared, map, count, 0, row);
  if (tile + 1 < tiles) {
    load_half_tile(shared, map, count + 1, 1, row + Traits::kTile);
    load_half_tile(shared, map, count, 1, row);
    load_half_tile(shared, map, count + 1, 0, row + Traits::kTile);
  } else {
    load_half_tile(shared, map, count, 1, row);
  }
}

template <class Traits>
FP_DEVICE void produce(const ForwardParams& p, const ForwardMaps& maps,
                       const Shared<Traits>& shared, int tiles, int items) {
  uint32_t count = 0;
  int parity = 0;
  for (int item = block_index(); item < items; item += grid_size(), parity ^= 1) {
    const Work work = find_work(p.problem, tiles, item);
    const Bag bag = load_bag(p.offsets, work.bag, p.problem.total);
    const int bag_tiles = (bag.count + Traits::kTile - 1) / Traits::kTile;
    // The first prototypes before the queries, whose place the last results take for longer.
    if (bag_tiles > 0) load_step(shared, &maps.protos, count, bag.begin, 0, bag_tiles);
    for (int i = 0; i < Traits::kSlices; ++i) {
      if (i % Traits::kHalfSlices == 0)
        barrier_wait(shared.query_empty(i / Traits::kHalfSlices), parity ^ 1);
      barrier_arrive_expect(shared.query_full(i), kBoxBytes);
      tma_load(shared.query(i), &maps.feat, shared.query_full(i),
               Traits::kChannelsLast ? i * kBox : work.pixel,
               Traits::kChannelsLast ? work.pixel : i * kBox, work.query * maps.feat_steps.query,
               work.episode * maps.feat_steps.episode);
    }
    for (int tile = 2; tile < bag_tiles; tile += 2)
      load_step(shared, &maps.protos, count + uint32_t(tile), bag.begin, tile, bag_tiles);
    count += uint32_t(bag_tiles);
  }
}

// ---------------------------------------------------------------- consumers

// Mean and reciprocal norm of the block's 64 queries, by all consumers, from the tile in shared
// memory; to shared memory, and to `saved` where wanted. Channels past D do not take part.
template <class Traits>
FP_DEVICE void query_statistics(const Problem& p, const Shared<Traits>& shared, int parity,
                                int pixel, float* saved) {
  using T = typename Traits::T;
  float* const stats = shared.floats(Traits::kQueryStats);
  const int warp = warp_index(), lane = lane_index();
  RowSums sums[2];
  float first[2] = {0, 0};
  const auto keep = [&](int row, RowStatistics s) {
    stats[row] = s.mean;
    stats[Traits::kTile + row] = s.rnorm;
    if (saved != nullptr && pixel + row < p.pixels) {
      saved[pixel + row] = s.mean;
      saved[p.pixels + pixel + row] = s.rnorm;
    }
  };
  if constexpr (Traits::kChannelsLast) {
    // Four lanes a pixel. Even and odd pixels take different pieces: 8 lanes, all 32 banks.
    const int row = 8 * warp + lane / 4;
    FP_NO_UNROLL
    for (int slice = 0; slice < Traits::kSlices; ++slice) {
      barrier_wait(shared.query_full(slice), parity);
      const uint8_t* const box = shared.query(slice);
      if (slice == 0) {
        first[0] = to_float(*reinterpret_cast<const T*>(box + box_offset(row, 0)));
      }
      FP_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int piece = lane % 4 + 4 * ((row ^ i) & 1);
        if (slice * kBox + 8 * piece >= p.dim) continue;
        const Vector16 v = *reinterpret_cast<const Vector16*>(box + box_offset(row, piece));
        FP_UNROLL
        for (int j = 0; j < 4; ++j) {
          float low, high;
          unpack<T>(v.x[j], &low, &high);
          sums[0].add(low - first[0]);
          sums[0].add(high - first[0]);
        }
      }
    }
    FP_UNROLL
    for (int mask = 1; mask <= 2; mask *= 2) {
      sums[0].total += shuffle_xor(sums[0].total, mask);
      sums[0].squares += shuffle_xor(sums[0].squares, mask);
    }
    if (lane % 4 == 0) keep(row, row_statistics(first[0], sums[0], p.dim, p.eps));
  } else {
    // A warp takes every eighth channel, a lane two pixels of it.
    float* const partial = shared.floats(Traits::kWeights);  // [warp][kTile][2]
    FP_NO_UNROLL
    for (int slice = 0; slice < Traits::kSlices; ++slice) {
      barrier_wait(shared.query_full(slice), parity);
      const uint8_t* const box = shared.query(slice);
      if (slice == 0)
        unpack<T>(
            *reinterpret_cast<const uint32_t*>(box + box_offset(0, lane / 4) + 4 * (lane % 4)),
            &first[0], &first[1]);
      const int channels = p.dim - slice * kBox;
      FP_UNROLL
      for (int i = 0; i < kBox; i += 8) {
        if (i >= channels) break;
        float x[2];
        unpack<T>(*reinterpret_cast<const uint32_t*>(box + box_offset(i + warp, lane / 4) +
                                                     4 * (lane % 4)),
                  &x[0], &x[1]);
        sums[0].add(x[0] - first[0]);
        sums[1].add(x[1] - first[1]);
      }
    }
    float* const mine = partial + (warp * Traits::kTile + 2 * lane) * 2;
    mine[0] = sums[0].total;
    mine[1] = sums[0].squares;
    mine[2] = sums[1].total;
    mine[3] = sums[1].squares;
    sync_some(kAllConsumers, Traits::kConsumers);
    const int row = thread_index();
    if (row < Traits::kTile) {
      RowSums all;
      FP_UNROLL
      for (int i = 0; i < 8; ++i) {
        all.total += partial[(i * Traits::kTile + row) * 2];
        all.squares += partial[(i * Traits::kTile + row) * 2 + 1];
      }
      const T x =
          *reinterpret_cast<const T*>(shared.query(0) + box_offset(0, row / 8) + 2 * (row % 8));
      keep(row, row_statistics(to_float(x), all, p.dim, p.eps));
    }
  }
  sync_some(kAllConsumers, Traits::kConsumers);
}

}  // namespace forward_detail

}  // namespace fastproto::cuda::sm90
