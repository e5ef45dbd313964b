// SPDX-License-Identifier: Apache-2.0
// Forward for Hopper where there is little to do: one image, one class. A cluster of blocks shares
// 16 queries, so that 256 pixels are 128 blocks; one launch, without tensor maps; bf16 and half,
// D <= 512. docs/kernels/sm90.md has the schedule.
//
// The cluster's blocks and each block's warps are as many as there are slices of 64 channels. In
// each pass block b multiplies the queries with 32 prototypes, its warps one slice of channels
// each; writes their weights to all blocks; then computes its own slice of G from all prototypes of
// the pass, each warp with those of one block, which therefore may have a maximum of their own.
//
// Budget, D = 512 (D <= 256 in brackets):
//   tile               16 queries, 64 channels of G; 256 (128) prototypes a pass, 32 of them for S
//   cluster            8 (4) blocks of 8 (4) warps
//   registers          G 16 x 64 a warp = 32; at most 128 a thread, for two blocks
//   shared memory      Q 16 KiB (8), prototypes as keys 32 KiB (16) and as values 32 KiB (16), W
//                      2 x 8 KiB (4), partial sums 20 KiB (10), G 33 KiB (17)
//   roofline           latency: a launch, one trip to memory, two products of 128 (64) mma.sync a
//                      block, one exchange within the cluster a pass
#pragma once

#include "forward.h"
#include "tiles.cuh"

namespace fastproto::cuda::sm90 {

template <class Type, int Dim, bool IsChannelsLast>
struct LatencyTraits {
  using T = Type;
  static constexpr bool kChannelsLast = IsChannelsLast;
  static constexpr int kDim = Dim;
  static constexpr int kSlices = kDim / kBox;
  static constexpr int kCluster = kSlices;
  static constexpr int kThreads = 32 * kSlices;
  static constexpr int kBlocks = 2;  // of a multiprocessor
  static constexpr int kQueries = 16;
  static constexpr int kShare = 32;  // prototypes of a block in a pass
  static constexpr int kPass = kShare * kCluster;
  static constexpr int kColumns = kQueries * kShare / kThreads;  // of S, of a thread
  static constexpr int kLanes = kShare / kColumns;               // that share a row of S

  static constexpr int kQueryBytes = kQueries * kBoxRowBytes;  // a slice
  static constexpr int kShareBytes = kShare * kBoxRowBytes;    // a slice of a block's prototypes
  static constexpr int kWeightBytes = kQueries * 2 * kShare;   // a block's prototypes
  static constexpr int kProductStride = kShare + 2;  // floats; spreads rows over the banks
  static constexpr int kResultStride = kBox + 2;

  static constexpr int kQuery = 0;                                        // [slice]
  static constexpr int kKeys = kQuery + kSlices * kQueryBytes;            // [slice]
  static constexpr int kValues = kKeys + kSlices * kShareBytes;           // [block's prototypes]
  static constexpr int kWeights = kValues + kCluster * kShareBytes;       // [2][block]
  static constexpr int kBounds = kWeights + 2 * kCluster * kWeightBytes;  // [2][block][kQueries]
  static constexpr int kRowSums = kBounds + 2 * kCluster * 4 * kQueries;  // [block][kQueries]
  static constexpr int kPartial =  // [warp][kQueries + kShare][2]
      kRowSums + kCluster * 4 * kQueries;
  static constexpr int kFirst =
      kPartial + kSlices * 8 * (kQueries + kShare);  // [kQueries + kShare]
  static constexpr int kSharedBytes = kFirst + 4 * (kQueries + kShare);
  // In the place of the keys, when all are multiplied: partial S of a warp, partial G.
  static constexpr int kProductBytes = kQueries * 4 * kProductStride;
  static constexpr int kResultBytes = kQueries * 4 * kResultStride;

