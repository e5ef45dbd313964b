// SPDX-License-Identifier: Apache-2.0
// The gradient of the queries by mma.sync. A block owns 16 pixels of one image and, of the channels
// of the result, all or (small problems) one of kSlices; it walks over the classes and over each
// bag in tiles of kN prototypes. Three products a tile: S = F P^T again, dA = dO P^T, and dF += dS
// P.
//
// Budget, D = 512: half types F 16 + dO 16 + P 64 a stage + dS 2 KiB; float32 F 32 + dO 32 + P 32 a
// stage + 7 KiB. dF in 32 registers.
#pragma once

#include "tiles.cuh"

namespace fastproto::cuda::sm80 {

template <class T_, int kDim_, int kSlices_>
struct BackwardQueryTraits {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr int kSlices = kSlices_;
  static constexpr int kSize = int(sizeof(T));
  static constexpr bool kCentred = kSize == 4;
  static constexpr int kRows = 16;
  static constexpr int kN = backward_query_tile_n(kSize);
  static constexpr int kWarpsN = kN / 8;
  static constexpr int kWarpsK = kWarps / kWarpsN;
  static constexpr int kSliceDim = kDim / kSlices;
  static constexpr int kNTiles = kSliceDim / kWarps / 8;

  static constexpr int kMapBytes = kRows * kDim * kSize;
  static constexpr int kStageBytes = kN * kDim * kSize;
  static constexpr int kWeightRowBytes = kN * kSize;
  static constexpr int kWeightBytes = kRows * kWeightRowBytes;
  static constexpr int kPartialBytes = (kWarpsK - 1) * 2 * kRows * kN * 4;
  static constexpr int kFloats = kRows * 5;  // of every row: mean, rnorm, lse, delta, sum of dO
  static constexpr int kThreads = sm80::kThreads;
  static constexpr int shared_bytes(int stages) {
    return backward_query_bytes(kSize, kDim, stages);
  }
  static constexpr int kSharedBytes = shared_bytes(2);
  static constexpr int kMaxRegisters = 255;

