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

#include "tiles.cuh"

namespace fastproto::cuda::sm80 {

template <class T_, int kDim_, int kRows_, int kSlices_>
struct ForwardTraits {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr int kRows = kRows_;
  static constexpr int kSlices = kSlices_;
  static constexpr int kSize = int(sizeof(T));
  static constexpr bool kCentred = kSize == 4;  // float32 tiles are centred in shared memory
  static constexpr int kN = forward_tile_n(kSize, kRows);
  static constexpr int kWarpsN = kN / 8;
  static constexpr int kWarpsM = kRows / 16 < kWarps / kWarpsN ? kRows / 16 : kWarps / kWarpsN;
  static constexpr int kWarpsK = kWarps / kWarpsN / kWarpsM;
  static constexpr int kMTiles = kRows / 16 / kWarpsM;    // of S, in a warp
  static constexpr int kSliceDim = kDim / kSlices;        // channels of a block's result
  static constexpr int kNTiles = kSliceDim / kWarps / 8;  // of G, in a warp, each 8 channels
  static constexpr bool kQueriesInRegisters = kSize == 2 && kRows == 16 && kSlices > 1;
  // Whether the kernel can do without proto_stats_kernel.
  static constexpr bool kFindsStatistics = kQueriesInRegisters;

  static constexpr int kMapBytes = kRows * kDim * kSize;
  static constexpr int kStageBytes = kN * kDim * kSize;
  static constexpr int kWeightRowBytes = kN * kSize;
  static constexpr int kWeightBytes = kRows * kWeightRowBytes;
  // mean, rnorm, rescale, and two values a row of every column of warps.
  static constexpr int kFloats = kRows * (3 + 2 * kWarpsN);
  static constexpr int kThreads = sm80::kThreads;
  static constexpr int shared_bytes(int stages) {
    return forward_bytes(kSize, kDim, kRows, stages);
  }
  static constexpr int kSharedBytes = shared_bytes(2);
  static constexpr int kMaxRegisters = 255;

