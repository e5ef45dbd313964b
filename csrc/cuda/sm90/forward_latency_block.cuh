// SPDX-License-Identifier: Apache-2.0
// Of forward_latency.cuh: what a block of the cluster has, and the phases of its work.
#pragma once

#include "forward.h"
#include "tiles.cuh"

namespace fastproto::cuda::sm90 {

namespace latency_detail {

// Byte of the 16-byte piece `piece` (0, 1: pixels) of channel `channel` in a slice [64][16]:
// swizzled so that 8 channels take all banks.
FP_HOST_DEVICE constexpr int column_offset(int channel, int piece) {
  return channel * 32 + ((piece ^ (channel >> 2 & 1)) << 4);
}
// Byte of piece `piece` (0..3) of row `row` of a block's weights [16][32].
FP_HOST_DEVICE constexpr int weight_offset(int row, int piece) {
  return row * 64 + ((piece ^ (row >> 1 & 3)) << 4);
}

// Adds to `sums` two numbers of a row, relative to its first.
template <class T>
FP_DEVICE void add_pair(RowSums* sums, uint32_t pair, float first) {
  float low, high;
  unpack<T>(pair, &low, &high);
  sums->add(low - first);
  sums->add(high - first);
}
// Over the four lanes that share a row of a fragment.
FP_DEVICE void add_lanes(RowSums* sums) {
  for (int mask = 1; mask <= 2; mask *= 2) {
    sums->total += shuffle_xor(sums->total, mask);
    sums->squares += shuffle_xor(sums->squares, mask);
  }
}

// What a block has, and the phases of its work.
template <class Traits>
struct LatencyBlock {
  using T = typename Traits::T;
  static constexpr int kQueries = Traits::kQueries, kShare = Traits::kShare;
  static constexpr int kColumns = Traits::kColumns, kCluster = Traits::kCluster;
  static constexpr bool kChannelsLast = Traits::kChannelsLast;
  // Of rows of this thread's fragments: queries lane / 4 and + 8, prototypes lane / 4, + 8, ...
  struct Found {
    float first_q[2], first_p[4] = {};
    RowSums sums_q[2], sums_p[4];
  };
  // Of this thread's row of S and its kColumns neighbouring prototypes of the block.
  struct Softmax {
    float mean_q = 0, rnorm_q = 0;  // times D, times scale
    float sum = 0, bound;
  };

  const ForwardParams& p;
  const Problem& problem = p.problem;
  const int thread = thread_index(), warp = warp_index(), lane = lane_index();
  const int rank = cluster_rank();
  uint8_t* const shared = shared_memory();
  // Neighbouring clusters share prototypes.
  const int tiles = (problem.pixels + kQueries - 1) / kQueries;
  const int item = block_index() / kCluster, map_item = item / tiles;
  const int first_pixel = item % tiles * kQueries;
  const int query = map_item % problem.queries, bag_index = map_item / problem.queries;
  const int episode = bag_index / problem.ways, way = bag_index % problem.ways;
  const int image = episode * problem.queries + query;
  const int64_t map = int64_t(image) * problem.ways + way;
  const T* const feat =
      static_cast<const T*>(p.feat.data) + episode * p.feat.episode + query * p.feat.query;
  const Bag bag = load_bag(p.offsets, bag_index, problem.total);
  const T* const protos = static_cast<const T*>(p.protos) + int64_t(bag.begin) * problem.dim;
  const float scale = exponent_scale(problem, bag.count);
  const int passes = bag.count > 0 ? (bag.count + Traits::kPass - 1) / Traits::kPass : 1;
  const bool own_statistics = p.statistics.protos == nullptr;
  // Every warp loads what it will read itself: of queries and keys its slice of channels, of values
  // the prototypes of one block.
  uint8_t* const my_query = shared + Traits::kQuery + warp * Traits::kQueryBytes;
  uint8_t* const my_keys = shared + Traits::kKeys + warp * Traits::kShareBytes;
  uint8_t* const my_values = shared + Traits::kValues + warp * Traits::kShareBytes;
  // S of this thread.
  const int row = thread / Traits::kLanes, column = thread % Traits::kLanes * kColumns;

  FP_DEVICE float* floats(int at) const { return reinterpret_cast<float*>(shared + at); }
  FP_DEVICE int first_row(int pass) const { return pass * Traits::kPass + rank * kShare; }

  // ---- Loads.

