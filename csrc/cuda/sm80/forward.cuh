// SPDX-License-Identifier: Apache-2.0
// The forward by mma.sync: Ampere and everything newer. One template, two uses:
//
//   latency     kRows = 16, the channels of the result dealt out to kSlices blocks: one image fills
//               the chip. Every block computes the cosines of its 16 pixels again, which costs less
//               than waiting for another block; half types keep the queries in registers and find
//               the statistics of the prototypes on the way, so that inference is one launch.
//   throughput  kRows = 64 (half types), no product computed twice.
//
// A block owns kRows pixels of one image and class and walks over the bag in tiles of kN
// prototypes. The prototypes are one tile in shared memory for both products. Of S = F P^T a warp
// owns 8 columns (and a part of the rows or of D, whichever there are warps for), of G = W P a
// slice of channels.
//
// Budget, D = 512 (docs/kernels/sm80.md has the compiler's figures):
//   half, 16 rows      F 16 + P 64 a stage + W 2 KiB; F in 128 registers
//   half, 64 rows      F 64 + P 32 a stage + W 4 KiB; G in 128 registers
//   float32, 16 rows   F 32 + P 64 a stage + W 2 KiB; G in 32 registers
#pragma once

#include "products.cuh"

namespace fastproto::cuda::sm80 {

template <class T, int kDim, int kRows_, int kSlices>
struct ForwardTraits : TraitsOf<T, kDim, kSlices> {
  static constexpr int kRows = kRows_;
  static constexpr int kSize = int(sizeof(T));
  static constexpr int kN = forward_tile_n(kSize, kRows);
  static constexpr int kWarpsN = kN / 8;
  static constexpr int kWarpsM = kRows / 16 < kWarps / kWarpsN ? kRows / 16 : kWarps / kWarpsN;
  static constexpr int kWarpsK = kWarps / kWarpsN / kWarpsM;
  static constexpr int kMTiles = kRows / 16 / kWarpsM;  // of S, in a warp
  static constexpr bool kQueriesInRegisters = kSize == 2 && kRows == 16 && kSlices > 1;
  // Whether the kernel can do without proto_stats_kernel.
  static constexpr bool kFindsStatistics = kQueriesInRegisters;

  static constexpr int kMapBytes = kRows * kDim * kSize;
  static constexpr int kStageBytes = kN * kDim * kSize;
  static constexpr int kWeightRowBytes = kN * kSize;
  static constexpr int kWeightBytes = kRows * kWeightRowBytes;
  // mean, rnorm, rescale, and two values a row of every column of warps.
  static constexpr int kFloats = kRows * (3 + 2 * kWarpsN);
  static constexpr int shared_bytes(int stages) {
    return forward_bytes(kSize, kDim, kRows, stages);
  }
  static constexpr int kSharedBytes = shared_bytes(2);

  static_assert(shared_bytes(1) == kMapBytes + kStageBytes + kWeightBytes + kFloats * 4);
  static_assert(shared_bytes(2) == shared_bytes(1) + kStageBytes);
  static_assert(kWarpsN * kWarpsM * kWarpsK == kWarps && kWarpsK <= 2);
  static_assert(kWarpsK == 1 || kSize == 4, "partial sums of S are floats and lie where W does");
  static_assert(kWeightBytes >= 8 * kThreads, "scratch of map_statistics");
  static_assert(kSharedBytes <= 163 * 1024);
};

// What a block owns, and the phases of its work.
template <class Traits>
struct ForwardBlock {
  using T = typename Traits::T;
  using Op = typename Traits::Op;
  static constexpr int kRows = Traits::kRows, kN = Traits::kN, kDim = Traits::kDim;
  static constexpr int kMTiles = Traits::kMTiles, kNTiles = Traits::kNTiles;
  static constexpr int kHeld = Traits::kQueriesInRegisters ? kDim / Op::kDepth : 1;
  using Held = typename Op::A[kHeld];
  using Products = float[2][kMTiles][4];
  using Result = float[kRows / 16][kNTiles][4];
  // Of the rows of S of a thread, over the columns it has.
  struct Rows {
    float sum[kMTiles][2], mean[kMTiles][2], max[kMTiles][2];
  };
  // Of its two columns of S.
  struct Columns {
    float mean[2], rnorm[2];
  };