  static_assert(shared_bytes(1) ==
                2 * kMapBytes + kStageBytes + kWeightBytes + kPartialBytes + kFloats * 4);
  static_assert(shared_bytes(2) == shared_bytes(1) + kStageBytes);
  static_assert(kNTiles >= 1 && kNTiles * 8 * kWarps * kSlices == kDim);
  static_assert(kWeightBytes + kPartialBytes >= 8 * kThreads, "scratch of the row sums");
  static_assert(kWeightBytes >= kWarpsN * kRows * 8, "exchange");
  static_assert(kStageBytes >= kRows * kDim * 4, "the result is staged where a tile was");
  static_assert(kSharedBytes <= 163 * 1024 && kThreads * kMaxRegisters <= 65536);
};

template <class Traits>
FP_KERNEL backward_query_kernel(FP_GRID_CONSTANT BackwardParams p, FP_GRID_CONSTANT int stages) {
  using T = typename Traits::T;
  using Op = Operands<T>;
  constexpr int kRows = Traits::kRows, kN = Traits::kN, kDim = Traits::kDim;
  constexpr int kSize = Traits::kSize, kNTiles = Traits::kNTiles;
  constexpr int kDepth = Op::kDepth, kRowBytes = kDim * kSize;
  const Problem& problem = p.problem;
  const bool precise = problem.precision == Float32Precision::kTf32x3;

  const int tiles = (problem.pixels + kRows - 1) / kRows;
  const int slice = block_index() % Traits::kSlices;
  const int tile_index = block_index() / Traits::kSlices % tiles;
  const int image = block_index() / Traits::kSlices / tiles;
  const int episode = image / problem.queries;
  const int first_pixel = tile_index * kRows, pixels = problem.pixels - first_pixel;

  const MapTile<T, kRows, kDim> queries{shared_memory(),
                                        has_channel_rows(p.feat.channel, p.feat.pixel)};
  const MapTile<T, kRows, kDim> grads{shared_memory() + Traits::kMapBytes, queries.channel_rows};
  uint8_t* const prototypes = shared_memory() + 2 * Traits::kMapBytes;
  uint8_t* const weights = prototypes + stages * Traits::kStageBytes;
  float* const partials = reinterpret_cast<float*>(weights + Traits::kWeightBytes);
  float* const mean = partials + Traits::kPartialBytes / 4;
  float* const rnorm = mean + kRows;
  float* const lse = rnorm + kRows;
  float* const delta = lse + kRows;
  float* const sum_grad = delta + kRows;
  float* const scratch = reinterpret_cast<float*>(weights);   // before the products of a class
  float* const exchange = reinterpret_cast<float*>(weights);  // after all: [kWarpsN][kRows][2]

  const int lane = lane_index(), warp = warp_index();
  const int g = lane / 4, i = lane % 4;
  const int warp_n = warp % Traits::kWarpsN, warp_k = warp / Traits::kWarpsN;
  const int column0 = warp_n * 8;
  const int row_pixel = thread_index() % kRows, part = thread_index() / kRows;
  constexpr int kParts = kThreads / kRows;

  const T* const feat = static_cast<const T*>(p.feat.data) + episode * p.feat.episode +
                        image % problem.queries * p.feat.query +
                        int64_t(first_pixel) * p.feat.pixel;
  const T* const grad_copy = static_cast<const T*>(p.grad_out.data) + episode * p.grad_out.episode +
                             image % problem.queries * p.grad_out.query +
                             int64_t(first_pixel) * p.grad_out.pixel;
  const T* const grad_enhanced =
      grad_copy + (problem.concat ? problem.dim * p.grad_out.channel : 0);
  const T* const agg = static_cast<const T*>(p.agg.data) +
                       int64_t(image) * problem.ways * p.agg.image +
                       int64_t(first_pixel) * p.agg.pixel;
  const Matrix<T> feat_matrix =
      queries.matrix(feat, p.feat.channel, p.feat.pixel, problem.dim, pixels);

  // ---- The queries.
  queries.load(feat, p.feat.channel, p.feat.pixel, problem.dim, pixels);
  copy_async_commit();
  if (thread_index() < kRows) {
    const float* from = p.statistics.query + int64_t(image) * 2 * problem.pixels + first_pixel;
    const bool inside = row_pixel < pixels;
    mean[row_pixel] = inside ? from[row_pixel] : 0;
    rnorm[row_pixel] = inside ? from[problem.pixels + row_pixel] : 0;
  }
  copy_async_wait<0>();
  sync_block();
  if constexpr (Traits::kCentred)
    for (int d = part; d < problem.dim; d += kParts) *queries.at(row_pixel, d) -= mean[row_pixel];
  // The accumulator holds dF times a power of two near the norm of F (docs/kernels/triton.md).
  const float row_rnorm[2] = {rnorm[g], rnorm[g + 8]};
  float power[2], rnorm_power[2];
  FP_UNROLL
  for (int h = 0; h < 2; ++h) {
    const float r = of_constant(row_rnorm[h], problem.eps);
    power[h] = power_of_two_near(r);
    rnorm_power[h] = r * power[h];
  }

  float acc[kNTiles][4] = {};
  float sum_cos[2] = {}, sum_mean[2] = {};
  const int first_channel = slice * Traits::kSliceDim;
  const int channel0 = first_channel + warp * kNTiles * 8;

  FP_NO_UNROLL
  for (int way = 0; way < problem.ways; ++way) {
    const Bag bag = load_bag(p.offsets, episode * problem.ways + way, problem.total);
    const float scale = exponent_scale(problem, bag.count);
    const T* const protos = static_cast<const T*>(p.protos) + int64_t(bag.begin) * problem.dim;
    const int steps = (bag.count + kN - 1) / kN;
    const auto load_prototypes = [&](int step) {
      if (step < steps)
        load_rows<T, kN, kDim>(prototypes + step % stages * Traits::kStageBytes,
                               Matrix<T>{protos + int64_t(step) * kN * problem.dim, problem.dim, 1,
                                         bag.count - step * kN, problem.dim});
      copy_async_commit();
    };
    load_prototypes(0);

    // ---- dO, delta = <dO, G>, the sum of dO.
    grads.load_product(grads.matrix(grad_enhanced + way * p.grad_out.way, p.grad_out.channel,
                                    p.grad_out.pixel, problem.dim, pixels),
                       feat_matrix);
    sync_block();
    {
      const T* const way_agg = agg + way * p.agg.image;
      float dot = 0, sum = 0;
      for (int d = part; d < problem.dim; d += kParts) {
        const float x = to_float(*grads.at(row_pixel, d));
        const float y =
            row_pixel < pixels ? to_float(way_agg[d * p.agg.channel + row_pixel * p.agg.pixel]) : 0;
        dot = multiply_add(x, y, dot);
        sum += x;
      }
      scratch[2 * thread_index()] = dot;
      scratch[2 * thread_index() + 1] = sum;
      sync_block();
      if (part == 0) {
        for (int other = 1; other < kParts; ++other) {
          dot += scratch[2 * (other * kRows + row_pixel)];
          sum += scratch[2 * (other * kRows + row_pixel) + 1];
        }
        const int64_t at = (int64_t(image) * problem.ways + way) * problem.pixels + first_pixel;
        const bool inside = row_pixel < pixels;
        delta[row_pixel] = dot;
        sum_grad[row_pixel] = sum;
        lse[row_pixel] = inside ? p.statistics.lse[at + row_pixel] : 0;
        if (slice == 0 && inside) p.delta[at + row_pixel] = dot;
      }
      sync_block();
    }

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
      const float* const stats = p.statistics.protos + bag.begin + step * kN;
      if constexpr (Traits::kCentred) {
        for (int row = warp; row < kN && row < left; row += kWarps)
          for (int d = lane; d < problem.dim; d += 32)
            *reinterpret_cast<float*>(keys + swizzled<kRowBytes>(row, d * 4)) -= stats[row];
        sync_block();
      }

      // ---- S and dA.
      float s[2][4] = {}, da[2][4] = {};
      constexpr int kPartDim = kDim / Traits::kWarpsK;
      FP_NO_UNROLL
      for (int k = warp_k * kPartDim; k < (warp_k + 1) * kPartDim; k += 2 * kDepth) {
        typename Op::B b;
        Op::template load_b<kRowBytes, false>(b, keys, column0, k);
        FP_UNROLL
        for (int half_step = 0; half_step < 2; ++half_step) {
          typename Op::A a;
          load_a(a, queries, 0, k + half_step * kDepth);
          Op::multiply(s[half_step], a, b, half_step, precise);
          load_a(a, grads, 0, k + half_step * kDepth);
          Op::multiply(da[half_step], a, b, half_step, precise);
        }
      }
      sum_products<Traits::kWarpsK, kRows, kN>(s, da, partials, warp_k, g, column0 + 2 * i);

      // ---- dS, and what it is multiplied with P by.
      if (warp_k == 0) {
        FP_UNROLL
        for (int h = 0; h < 2; ++h) {
          const int row = h * 8 + g;
          float pair[2];
          FP_UNROLL
          for (int j = 0; j < 2; ++j) {
            const int column = column0 + 2 * i + j;
            const bool inside = column < left;
            const float mean_p = inside ? stats[column] : 0;
            const float rnorm_p = inside ? stats[problem.total + column] : 0;
            float product = s[0][2 * h + j], grad_weight = da[0][2 * h + j];
            if constexpr (Traits::kCentred)
              grad_weight += sum_grad[row] * mean_p;
            else
              product -= float(problem.dim) * mean[row] * mean_p;
            const float cos = product * (row_rnorm[h] * rnorm_p);
            const float weight = inside ? exp2_fast(multiply_add(cos, scale, -lse[row])) : 0;
            const float grad_cos = weight * (grad_weight - delta[row]) * (scale * kLn2);
            sum_cos[h] = multiply_add(grad_cos, cos, sum_cos[h]);
            pair[j] = to_float(from_float<T>(grad_cos * (rnorm_power[h] * rnorm_p)));
            if constexpr (!Traits::kCentred)
              sum_mean[h] = multiply_add(pair[j], mean_p, sum_mean[h]);
          }
          Op::store_pair(
              weights + swizzled<Traits::kWeightRowBytes>(row, (column0 + 2 * i) * kSize), pair[0],
              pair[1]);
        }
      }
      sync_block();

      // ---- dF += dS P.
      FP_NO_UNROLL
      for (int k = 0; k < kN; k += 2 * kDepth) {
        typename Op::A a[2];
        FP_UNROLL
        for (int half_step = 0; half_step < 2; ++half_step)
          Op::template load_a<Traits::kWeightRowBytes, false>(a[half_step], weights, 0,
                                                              k + half_step * kDepth);
        FP_UNROLL
        for (int n = 0; n < kNTiles; ++n) {
          typename Op::B b;
          Op::template load_b<kRowBytes, true>(b, keys, channel0 + n * 8, k);
          FP_UNROLL
          for (int half_step = 0; half_step < 2; ++half_step)
            Op::multiply(acc[n], a[half_step], b, half_step, precise);
        }
      }
      sync_block();
      if (stages == 1) load_prototypes(step + 1);
    }
    if (!bag.valid) sum_cos[0] = sum_cos[1] = not_a_number();
    copy_async_wait<0>();
    sync_block();
  }