  FP_DEVICE void load_protos(uint8_t* to, int row, int channel) const {
    FP_UNROLL
    for (int i = 0; i < kShare / 4; ++i) {
      const int r = 4 * i + lane / 8, c = channel + lane % 8 * 8;
      const bool valid = row + r < bag.count && c < problem.dim;
      const T* const from = protos + int64_t(row + r) * problem.dim + c;
      copy_async_16(to + box_offset(r, lane % 8), valid ? from : protos, valid ? 16 : 0);
    }
    copy_async_commit();
  }
  FP_DEVICE void load_keys(int pass) const { load_protos(my_keys, first_row(pass), warp * kBox); }
  FP_DEVICE void load_values(int pass) const {
    load_protos(my_values, pass * Traits::kPass + warp * kShare, rank * kBox);
  }
  FP_DEVICE void load_queries() const {
    FP_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (kChannelsLast) {
        const int r = 4 * i + lane / 8, c = warp * kBox + lane % 8 * 8;
        const bool valid = first_pixel + r < problem.pixels && c < problem.dim;
        const T* const from = feat + int64_t(first_pixel + r) * p.feat.pixel + c;
        copy_async_16(my_query + box_offset(r, lane % 8), valid ? from : feat, valid ? 16 : 0);
      } else {
        const int c = 16 * i + lane / 2, pixel = first_pixel + lane % 2 * 8;
        const bool valid = pixel < problem.pixels && warp * kBox + c < problem.dim;
        const T* const from = feat + int64_t(warp * kBox + c) * p.feat.channel + pixel;
        copy_async_16(my_query + column_offset(c, lane % 2), valid ? from : feat, valid ? 16 : 0);
      }
    }
  }

  // ---- A pass.