  const ForwardParams& p;
  const int stages;
  const Problem& problem = p.problem;
  const bool precise = problem.precision == Float32Precision::kTf32x3;
  const Place<Traits> at{};
  const int tiles = (problem.pixels + kRows - 1) / kRows;
  const int tile = block_index() / Traits::kSlices;
  const int map = tile / tiles;  // (image, class)
  const int image = map / problem.ways, way = map % problem.ways;
  const int episode = image / problem.queries;
  const int first_pixel = tile % tiles * kRows, pixels = problem.pixels - first_pixel;
  const Bag bag = load_bag(p.offsets, episode* problem.ways + way, problem.total);
  const float scale = exponent_scale(problem, bag.count);

  const MapTile<T, kRows, kDim> queries{shared_memory(),
                                        has_channel_rows(p.feat.channel, p.feat.pixel)};
  const PrototypeStream<T, kN, kDim> prototypes{
      shared_memory() + Traits::kMapBytes, stages, at.warp,
      rows_of<T>(p.protos, bag.begin, bag.count, problem.dim)};
  uint8_t* const weights = prototypes.memory + stages * Traits::kStageBytes;
  float* const mean = reinterpret_cast<float*>(weights + Traits::kWeightBytes);
  float* const rnorm = mean + kRows;
  float* const rescale = rnorm + kRows;
  float* const exchange = rescale + kRows;  // [kWarpsN][kRows][2]

  FP_DEVICE int row_of(int m, int h) const { return at.row0 + m * 16 + h * 8 + at.g; }
  FP_DEVICE Matrix<T> feat() const {
    return queries.matrix(map_of<T>(p.feat, episode, image % problem.queries, first_pixel), p.feat,
                          problem.dim, pixels);
  }
  // Of G, G * F or F, from a channel of the output on.
  FP_DEVICE void store(const Dense& to, int channel) const {
    const T* const data = static_cast<const T*>(to.data) + map * to.image +
                          int64_t(first_pixel) * to.pixel + channel * to.channel;
    queries.store(queries.matrix(data, to, problem.dim, pixels), at.first_channel,
                  Traits::kSliceDim);
  }

  // The queries: statistics, the copy of F in the output, registers.
  FP_DEVICE void start(Held& held) const {
    queries.load(feat());
    copy_async_commit();
    prototypes.load(0);
    copy_async_wait<1>();
    sync_block();
    map_statistics(queries, problem.dim, problem.eps, reinterpret_cast<float*>(weights), mean,
                   rnorm);
    if (problem.concat) store(p.out, 0);
    const int thread = thread_index();
    if (p.statistics.query != nullptr && way == 0 && at.slice == 0 && thread < kRows &&
        thread < pixels) {
      float* to = p.statistics.query + int64_t(image) * 2 * problem.pixels + first_pixel;
      to[thread] = mean[thread];
      to[problem.pixels + thread] = rnorm[thread];
    }
    if constexpr (Traits::kCentred) {
      sync_block();
      const int pixel = thread % kRows;
      for (int d = thread / kRows; d < problem.dim; d += kThreads / kRows)
        *queries.at(pixel, d) -= mean[pixel];
      sync_block();
    }
    if constexpr (Traits::kQueriesInRegisters) {
      FP_UNROLL
      for (int k = 0; k < kHeld; ++k) load_pixels(held[k], queries, 0, k * Op::kDepth);
    }
  }