  // ---- Sums over the columns of warps.
  FP_UNROLL
  for (int h = 0; h < 2; ++h) {
    const float cos = sum_of_quad(sum_cos[h]), means = sum_of_quad(sum_mean[h]);
    if (i == 0 && warp_k == 0) {
      exchange[2 * (warp_n * kRows + h * 8 + g)] = cos;
      exchange[2 * (warp_n * kRows + h * 8 + g) + 1] = means;
    }
  }
  sync_block();

  // ---- The products' part of dF as floats where a tile of prototypes was; then piece by piece.
  const MapTile<float, kRows, kDim> result{prototypes, queries.channel_rows};
  float totals[2] = {};
  FP_UNROLL
  for (int h = 0; h < 2; ++h) {
    float means = 0;
    for (int other = 0; other < Traits::kWarpsN; ++other) {
      totals[h] += exchange[2 * (other * kRows + h * 8 + g)];
      means += exchange[2 * (other * kRows + h * 8 + g) + 1];
    }
    FP_UNROLL
    for (int n = 0; n < kNTiles; ++n) {
      FP_UNROLL
      for (int j = 0; j < 2; ++j)
        *result.at(h * 8 + g, channel0 + n * 8 + 2 * i + j) =
            (acc[n][2 * h + j] - means) / power[h];
    }
    if (warp == 0 && i == 0)
      delta[h * 8 + g] = projection_factor(row_rnorm[h], problem.eps) * totals[h];
  }
  sync_block();
  if (p.temperature_terms != nullptr && slice == 0 && thread_index() == 0) {
    float sum = 0;
    for (int row = 0; row < kRows && row < pixels; ++row)
      for (int other = 0; other < Traits::kWarpsN; ++other)
        sum += exchange[2 * (other * kRows + row)];
    p.temperature_terms[image * tiles + tile_index] = sum;
  }