  static_assert(shared_bytes(1) == kMapBytes + kStageBytes + kWeightBytes + kFloats * 4);
  static_assert(shared_bytes(2) == shared_bytes(1) + kStageBytes);
  static_assert(kNTiles >= 1 && kNTiles * 8 * kWarps * kSlices == kDim);
  static_assert(kWarpsN * kWarpsM * kWarpsK == kWarps && kWarpsK <= 2);
  static_assert(kWarpsK == 1 || kSize == 4, "partial sums of S are floats and lie where W does");
  static_assert(kWeightBytes >= 8 * kThreads, "scratch of map_statistics");
  static_assert(kSharedBytes <= 163 * 1024 && kThreads * kMaxRegisters <= 65536);
};

template <class Traits>
FP_KERNEL forward_kernel(FP_GRID_CONSTANT ForwardParams p, FP_GRID_CONSTANT int stages) {
  using T = typename Traits::T;
  using Op = Operands<T>;
  constexpr int kRows = Traits::kRows, kN = Traits::kN, kDim = Traits::kDim;
  constexpr int kSize = Traits::kSize, kMTiles = Traits::kMTiles, kNTiles = Traits::kNTiles;
  constexpr int kDepth = Op::kDepth, kRowBytes = kDim * kSize;
  const Problem& problem = p.problem;
  const bool precise = problem.precision == Float32Precision::kTf32x3;

  // ---- What this block owns.
  const int tiles = (problem.pixels + kRows - 1) / kRows;
  const int slice = block_index() % Traits::kSlices;
  const int tile_index = block_index() / Traits::kSlices % tiles;
  const int map = block_index() / Traits::kSlices / tiles;  // (image, class)
  const int image = map / problem.ways, way = map % problem.ways;
  const int episode = image / problem.queries;
  const int first_pixel = tile_index * kRows, pixels = problem.pixels - first_pixel;
  const Bag bag = load_bag(p.offsets, episode * problem.ways + way, problem.total);
  const float scale = exponent_scale(problem, bag.count);

  // ---- Shared memory.
  const MapTile<T, kRows, kDim> queries{shared_memory(),
                                        has_channel_rows(p.feat.channel, p.feat.pixel)};
  uint8_t* const prototypes = shared_memory() + Traits::kMapBytes;
  uint8_t* const weights = prototypes + stages * Traits::kStageBytes;
  float* const mean = reinterpret_cast<float*>(weights + Traits::kWeightBytes);
  float* const rnorm = mean + kRows;
  float* const rescale = rnorm + kRows;
  float* const exchange = rescale + kRows;  // [kWarpsN][kRows][2]

  const int lane = lane_index(), warp = warp_index();
  const int g = lane / 4, i = lane % 4;
  const int warp_n = warp % Traits::kWarpsN;
  const int warp_m = warp / Traits::kWarpsN % Traits::kWarpsM;
  const int warp_k = warp / Traits::kWarpsN / Traits::kWarpsM;
  const int row0 = warp_m * kMTiles * 16, column0 = warp_n * 8;

  const T* const feat = static_cast<const T*>(p.feat.data) + episode * p.feat.episode +
                        image % problem.queries * p.feat.query +
                        int64_t(first_pixel) * p.feat.pixel;
  const T* const protos = static_cast<const T*>(p.protos) + int64_t(bag.begin) * problem.dim;
  const int steps = (bag.count + kN - 1) / kN;
  const auto load_prototypes = [&](int step) {
    if (step < steps)
      load_rows<T, kN, kDim>(prototypes + step % stages * Traits::kStageBytes,
                             Matrix<T>{protos + int64_t(step) * kN * problem.dim, problem.dim, 1,
                                       bag.count - step * kN, problem.dim});
    copy_async_commit();
  };

  // ---- The queries: statistics, the copy of F in the output, registers.
  queries.load(feat, p.feat.channel, p.feat.pixel, problem.dim, pixels);
  copy_async_commit();
  load_prototypes(0);
  copy_async_wait<1>();
  sync_block();
  map_statistics(queries, problem.dim, problem.eps, reinterpret_cast<float*>(weights), mean, rnorm);
  T* const out =
      static_cast<T*>(p.out.data) + map * p.out.image + int64_t(first_pixel) * p.out.pixel;
  const int first_channel = slice * Traits::kSliceDim;
  if (problem.concat)
    queries.store(out, p.out.channel, p.out.pixel, problem.dim, pixels, first_channel,
                  Traits::kSliceDim);
  if (p.statistics.query != nullptr && way == 0 && slice == 0 && thread_index() < kRows &&
      thread_index() < pixels) {
    float* to = p.statistics.query + int64_t(image) * 2 * problem.pixels + first_pixel;
    to[thread_index()] = mean[thread_index()];
    to[problem.pixels + thread_index()] = rnorm[thread_index()];
  }
  if constexpr (Traits::kCentred) {
    sync_block();
    const int pixel = thread_index() % kRows;
    for (int d = thread_index() / kRows; d < problem.dim; d += kThreads / kRows) {
      float* x = queries.at(pixel, d);
      *x -= mean[pixel];
    }
    sync_block();
  }
  typename Op::A held[Traits::kQueriesInRegisters ? kDim / kDepth : 1];
  if constexpr (Traits::kQueriesInRegisters) {
    FP_UNROLL
    for (int k = 0; k < kDim / kDepth; ++k) load_a(held[k], queries, 0, k * kDepth);
  }

  float acc[kRows / 16][kNTiles][4] = {};
  float row_sum[kMTiles][2] = {}, row_mean[kMTiles][2] = {}, row_max[kMTiles][2];
  FP_UNROLL
  for (int m = 0; m < kMTiles; ++m) row_max[m][0] = row_max[m][1] = -infinity();

  FP_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    if (stages == 2) {
      load_prototypes(step + 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    sync_block();
    uint8_t* const keys = prototypes + step % stages * Traits::kStageBytes;
    const int left = bag.count - step * kN;
    const float* const stats = p.statistics.protos;
    if constexpr (Traits::kCentred) {
      for (int row = warp; row < kN && row < left; row += kWarps) {
        const float centre = stats[bag.begin + step * kN + row];
        for (int d = lane; d < problem.dim; d += 32)
          *reinterpret_cast<float*>(keys + swizzled<kRowBytes>(row, d * 4)) -= centre;
      }
      sync_block();
    }

    // ---- S: two accumulators a tile, so that a product need not wait for the one before.
    float s[2][kMTiles][4] = {};
    RowSums sums;
    float first = 0;
    const bool find_statistics = Traits::kFindsStatistics && stats == nullptr;
    if constexpr (Traits::kFindsStatistics)
      first = to_float(*reinterpret_cast<const T*>(keys + swizzled<kRowBytes>(column0 + g, 0)));
    constexpr int kPartDim = kDim / Traits::kWarpsK;
    [[maybe_unused]] constexpr int kUnroll =
        Traits::kQueriesInRegisters ? kPartDim / kDepth / 2 : 1;
#pragma unroll kUnroll
    for (int k = 0; k < kPartDim; k += 2 * kDepth) {
      typename Op::B b;
      const int channel = warp_k * kPartDim + k;
      Op::template load_b<kRowBytes, false>(b, keys, column0, channel);
      FP_UNROLL
      for (int half_step = 0; half_step < 2; ++half_step) {
        FP_UNROLL
        for (int m = 0; m < kMTiles; ++m) {
          if constexpr (Traits::kQueriesInRegisters) {
            Op::multiply(s[half_step][m], held[k / kDepth + half_step], b, half_step, precise);
          } else {
            typename Op::A a;
            load_a(a, queries, row0 + m * 16, channel + half_step * kDepth);
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
            const int d = channel + word * 8 + 2 * i;
            if (d < problem.dim) sums.add(x - first);
            if (d + 1 < problem.dim) sums.add(y - first);
          }
        }
      }
    }

    // ---- Mean and reciprocal norm of prototypes 2 i and 2 i + 1 of these 8.
    float mean_p[2] = {}, rnorm_p[2] = {};
    if (find_statistics) {
      sums.total = sum_of_quad(sums.total);
      sums.squares = sum_of_quad(sums.squares);
      const RowStatistics found = row_statistics(first, sums, problem.dim, problem.eps);
      FP_UNROLL
      for (int j = 0; j < 2; ++j) {
        mean_p[j] = shuffle(found.mean, (2 * i + j) * 4);
        rnorm_p[j] = shuffle(found.rnorm, (2 * i + j) * 4);
      }
    } else {
      FP_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int column = column0 + 2 * i + j, at = bag.begin + step * kN + column;
        if (column < left) {
          mean_p[j] = stats[at];
          rnorm_p[j] = stats[problem.total + at];
        }
      }
    }

    // ---- Cosines, weights.
    FP_UNROLL
    for (int m = 0; m < kMTiles; ++m) {
      FP_UNROLL
      for (int j = 0; j < 4; ++j) s[0][m][j] += s[1][m][j];
    }
    if constexpr (Traits::kWarpsK == 2) {
      FP_UNROLL
      for (int m = 0; m < kMTiles; ++m) {
        FP_UNROLL
        for (int h = 0; h < 2; ++h) {
          uint8_t* at = weights + swizzled<Traits::kWeightRowBytes>(row0 + m * 16 + h * 8 + g,
                                                                    (column0 + 2 * i) * kSize);
          if (warp_k == 1) Op::store_pair(at, s[0][m][2 * h], s[0][m][2 * h + 1]);
        }
      }
      sync_block();
      FP_UNROLL
      for (int m = 0; m < kMTiles; ++m) {
        FP_UNROLL
        for (int j = 0; j < 4; ++j) {
          const uint8_t* at =
              weights + swizzled<Traits::kWeightRowBytes>(row0 + m * 16 + j / 2 * 8 + g,
                                                          (column0 + 2 * i + j % 2) * kSize);
          if (warp_k == 0) s[0][m][j] += *reinterpret_cast<const float*>(at);
        }
      }
    }
    FP_UNROLL
    for (int m = 0; m < kMTiles; ++m) {
      FP_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int row = row0 + m * 16 + j / 2 * 8 + g;
        float product = s[0][m][j];
        if constexpr (!Traits::kCentred) product -= float(problem.dim) * mean[row] * mean_p[j % 2];
        s[0][m][j] =
            column0 + 2 * i + j % 2 < left ? product * (rnorm[row] * rnorm_p[j % 2]) : -infinity();
      }
    }
    if (problem.running_max) {
      FP_UNROLL
      for (int m = 0; m < kMTiles; ++m) {
        FP_UNROLL
        for (int h = 0; h < 2; ++h) {
          const float found = max_of_quad(fmaxf(s[0][m][2 * h], s[0][m][2 * h + 1]));
          if (i == 0 && warp_k == 0)
            exchange[2 * (warp_n * kRows + row0 + m * 16 + h * 8 + g)] = found;
        }
      }
      sync_block();
    }
    FP_UNROLL
    for (int m = 0; m < kMTiles; ++m) {
      FP_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = row0 + m * 16 + h * 8 + g;
        float bound = scale;
        if (problem.running_max) {
          float most = row_max[m][h];
          FP_UNROLL
          for (int other = 0; other < Traits::kWarpsN; ++other)
            most = fmaxf(most, exchange[2 * (other * kRows + row)]);
          const float factor = step == 0 ? 0 : exp2_fast((row_max[m][h] - most) * scale);
          row_max[m][h] = most;
          row_sum[m][h] *= factor;
          row_mean[m][h] *= factor;
          if (warp_n == 0 && warp_k == 0 && i == 0) rescale[row] = factor;
          bound = most * scale;
        }
        float w[2];
        FP_UNROLL
        for (int j = 0; j < 2; ++j) {
          // One rounding, not two: the logits may be large. A bag of one has the scale 0.
          const float logit = multiply_add(s[0][m][2 * h + j], scale, -bound);
          w[j] = column0 + 2 * i + j < left ? exp2_fast(logit) : 0;
        }
        row_sum[m][h] += w[0] + w[1];
        if constexpr (Traits::kCentred) row_mean[m][h] += w[0] * mean_p[0] + w[1] * mean_p[1];
        if (warp_k == 0)
          Op::store_pair(
              weights + swizzled<Traits::kWeightRowBytes>(row, (column0 + 2 * i) * kSize), w[0],
              w[1]);
      }
    }
    sync_block();