  // S = F P^T of a tile, in two accumulators, so that a product need not wait for the one before.
  // What is not given of the prototypes' statistics is found on the way.
  FP_DEVICE Columns multiply(Products& s, const Held& held, const uint8_t* keys, int step) const {
    const float* const stats = p.statistics.protos;
    const bool find_statistics = Traits::kFindsStatistics && stats == nullptr;
    RowSums sums;
    float first = 0;
    if constexpr (Traits::kFindsStatistics)
      first = to_float(
          *reinterpret_cast<const T*>(keys + swizzled<Traits::kRowBytes>(at.column0 + at.g, 0)));
    constexpr int kPartDim = kDim / Traits::kWarpsK;
    [[maybe_unused]] constexpr int kUnroll =
        Traits::kQueriesInRegisters ? kPartDim / Op::kDepth / 2 : 1;
#pragma unroll kUnroll
    for (int k = 0; k < kPartDim; k += 2 * Op::kDepth) {
      typename Op::B b;
      const int channel = at.warp_k * kPartDim + k;
      Op::template load<Traits::kRowBytes, false>(b, keys, at.column0, channel);
      FP_UNROLL
      for (int half_step = 0; half_step < 2; ++half_step) {
        FP_UNROLL
        for (int m = 0; m < kMTiles; ++m) {
          if constexpr (Traits::kQueriesInRegisters) {
            Op::multiply(s[half_step][m], held[k / Op::kDepth + half_step], b, half_step, precise);
          } else {
            typename Op::A a;
            load_pixels(a, queries, at.row0 + m * 16, channel + half_step * Op::kDepth);
            Op::multiply(s[half_step][m], a, b, half_step, precise);
          }
        }
      }
      if constexpr (Traits::kFindsStatistics) {
        if (find_statistics) {
          FP_UNROLL
          for (int word = 0; word < 4; ++word) {
            float x, y;
            unpack<T>(b.x[word], &x, &y);
            const int d = channel + word * 8 + 2 * at.i;
            if (d < problem.dim) sums.add(x - first);
            if (d + 1 < problem.dim) sums.add(y - first);
          }
        }
      }
    }

    Columns columns = {};
    if (find_statistics) {
      sums.total = sum_of_quad(sums.total);
      sums.squares = sum_of_quad(sums.squares);
      const RowStatistics found = row_statistics(first, sums, problem.dim, problem.eps);
      FP_UNROLL
      for (int j = 0; j < 2; ++j) {
        columns.mean[j] = shuffle(found.mean, (2 * at.i + j) * 4);
        columns.rnorm[j] = shuffle(found.rnorm, (2 * at.i + j) * 4);
      }
    } else {
      FP_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int row = step * kN + at.column0 + 2 * at.i + j;
        if (row < bag.count) {
          columns.mean[j] = stats[bag.begin + row];
          columns.rnorm[j] = stats[problem.total + bag.begin + row];
        }
      }
    }
    return columns;
  }

  // Cosines in s[0]: of both accumulators, and of both parts of the channels, which meet where W
  // will lie; -infinity past the bag.
  FP_DEVICE void form_cosines(Products& s, const Columns& columns, int left) const {
    for_rows<kMTiles>([&](int m, int h) {
      FP_UNROLL
      for (int j = 2 * h; j < 2 * h + 2; ++j) s[0][m][j] += s[1][m][j];
    });
    if constexpr (Traits::kWarpsK == 2) {
      for_rows<kMTiles>([&](int m, int h) {
        if (at.warp_k == 1)
          Op::store_pair(weights + at.pair_offset(row_of(m, h)), s[0][m][2 * h],
                         s[0][m][2 * h + 1]);
      });
      sync_block();
      for_rows<kMTiles>([&](int m, int h) {
        const float* from = reinterpret_cast<float*>(weights + at.pair_offset(row_of(m, h)));
        FP_UNROLL
        for (int j = 0; j < 2; ++j)
          if (at.warp_k == 0) s[0][m][2 * h + j] += from[j];
      });
    }
    for_rows<kMTiles>([&](int m, int h) {
      const int row = row_of(m, h);
      FP_UNROLL
      for (int j = 0; j < 2; ++j) {
        float& x = s[0][m][2 * h + j];
        if constexpr (!Traits::kCentred) x -= float(problem.dim) * mean[row] * columns.mean[j];
        x = at.column0 + 2 * at.i + j < left ? x * (rnorm[row] * columns.rnorm[j]) : -infinity();
      }
    });
  }

  // W from cosines, to shared memory, and its sums. With a running maximum also what the results
  // so far must be multiplied with.
  FP_DEVICE void form_weights(const Products& s, const Columns& columns, Rows& rows,
                              int step) const {
    if (problem.running_max) {
      for_rows<kMTiles>([&](int m, int h) {
        const float found = max_of_quad(fmaxf(s[0][m][2 * h], s[0][m][2 * h + 1]));
        if (at.i == 0 && at.warp_k == 0) exchange[2 * (at.warp_n * kRows + row_of(m, h))] = found;
      });
      sync_block();
    }
    for_rows<kMTiles>([&](int m, int h) {
      const int row = row_of(m, h);
      float bound = scale;
      if (problem.running_max) {
        float most = rows.max[m][h];
        FP_UNROLL
        for (int other = 0; other < Traits::kWarpsN; ++other)
          most = fmaxf(most, exchange[2 * (other * kRows + row)]);
        const float factor = step == 0 ? 0 : exp2_fast((rows.max[m][h] - most) * scale);
        rows.max[m][h] = most;
        rows.sum[m][h] *= factor;
        rows.mean[m][h] *= factor;
        if (at.warp_n == 0 && at.warp_k == 0 && at.i == 0) rescale[row] = factor;
        bound = most * scale;
      }
      float w[2];
      FP_UNROLL
      for (int j = 0; j < 2; ++j) {
        // One rounding, not two: the logits may be large. A bag of one has the scale 0.
        const float logit = multiply_add(s[0][m][2 * h + j], scale, -bound);
        w[j] = step * kN + at.column0 + 2 * at.i + j < bag.count ? exp2_fast(logit) : 0;
      }
      rows.sum[m][h] += w[0] + w[1];
      if constexpr (Traits::kCentred)
        rows.mean[m][h] += w[0] * columns.mean[0] + w[1] * columns.mean[1];
      if (at.warp_k == 0) Op::store_pair(weights + at.pair_offset(row), w[0], w[1]);
    });
  }