  const Matrix<T> to =
      queries.matrix(static_cast<T*>(p.grad_feat.data) + image * p.grad_feat.image +
                         int64_t(first_pixel) * p.grad_feat.pixel,
                     p.grad_feat.channel, p.grad_feat.pixel, problem.dim, pixels);
  constexpr int kCount = Piece<T>::kCount;
  const int columns = queries.channel_rows ? kRows : Traits::kSliceDim;
  const int rows = queries.channel_rows ? Traits::kSliceDim : kRows;
  FP_NO_UNROLL
  for (int index = thread_index(); index < rows * columns / kCount; index += kThreads) {
    const int row = index / (columns / kCount) + (queries.channel_rows ? first_channel : 0);
    const int column =
        index % (columns / kCount) * kCount + (queries.channel_rows ? 0 : first_channel);
    Piece<T> sum = Piece<T>::load(feat_matrix, feat_matrix.has_pieces(), row, column);
    FP_UNROLL
    for (int k = 0; k < kCount; ++k) {
      const int pixel = queries.channel_rows ? column + k : row;
      const int channel = queries.channel_rows ? row : column + k;
      sum.x[k] = *result.at(pixel, channel) - (sum.x[k] - mean[pixel]) * delta[pixel];
    }
    FP_NO_UNROLL
    for (int way = 0; way < problem.ways; ++way) {
      const Matrix<T> dy = queries.matrix(grad_enhanced + way * p.grad_out.way, p.grad_out.channel,
                                          p.grad_out.pixel, problem.dim, pixels);
      const Matrix<T> map =
          queries.matrix(agg + way * p.agg.image, p.agg.channel, p.agg.pixel, problem.dim, pixels);
      const Piece<T> a = Piece<T>::load(dy, dy.has_pieces(), row, column);
      const Piece<T> b = Piece<T>::load(map, map.has_pieces(), row, column);
      FP_UNROLL
      for (int k = 0; k < kCount; ++k) sum.x[k] = multiply_add(a.x[k], b.x[k], sum.x[k]);
      if (problem.concat) {
        const Matrix<T> copy = queries.matrix(grad_copy + way * p.grad_out.way, p.grad_out.channel,
                                              p.grad_out.pixel, problem.dim, pixels);
        const Piece<T> c = Piece<T>::load(copy, copy.has_pieces(), row, column);
        FP_UNROLL
        for (int k = 0; k < kCount; ++k) sum.x[k] += c.x[k];
      }
    }
    sum.store(to, to.has_pieces(), row, column);
  }
}

template <class Traits>
const char* launch_backward_query_of(const BackwardParams& p, int stages, void* stream) {
  const Problem& problem = p.problem;
  const int tiles = (problem.pixels + Traits::kRows - 1) / Traits::kRows;
  const int blocks = problem.episodes * problem.queries * tiles * Traits::kSlices;
  return launch<backward_query_kernel<Traits>>(
      Grid{blocks, kThreads, Traits::shared_bytes(stages), 1, stream}, p, stages);
}

}  // namespace fastproto::cuda::sm80