    // ---- G += W P.
    if (problem.running_max) {
      FP_UNROLL
      for (int m = 0; m < kRows / 16; ++m) {
        const float factor[2] = {rescale[m * 16 + g], rescale[m * 16 + 8 + g]};
        FP_UNROLL
        for (int n = 0; n < kNTiles; ++n) {
          FP_UNROLL
          for (int j = 0; j < 4; ++j) acc[m][n][j] *= factor[j / 2];
        }
      }
    }
    const int channel0 = first_channel + warp * kNTiles * 8;
    FP_NO_UNROLL
    for (int k = 0; k < kN; k += 2 * kDepth) {
      typename Op::A a[kRows / 16][2];
      FP_UNROLL
      for (int m = 0; m < kRows / 16; ++m) {
        FP_UNROLL
        for (int half_step = 0; half_step < 2; ++half_step)
          Op::template load_a<Traits::kWeightRowBytes, false>(a[m][half_step], weights, m * 16,
                                                              k + half_step * kDepth);
      }
      FP_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        typename Op::B b;
        Op::template load_b<kRowBytes, true>(b, keys, channel0 + n * 8, k);
        FP_UNROLL
        for (int m = 0; m < kRows / 16; ++m) {
          FP_UNROLL
          for (int half_step = 0; half_step < 2; ++half_step)
            Op::multiply(acc[m][n], a[m][half_step], b, half_step, precise);
        }
      }
    }
    sync_block();
    if (stages == 1) load_prototypes(step + 1);
  }
  copy_async_wait<0>();

  // ---- Sums over the columns of warps.
  FP_UNROLL
  for (int m = 0; m < kMTiles; ++m) {
    FP_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + m * 16 + h * 8 + g;
      const float sum = sum_of_quad(row_sum[m][h]), mean_sum = sum_of_quad(row_mean[m][h]);
      if (i == 0 && warp_k == 0) {
        exchange[2 * (warp_n * kRows + row)] = sum;
        exchange[2 * (warp_n * kRows + row) + 1] = mean_sum;
        if (warp_n == 0) rescale[row] = problem.running_max ? row_max[m][h] * scale : scale;
      }
    }
  }
  if constexpr (Traits::kCentred)  // F itself again
    queries.load(feat, p.feat.channel, p.feat.pixel, problem.dim, pixels);
  copy_async_commit();
  copy_async_wait<0>();
  sync_block();

  // ---- G, in registers; then G * F takes the place of F, and G that of G * F.
  const int channel0 = first_channel + warp * kNTiles * 8;
  FP_UNROLL
  for (int m = 0; m < kRows / 16; ++m) {
    FP_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = m * 16 + h * 8 + g;
      float sum = 0, mean_sum = 0;
      FP_UNROLL
      for (int other = 0; other < Traits::kWarpsN; ++other) {
        sum += exchange[2 * (other * kRows + row)];
        mean_sum += exchange[2 * (other * kRows + row) + 1];
      }
      // An empty bag gives zeros; one whose offsets make no sense gives NaN.
      const float inverse = !bag.valid ? not_a_number() : bag.count == 0 ? 0 : 1 / sum;
      if (p.statistics.lse != nullptr && slice == 0 && warp == 0 && i == 0 && row < pixels)
        p.statistics.lse[int64_t(map) * problem.pixels + first_pixel + row] =
            !bag.valid       ? not_a_number()
            : bag.count == 0 ? 0
                             : rescale[row] + log2_fast(sum);
      FP_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        FP_UNROLL
        for (int j = 2 * h; j < 2 * h + 2; ++j) {
          T* at = queries.at(row, channel0 + n * 8 + 2 * i + j % 2);
          acc[m][n][j] = (acc[m][n][j] + mean_sum) * inverse;
          *at = from_float<T>(acc[m][n][j] * to_float(*at));
        }
      }
    }
  }
  sync_block();
  queries.store(out + (problem.concat ? problem.dim * p.out.channel : 0), p.out.channel,
                p.out.pixel, problem.dim, pixels, first_channel, Traits::kSliceDim);
  if (p.agg.data == nullptr) return;
  sync_block();
  FP_UNROLL
  for (int m = 0; m < kRows / 16; ++m) {
    FP_UNROLL
    for (int n = 0; n < kNTiles; ++n) {
      FP_UNROLL
      for (int j = 0; j < 4; ++j)
        *queries.at(m * 16 + j / 2 * 8 + g, channel0 + n * 8 + 2 * i + j % 2) =
            from_float<T>(acc[m][n][j]);
    }
  }
  sync_block();
  queries.store(
      static_cast<T*>(p.agg.data) + map * p.agg.image + int64_t(first_pixel) * p.agg.pixel,
      p.agg.channel, p.agg.pixel, problem.dim, pixels, first_channel, Traits::kSliceDim);
}

template <class Traits>
const char* launch_forward_of(const ForwardParams& p, int stages, void* stream) {
  const Problem& problem = p.problem;
  const int tiles = (problem.pixels + Traits::kRows - 1) / Traits::kRows;
  const int blocks = problem.episodes * problem.queries * problem.ways * tiles * Traits::kSlices;
  return launch<forward_kernel<Traits>>(
      Grid{blocks, kThreads, Traits::shared_bytes(stages), 1, stream}, p, stages);
}

}  // namespace fastproto::cuda::sm80