  // The first product: 16 queries, 32 prototypes, this warp's 64 channels. Every number of the
  // operands is in one lane: their statistics cost no loads.
  FP_DEVICE void multiply_keys(float (&s)[4][4], Found& found, bool first_pass) const {
    FP_UNROLL
    for (int k = 0; k < 4; ++k) {
      uint32_t a[4], b[2][4];
      if constexpr (kChannelsLast) {
        load_matrix<false>(a,
                           my_query + box_offset(lane % 8 + lane / 8 % 2 * 8, 2 * k + lane / 16));
      } else {
        load_matrix<true>(
            a, my_query + column_offset(16 * k + lane % 8 + lane / 16 * 8, lane / 8 % 2));
      }
      FP_UNROLL
      for (int n = 0; n < 2; ++n) {
        load_matrix<false>(
            b[n], my_keys + box_offset(16 * n + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
        mma_16816<T>(s[2 * n], a, b[n][0], b[n][1]);
        mma_16816<T>(s[2 * n + 1], a, b[n][2], b[n][3]);
      }
      FP_UNROLL
      for (int h = 0; h < 2; ++h) {
        if (warp * kBox + 16 * k + 8 * h >= problem.dim) continue;
        if (first_pass) {
          add_pair<T>(&found.sums_q[0], a[2 * h], found.first_q[0]);
          add_pair<T>(&found.sums_q[1], a[2 * h + 1], found.first_q[1]);
        }
        if (own_statistics) {
          FP_UNROLL
          for (int n = 0; n < 4; ++n)
            add_pair<T>(&found.sums_p[n], b[n / 2][n % 2 * 2 + h], found.first_p[n]);
        }
      }
    }
  }

  // To shared memory: the warp's part of S in the place of its keys, and of the statistics.
  FP_DEVICE void share_products(const float (&s)[4][4], const Found& found, bool first_pass) const {
    sync_warp();  // its keys are multiplied
    float* const product = floats(Traits::kKeys + warp * Traits::kShareBytes);
    FP_UNROLL
    for (int n = 0; n < 4; ++n) {
      FP_UNROLL
      for (int i = 0; i < 4; ++i)
        product[(lane / 4 + i / 2 * 8) * Traits::kProductStride + 8 * n + lane % 4 * 2 + i % 2] =
            s[n][i];
    }
    const auto keep = [&](int i, RowSums sums, float x) {
      add_lanes(&sums);
      if (lane % 4 == 0) {
        float* const to = floats(Traits::kPartial) + (warp * (kQueries + kShare) + i) * 2;
        to[0] = sums.total;
        to[1] = sums.squares;
        if (warp == 0) floats(Traits::kFirst)[i] = x;
      }
    };
    if (first_pass) {
      keep(lane / 4, found.sums_q[0], found.first_q[0]);
      keep(lane / 4 + 8, found.sums_q[1], found.first_q[1]);
    }
    if (own_statistics) {
      FP_UNROLL
      for (int n = 0; n < 4; ++n)
        keep(kQueries + 8 * n + lane / 4, found.sums_p[n], found.first_p[n]);
    }
    sync_block();
  }
  // Of a row of the queries, or behind them of the prototypes.
  FP_DEVICE RowStatistics statistics(int i) const {
    RowSums all;
    FP_UNROLL
    for (int w = 0; w < Traits::kSlices; ++w) {
      const float* const part = floats(Traits::kPartial) + (w * (kQueries + kShare) + i) * 2;
      all.total += part[0];
      all.squares += part[1];
    }
    return row_statistics(floats(Traits::kFirst)[i], all, problem.dim, problem.eps);
  }
  FP_DEVICE void find_query_statistics(Softmax& softmax) const {
    const RowStatistics q = statistics(row);
    const int pixel = first_pixel + row;
    if (p.statistics.query != nullptr && way == 0 && rank == 0 && column == 0 &&
        pixel < problem.pixels) {
      float* const to = p.statistics.query + int64_t(image) * 2 * problem.pixels + pixel;
      to[0] = q.mean;
      to[problem.pixels] = q.rnorm;
    }
    softmax.mean_q = float(problem.dim) * q.mean;
    softmax.rnorm_q = scale * q.rnorm;
  }

  // Sums of all channels; the weights of this block's prototypes, to all blocks of the cluster:
  // into the half that they do not read.
  FP_DEVICE void form_weights(Softmax& softmax, int pass) const {
    const int begin = first_row(pass);
    float x[kColumns];
    float top = -infinity();
    FP_UNROLL
    for (int j = 0; j < kColumns; ++j) {
      float all = 0;
      FP_UNROLL
      for (int w = 0; w < Traits::kSlices; ++w)
        all += floats(Traits::kKeys +
                      w * Traits::kShareBytes)[row * Traits::kProductStride + column + j];
      const int r = begin + column + j;
      RowStatistics stats = {0, 0};
      if (own_statistics) {
        stats = statistics(kQueries + column + j);
      } else if (r < bag.count) {
        stats.mean = p.statistics.protos[bag.begin + r];
        stats.rnorm = p.statistics.protos[int64_t(problem.total) + bag.begin + r];
      }
      x[j] = (all - softmax.mean_q * stats.mean) * (softmax.rnorm_q * stats.rnorm);
      if (r < bag.count) top = fmaxf(top, x[j]);
    }
    if (problem.running_max) {
      FP_UNROLL
      for (int mask = 1; mask < Traits::kLanes; mask *= 2) top = fmaxf(top, shuffle_xor(top, mask));
      top = fmaxf(top, softmax.bound);
      // Nothing yet, or nothing but NaN: 0 times what is there keeps both.
      softmax.sum *= top == -infinity() ? 0.0f : exp2_fast(softmax.bound - top);
      softmax.bound = top;
    }
    uint32_t w[kColumns / 2];
    FP_UNROLL
    for (int j = 0; j < kColumns; ++j) {
      x[j] = begin + column + j < bag.count ? exp2_fast(x[j] - softmax.bound) : 0.0f;
      softmax.sum += x[j];
      if (j % 2 == 1) w[j / 2] = pack<T>(x[j - 1], x[j]);
    }
    float block_sum = softmax.sum;
    FP_UNROLL
    for (int mask = 1; mask < Traits::kLanes; mask *= 2) block_sum += shuffle_xor(block_sum, mask);

    const int at = pass % 2 * kCluster + rank;
    uint8_t* const to = shared + Traits::kWeights + at * Traits::kWeightBytes +
                        weight_offset(row, column / 8) + column % 8 * 2;
    float* const to_bound = floats(Traits::kBounds) + at * kQueries + row;
    float* const to_sum = floats(Traits::kRowSums) + rank * kQueries + row;
    FP_UNROLL
    for (int peer = 0; peer < kCluster; ++peer) {
      FP_UNROLL
      for (int j = 0; j < kColumns / 2; ++j) store_peer(peer_address(to + 4 * j, peer), w[j]);
      if (column == 0) {
        store_peer(peer_address(to_bound, peer), float_to_bits(softmax.bound));
        if (pass + 1 == passes) store_peer(peer_address(to_sum, peer), float_to_bits(block_sum));
      }
    }
  }

  // The second product: 16 queries, 32 prototypes of block `warp`, 64 channels; relative to that
  // block's bound, of rows lane / 4 and + 8.
  FP_DEVICE void multiply_values(float (&g)[8][4], float (&old_bound)[2], int pass) const {
    const int from = pass % 2 * kCluster + warp;
    const uint8_t* const weights = shared + Traits::kWeights + from * Traits::kWeightBytes;
    if (problem.running_max) {
      FP_UNROLL
      for (int h = 0; h < 2; ++h) {
        const float now = floats(Traits::kBounds)[from * kQueries + lane / 4 + 8 * h];
        const float rescale = now == -infinity() ? 0.0f : exp2_fast(old_bound[h] - now);
        old_bound[h] = now;
        FP_UNROLL
        for (int n = 0; n < 8; ++n) {
          g[n][2 * h] *= rescale;
          g[n][2 * h + 1] *= rescale;
        }
      }
    }
    FP_UNROLL
    for (int k = 0; k < 2; ++k) {
      uint32_t a[4];
      load_matrix<false>(a,
                         weights + weight_offset(lane % 8 + lane / 8 % 2 * 8, 2 * k + lane / 16));
      FP_UNROLL
      for (int n = 0; n < 4; ++n) {
        uint32_t b[4];
        load_matrix<true>(
            b, my_values + box_offset(16 * k + lane % 8 + lane / 8 % 2 * 8, 2 * n + lane / 16));
        mma_16816<T>(g[2 * n], a, b[0], b[1]);
        mma_16816<T>(g[2 * n + 1], a, b[2], b[3]);
      }
    }
  }

  // ---- The end.

  // G of all prototypes, this block's 64 channels: the warps' parts to shared memory, in the place
  // of the values, and the factors between them.
  FP_DEVICE void share_results(const float (&g)[8][4]) const {
    sync_block();  // the values are multiplied
    float* const result = floats(Traits::kKeys + warp * Traits::kResultBytes);
    FP_UNROLL
    for (int n = 0; n < 8; ++n) {
      FP_UNROLL
      for (int i = 0; i < 4; ++i)
        result[(lane / 4 + i / 2 * 8) * Traits::kResultStride + 8 * n + lane % 4 * 2 + i % 2] =
            g[n][i];
    }
    if (thread < kQueries * kCluster) {  // of a query, in neighbouring lanes
      const int r = thread / kCluster, b = thread % kCluster;
      const int at = (passes - 1) % 2 * kCluster + b;
      const float mine = floats(Traits::kBounds)[at * kQueries + r];
      float most = mine;
      FP_UNROLL
      for (int mask = 1; mask < kCluster; mask *= 2) most = fmaxf(most, shuffle_xor(most, mask));
      const float factor = mine == -infinity() ? 0.0f : exp2_fast(mine - most);
      float all = floats(Traits::kRowSums)[b * kQueries + r] * factor;
      FP_UNROLL
      for (int mask = 1; mask < kCluster; mask *= 2) all += shuffle_xor(all, mask);
      float inverse = all == 0 ? 0.0f : 1 / all;  // an empty bag
      if (!bag.valid) inverse = not_a_number();
      floats(Traits::kPartial)[thread] = factor * inverse;  // [kQueries][block]
      const int pixel = first_pixel + r;
      if (p.statistics.lse != nullptr && rank == 0 && b == 0 && pixel < problem.pixels)
        p.statistics.lse[map * problem.pixels + pixel] = most + log2_fast(all);
    }
    sync_block();
  }
  // A thread takes 4 numbers that are neighbours in memory.
  FP_DEVICE void store_results() const {
    const float* const factors = floats(Traits::kPartial);
    const uint8_t* const my_slice = shared + Traits::kQuery + rank * Traits::kQueryBytes;
    FP_UNROLL
    for (int i = thread; i < kQueries * kBox / 4; i += Traits::kThreads) {
      const int r = kChannelsLast ? i / 16 : i % 4 * 4, c = kChannelsLast ? i % 16 * 4 : i / 4;
      const int pixel = first_pixel + r, channel = rank * kBox + c;
      if (pixel >= problem.pixels || channel >= problem.dim) continue;
      float x[4];
      FP_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int rj = kChannelsLast ? r : r + j, cj = kChannelsLast ? c + j : c;
        x[j] = 0;
        FP_UNROLL
        for (int b = 0; b < kCluster; ++b)
          x[j] +=
              floats(Traits::kKeys + b * Traits::kResultBytes)[rj * Traits::kResultStride + cj] *
              factors[rj * kCluster + b];
      }
      const int at =
          kChannelsLast ? box_offset(r, c / 8) + c % 8 * 2 : column_offset(c, r / 8) + r % 8 * 2;
      const uint32_t* const f = reinterpret_cast<const uint32_t*>(my_slice + at);
      uint32_t y[2];
      FP_UNROLL
      for (int j = 0; j < 2; ++j) {
        float low, high;
        unpack<T>(f[j], &low, &high);
        y[j] = pack<T>(x[2 * j] * low, x[2 * j + 1] * high);
      }
      const auto store = [&](const Dense& d, int ch, uint32_t low, uint32_t high) {
        T* const to = static_cast<T*>(d.data) + map * d.image + int64_t(ch) * d.channel +
                      int64_t(pixel) * d.pixel;
        reinterpret_cast<uint32_t*>(to)[0] = low;
        reinterpret_cast<uint32_t*>(to)[1] = high;
      };
      if (problem.concat) store(p.out, channel, f[0], f[1]);
      store(p.out, problem.concat ? problem.dim + channel : channel, y[0], y[1]);
      if (p.agg.data != nullptr) store(p.agg, channel, pack<T>(x[0], x[1]), pack<T>(x[2], x[3]));
    }
  }
};

}  // namespace latency_detail

}  // namespace fastproto::cuda::sm90