  static_assert(kDim == 256 || kDim == 512, "clusters of 4 or 8 blocks");
  static_assert(kColumns % 2 == 0, "weights are packed in pairs");
  static_assert(kProductBytes <= kShareBytes, "a warp's S in the place of its keys");
  static_assert(kResultBytes <= kShareBytes + kShareBytes, "G in the place of keys and values");
  static_assert(kSharedBytes == forward_latency_bytes(kDim) &&
                    kThreads == forward_latency_threads(kDim) &&
                    kCluster == forward_latency_cluster(kDim),
                "the plan");
  static_assert(kBlocks * (kSharedBytes + 1024) <= kSharedLimit + 1024,
                "shared memory of a multiprocessor");
};

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

}  // namespace latency_detail

template <class Traits>
FP_KERNEL FP_LAUNCH_BOUNDS(Traits::kThreads, Traits::kBlocks)
    forward_latency_kernel(FP_GRID_CONSTANT ForwardParams p) {
  using namespace latency_detail;
  using T = typename Traits::T;
  constexpr int kQueries = Traits::kQueries, kShare = Traits::kShare;
  const Problem& problem = p.problem;
  const int thread = thread_index(), warp = warp_index(), lane = lane_index();
  const int rank = cluster_rank();
  uint8_t* const shared = shared_memory();
  const auto floats = [&](int at) { return reinterpret_cast<float*>(shared + at); };

  // Neighbouring clusters share prototypes.
  const int tiles = (problem.pixels + kQueries - 1) / kQueries;
  int item = block_index() / Traits::kCluster;
  const int first_pixel = item % tiles * kQueries;
  item /= tiles;
  const int query = item % problem.queries, bag_index = item / problem.queries;
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
  const auto load_protos = [&](uint8_t* to, int row, int channel) {
    FP_UNROLL
    for (int i = 0; i < kShare / 4; ++i) {
      const int r = 4 * i + lane / 8, c = channel + lane % 8 * 8;
      const bool valid = row + r < bag.count && c < problem.dim;
      const T* const from = protos + int64_t(row + r) * problem.dim + c;
      copy_async_16(to + box_offset(r, lane % 8), valid ? from : protos, valid ? 16 : 0);
    }
  };
  const auto load_keys = [&](int pass) {
    load_protos(my_keys, pass * Traits::kPass + rank * kShare, warp * kBox);
    copy_async_commit();
  };
  const auto load_values = [&](int pass) {
    load_protos(my_values, pass * Traits::kPass + warp * kShare, rank * kBox);
    copy_async_commit();
  };
  FP_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (Traits::kChannelsLast) {
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
  load_keys(0);
  load_values(0);

  // The first numbers of the rows of this lane's fragments.
  float first_q[2], first_p[4] = {0, 0, 0, 0};
  FP_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int pixel = first_pixel + lane / 4 + 8 * h;
    first_q[h] = pixel < problem.pixels ? to_float(feat[pixel * p.feat.pixel]) : 0.0f;
  }
  sync_cluster();  // all have started: their memory may be written

  // S of this thread: a row, kColumns neighbouring prototypes of the block.
  const int row = thread / Traits::kLanes, column = thread % Traits::kLanes * Traits::kColumns;
  float mean_q = 0, rnorm_q = 0;  // times D, times scale
  float row_sum = 0, bound = problem.running_max ? -infinity() : scale;
  // The second product: rows lane / 4 and + 8, relative to `old_bound` of block `warp`.
  float g[8][4];
  FP_UNROLL
  for (int i = 0; i < 8; ++i) g[i][0] = g[i][1] = g[i][2] = g[i][3] = 0;
  float old_bound[2] = {bound, bound};

  FP_NO_UNROLL
  for (int pass = 0; pass < passes; ++pass) {
    const int first_row = pass * Traits::kPass + rank * kShare;
    if (own_statistics) {
      FP_UNROLL
      for (int n = 0; n < 4; ++n) {
        const int r = first_row + 8 * n + lane / 4;
        first_p[n] = r < bag.count ? to_float(protos[int64_t(r) * problem.dim]) : 0.0f;
      }
    }
    copy_async_wait<1>();  // not for the values
    sync_warp();

    // First product: 16 queries, 32 prototypes, this warp's 64 channels.
    float s[4][4];
    FP_UNROLL
    for (int n = 0; n < 4; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
    RowSums sums_q[2], sums_p[4];
    FP_UNROLL
    for (int k = 0; k < 4; ++k) {
      uint32_t a[4], b[2][4];
      if constexpr (Traits::kChannelsLast) {
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
      // Every number of the operands is in one lane: their statistics cost no loads.
      FP_UNROLL
      for (int h = 0; h < 2; ++h) {
        if (warp * kBox + 16 * k + 8 * h >= problem.dim) continue;
        if (pass == 0) {
          add_pair<T>(&sums_q[0], a[2 * h], first_q[0]);
          add_pair<T>(&sums_q[1], a[2 * h + 1], first_q[1]);
        }
        if (own_statistics) {
          FP_UNROLL
          for (int n = 0; n < 4; ++n) add_pair<T>(&sums_p[n], b[n / 2][n % 2 * 2 + h], first_p[n]);
        }
      }
    }

    sync_warp();  // its keys are multiplied
    float* const product = floats(Traits::kKeys + warp * Traits::kShareBytes);
    FP_UNROLL
    for (int n = 0; n < 4; ++n) {
      FP_UNROLL
      for (int i = 0; i < 4; ++i)
        product[(lane / 4 + i / 2 * 8) * Traits::kProductStride + 8 * n + lane % 4 * 2 + i % 2] =
            s[n][i];
    }
    float* const partial = floats(Traits::kPartial);
    float* const first = floats(Traits::kFirst);
    const auto keep = [&](int i, RowSums sums, float x) {
      add_lanes(&sums);
      if (lane % 4 == 0) {
        float* const to = partial + (warp * (kQueries + kShare) + i) * 2;
        to[0] = sums.total;
        to[1] = sums.squares;
        if (warp == 0) first[i] = x;
      }
    };
    if (pass == 0) {
      keep(lane / 4, sums_q[0], first_q[0]);
      keep(lane / 4 + 8, sums_q[1], first_q[1]);
    }
    if (own_statistics) {
      FP_UNROLL
      for (int n = 0; n < 4; ++n) keep(kQueries + 8 * n + lane / 4, sums_p[n], first_p[n]);
    }
    sync_block();

    // Sums of all channels; softmax of this block's prototypes.
    const auto statistics = [&](int i) {
      RowSums all;
      FP_UNROLL
      for (int w = 0; w < Traits::kSlices; ++w) {
        all.total += partial[(w * (kQueries + kShare) + i) * 2];
        all.squares += partial[(w * (kQueries + kShare) + i) * 2 + 1];
      }
      return row_statistics(first[i], all, problem.dim, problem.eps);
    };
    if (pass == 0) {
      const RowStatistics q = statistics(row);
      const int pixel = first_pixel + row;
      if (p.statistics.query != nullptr && way == 0 && rank == 0 && column == 0 &&
          pixel < problem.pixels) {
        float* const to = p.statistics.query + int64_t(image) * 2 * problem.pixels + pixel;
        to[0] = q.mean;
        to[problem.pixels] = q.rnorm;
      }
      mean_q = float(problem.dim) * q.mean;
      rnorm_q = scale * q.rnorm;
    }
    float x[Traits::kColumns];
    float top = -infinity();
    FP_UNROLL
    for (int j = 0; j < Traits::kColumns; ++j) {
      float all = 0;
      FP_UNROLL
      for (int w = 0; w < Traits::kSlices; ++w)
        all += floats(Traits::kKeys +
                      w * Traits::kShareBytes)[row * Traits::kProductStride + column + j];
      const int r = first_row + column + j;
      RowStatistics stats = {0, 0};
      if (own_statistics) {
        stats = statistics(kQueries + column + j);
      } else if (r < bag.count) {
        stats.mean = p.statistics.protos[bag.begin + r];
        stats.rnorm = p.statistics.protos[int64_t(problem.total) + bag.begin + r];
      }
      x[j] = (all - mean_q * stats.mean) * (rnorm_q * stats.rnorm);
      if (r < bag.count) top = fmaxf(top, x[j]);
    }
    if (problem.running_max) {
      FP_UNROLL
      for (int mask = 1; mask < Traits::kLanes; mask *= 2) top = fmaxf(top, shuffle_xor(top, mask));
      top = fmaxf(top, bound);
      // Nothing yet, or nothing but NaN: 0 times what is there keeps both.
      row_sum *= top == -infinity() ? 0.0f : exp2_fast(bound - top);
      bound = top;
    }
    uint32_t w[Traits::kColumns / 2];
    FP_UNROLL
    for (int j = 0; j < Traits::kColumns; ++j) {
      x[j] = first_row + column + j < bag.count ? exp2_fast(x[j] - bound) : 0.0f;
      row_sum += x[j];
      if (j % 2 == 1) w[j / 2] = pack<T>(x[j - 1], x[j]);
    }
    const bool last = pass + 1 == passes;
    float block_sum = row_sum;
    FP_UNROLL
    for (int mask = 1; mask < Traits::kLanes; mask *= 2) block_sum += shuffle_xor(block_sum, mask);

    // To all blocks of the cluster, into the half that they do not read.
    const int at = (pass % 2 * Traits::kCluster + rank);
    uint8_t* const to = shared + Traits::kWeights + at * Traits::kWeightBytes +
                        weight_offset(row, column / 8) + column % 8 * 2;
    float* const to_bound = floats(Traits::kBounds) + at * kQueries + row;
    float* const to_sum = floats(Traits::kRowSums) + rank * kQueries + row;
    FP_UNROLL
    for (int peer = 0; peer < Traits::kCluster; ++peer) {
      FP_UNROLL
      for (int j = 0; j < Traits::kColumns / 2; ++j)
        store_peer(peer_address(to + 4 * j, peer), w[j]);
      if (column == 0) {
        store_peer(peer_address(to_bound, peer), float_to_bits(bound));
        if (last) store_peer(peer_address(to_sum, peer), float_to_bits(block_sum));
      }
    }
    sync_cluster();
    if (last) {
      copy_async_commit();  // so that the waits count alike
    } else {
      load_keys(pass + 1);
    }
    copy_async_wait<1>();  // values
    sync_warp();

    // Second product: 16 queries, 32 prototypes of block `warp`, 64 channels.
    const int from = pass % 2 * Traits::kCluster + warp;
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
    sync_warp();
    if (!last) load_values(pass + 1);
  }

  // G of all prototypes, this block's 64 channels.
  sync_block();  // the values are multiplied: G takes the place of some
  float* const result = floats(Traits::kKeys + warp * Traits::kResultBytes);
  FP_UNROLL
  for (int n = 0; n < 8; ++n) {
    FP_UNROLL
    for (int i = 0; i < 4; ++i)
      result[(lane / 4 + i / 2 * 8) * Traits::kResultStride + 8 * n + lane % 4 * 2 + i % 2] =
          g[n][i];
  }
  // Factors of the blocks' parts of G; of a query, in neighbouring lanes.
  float* const factors = floats(Traits::kPartial);  // [kQueries][block]
  if (thread < kQueries * Traits::kCluster) {
    const int r = thread / Traits::kCluster, b = thread % Traits::kCluster;
    const int at = (passes - 1) % 2 * Traits::kCluster + b;
    const float mine = floats(Traits::kBounds)[at * kQueries + r];
    float most = mine;
    FP_UNROLL
    for (int mask = 1; mask < Traits::kCluster; mask *= 2)
      most = fmaxf(most, shuffle_xor(most, mask));
    const float factor = mine == -infinity() ? 0.0f : exp2_fast(mine - most);
    float all = floats(Traits::kRowSums)[b * kQueries + r] * factor;
    FP_UNROLL
    for (int mask = 1; mask < Traits::kCluster; mask *= 2) all += shuffle_xor(all, mask);
    float inverse = all == 0 ? 0.0f : 1 / all;  // an empty bag
    if (!bag.valid) inverse = not_a_number();
    factors[thread] = factor * inverse;
    const int pixel = first_pixel + r;
    if (p.statistics.lse != nullptr && rank == 0 && b == 0 && pixel < problem.pixels)
      p.statistics.lse[map * problem.pixels + pixel] = most + log2_fast(all);
  }
  sync_block();

  // A thread takes 4 numbers that are neighbours in memory.
  const uint8_t* const my_slice = shared + Traits::kQuery + rank * Traits::kQueryBytes;
  FP_UNROLL
  for (int i = thread; i < kQueries * kBox / 4; i += Traits::kThreads) {
    const int r = Traits::kChannelsLast ? i / 16 : i % 4 * 4;
    const int c = Traits::kChannelsLast ? i % 16 * 4 : i / 4;
    const int pixel = first_pixel + r, channel = rank * kBox + c;
    if (pixel >= problem.pixels || channel >= problem.dim) continue;
    float x[4];
    FP_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int rj = Traits::kChannelsLast ? r : r + j, cj = Traits::kChannelsLast ? c + j : c;
      x[j] = 0;
      FP_UNROLL
      for (int b = 0; b < Traits::kCluster; ++b)
        x[j] += floats(Traits::kKeys + b * Traits::kResultBytes)[rj * Traits::kResultStride + cj] *
                factors[rj * Traits::kCluster + b];
    }
    const int at = Traits::kChannelsLast ? box_offset(r, c / 8) + c % 8 * 2
                                         : column_offset(c, r / 8) + r % 8 * 2;
    const uint32_t* const f = reinterpret_cast<const uint32_t*>(my_slice + at);
    float f_low, f_high;
    unpack<T>(f[0], &f_low, &f_high);
    const uint32_t y0 = pack<T>(x[0] * f_low, x[1] * f_high);
    unpack<T>(f[1], &f_low, &f_high);
    const uint32_t y1 = pack<T>(x[2] * f_low, x[3] * f_high);
    const auto store = [&](const Dense& d, int ch, uint32_t low, uint32_t high) {
      T* const to = static_cast<T*>(d.data) + map * d.image + int64_t(ch) * d.channel +
                    int64_t(pixel) * d.pixel;
      reinterpret_cast<uint32_t*>(to)[0] = low;
      reinterpret_cast<uint32_t*>(to)[1] = high;
    };
    if (problem.concat) store(p.out, channel, f[0], f[1]);
    store(p.out, problem.concat ? problem.dim + channel : channel, y0, y1);
    if (p.agg.data != nullptr) store(p.agg, channel, pack<T>(x[0], x[1]), pack<T>(x[2], x[3]));
  }
}

template <class T>
const char* launch_forward_latency_of(const ForwardParams& p, void* stream) {
  const auto launch_as = [&](auto tag) {
    using Traits = typename decltype(tag)::type;
    const Problem& s = p.problem;
    const int64_t tiles = (s.pixels + Traits::kQueries - 1) / Traits::kQueries;
    Grid grid;
    grid.blocks = int(tiles * s.episodes * s.queries * s.ways * Traits::kCluster);
    grid.threads = Traits::kThreads;
    grid.shared_bytes = Traits::kSharedBytes;
    grid.cluster = Traits::kCluster;
    grid.stream = stream;
    return cuda::launch<forward_latency_kernel<Traits>>(grid, p);
  };
  return with_traits<T, LatencyTraits>(p.problem.dim, is_channels_last(p), launch_as);
}

}  // namespace fastproto::cuda::sm90