  // The products so far are relative to the maximum before.
  FP_DEVICE void scale_result(Result& acc) const {
    for_rows<kRows / 16>([&](int m, int h) {
      const float factor = rescale[m * 16 + h * 8 + at.g];
      FP_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        FP_UNROLL
        for (int j = 2 * h; j < 2 * h + 2; ++j) acc[m][n][j] *= factor;
      }
    });
  }

  // G, in registers; then G * F takes the place of F, and G that of G * F.
  FP_DEVICE void finish(Result& acc, const Rows& rows) const {
    for_rows<kMTiles>([&](int m, int h) {
      const int row = row_of(m, h);
      at.share_sums(exchange, row, rows.sum[m][h], rows.mean[m][h]);
      if (at.i == 0 && at.warp_k == 0 && at.warp_n == 0)
        rescale[row] = problem.running_max ? rows.max[m][h] * scale : scale;
    });
    if constexpr (Traits::kCentred) queries.load(feat());  // F itself again
    copy_async_commit();
    copy_async_wait<0>();
    sync_block();
    const auto element = [&](int m, int n, int j) {
      return queries.at(m * 16 + j / 2 * 8 + at.g, at.channel0 + n * 8 + 2 * at.i + j % 2);
    };
    for_rows<kRows / 16>([&](int m, int h) {
      const int row = m * 16 + h * 8 + at.g;
      const auto sums = at.shared_sums(exchange, row);
      // An empty bag gives zeros; one whose offsets make no sense gives NaN.
      const float inverse = !bag.valid ? not_a_number() : bag.count == 0 ? 0 : 1 / sums.first;
      if (p.statistics.lse != nullptr && at.slice == 0 && at.warp == 0 && at.i == 0 && row < pixels)
        p.statistics.lse[int64_t(map) * problem.pixels + first_pixel + row] =
            !bag.valid       ? not_a_number()
            : bag.count == 0 ? 0
                             : rescale[row] + log2_fast(sums.first);
      FP_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        FP_UNROLL
        for (int j = 2 * h; j < 2 * h + 2; ++j) {
          T* const to = element(m, n, j);
          acc[m][n][j] = (acc[m][n][j] + sums.second) * inverse;
          *to = from_float<T>(acc[m][n][j] * to_float(*to));
        }
      }
    });
    sync_block();
    store(p.out, problem.concat ? problem.dim : 0);
    if (p.agg.data == nullptr) return;
    sync_block();
    for_rows<kRows / 16>([&](int m, int h) {
      FP_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        FP_UNROLL
        for (int j = 2 * h; j < 2 * h + 2; ++j) *element(m, n, j) = from_float<T>(acc[m][n][j]);
      }
    });
    sync_block();
    store(p.agg, 0);
  }
};

template <class Traits>
FP_KERNEL forward_kernel(FP_GRID_CONSTANT ForwardParams p, FP_GRID_CONSTANT int stages) {
  using Block = ForwardBlock<Traits>;
  const Block block{p, stages};
  typename Block::Held held;
  block.start(held);
  typename Block::Result acc = {};
  typename Block::Rows rows = {};
  FP_UNROLL
  for (int m = 0; m < Traits::kMTiles; ++m) rows.max[m][0] = rows.max[m][1] = -infinity();

  FP_NO_UNROLL
  for (int step = 0; step < block.prototypes.steps; ++step) {
    const uint8_t* const keys =
        block.prototypes.wait(step, p.statistics.protos, block.bag.begin + step * Traits::kN);
    typename Block::Products s = {};
    const typename Block::Columns columns = block.multiply(s, held, keys, step);
    block.form_cosines(s, columns, block.bag.count - step * Traits::kN);
    block.form_weights(s, columns, rows, step);
    sync_block();
    if (p.problem.running_max) block.scale_result(acc);
    multiply_prototypes<Traits>(acc, block.weights, keys, block.at.channel0, block.precise);
    block.prototypes.release(step);
  }
  copy_async_wait<0>();
  block.finish(acc, rows);
}

}  // namespace fastproto::cuda::sm80
