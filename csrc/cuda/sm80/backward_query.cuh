// SPDX-License-Identifier: Apache-2.0
// The gradient of the queries by mma.sync. A block owns 16 pixels of one image and, of the channels
// of the result, all or (small problems) one of kSlices; it walks over the classes and over each
// bag in tiles of kN prototypes. Three products a tile: S = F P^T again, dA = dO P^T, and dF += dS
// P.
//
// Budget, D = 512: half types F 16 + dO 16 + P 64 a stage + dS 2 KiB; float32 F 32 + dO 32 + P 32 a
// stage + 7 KiB. dF in 32 registers.
#pragma once

#include "backward_tiles.cuh"

namespace fastproto::cuda::sm80 {

template <class T, int kDim, int kSlices>
struct BackwardQueryTraits : TraitsOf<T, kDim, kSlices> {
  static constexpr int kSize = int(sizeof(T));
  static constexpr int kRows = 16;
  static constexpr int kN = backward_query_tile_n(kSize);
  static constexpr int kWarpsN = kN / 8, kWarpsM = 1, kWarpsK = kWarps / kWarpsN;
  static constexpr int kMTiles = 1;
  using Pixels = PixelTile<T, kRows, kDim>;

  static constexpr int kStageBytes = kN * kDim * kSize;
  static constexpr int kWeightRowBytes = kN * kSize;
  static constexpr int kWeightBytes = kRows * kWeightRowBytes;
  static constexpr int kPartialBytes = (kWarpsK - 1) * 2 * kRows * kN * 4;
  static constexpr int shared_bytes(int stages) {
    return backward_query_bytes(kSize, kDim, stages);
  }
  static constexpr int kSharedBytes = shared_bytes(2);

  static_assert(shared_bytes(1) == 2 * Pixels::kMapBytes + kStageBytes + kWeightBytes +
                                       kPartialBytes + Pixels::kFloats * 4);
  static_assert(shared_bytes(2) == shared_bytes(1) + kStageBytes);
  static_assert(kWeightBytes + kPartialBytes >= 8 * kThreads, "scratch of the row sums");
  static_assert(kWeightBytes >= kWarpsN * kRows * 8, "exchange");
  static_assert(kStageBytes >= kRows * kDim * 4, "the result is staged where a tile was");
  static_assert(kSharedBytes <= 163 * 1024);
};

// What a block owns, and the phases of its work.
template <class Traits>
struct BackwardQueryBlock {
  using T = typename Traits::T;
  using Op = typename Traits::Op;
  static constexpr int kRows = Traits::kRows, kN = Traits::kN, kDim = Traits::kDim;
  static constexpr int kNTiles = Traits::kNTiles;
  using Stream = PrototypeStream<T, kN, kDim>;
  using Products = float[2][4];
  // Of a thread's two rows of S.
  struct Rows {
    float rnorm[2];
    float power[2];        // The accumulator holds dF times this: a power of two near the norm of F
    float rnorm_power[2];  // (docs/kernels/triton.md).
    float cos[2] = {}, mean[2] = {};  // sums of dS c; of dS r(P) mean(P), as the accumulator
  };

  const BackwardParams& p;
  const int stages;
  const Problem& problem = p.problem;
  const bool precise = problem.precision == Float32Precision::kTf32x3;
  const Place<Traits> at{};
  const int tiles = (problem.pixels + kRows - 1) / kRows;
  const int tile = block_index() / Traits::kSlices, image = tile / tiles;
  const int episode = image / problem.queries, query = image % problem.queries;
  const int first_pixel = tile % tiles * kRows, left = problem.pixels - first_pixel;

  uint8_t* const prototypes = shared_memory() + 2 * Traits::Pixels::kMapBytes;
  uint8_t* const weights = prototypes + stages * Traits::kStageBytes;
  float* const partials = reinterpret_cast<float*>(weights + Traits::kWeightBytes);
  float* const exchange = reinterpret_cast<float*>(weights);  // after all: [kWarpsN][kRows][2]
  const typename Traits::Pixels pixels{p, shared_memory(), partials + Traits::kPartialBytes / 4};
  const Matrix<T> feat =
      pixels.matrix(map_of<T>(p.feat, episode, query, first_pixel), p.feat, left);
  const T* const grad = map_of<T>(p.grad_out, episode, query, first_pixel);

  FP_DEVICE Matrix<T> copy_of(int way) const {  // dY1
    return pixels.matrix(grad + way * p.grad_out.way, p.grad_out, left);
  }
  FP_DEVICE Matrix<T> enhanced_of(int way) const {  // dY2
    return pixels.matrix(
        grad + (problem.concat ? problem.dim * p.grad_out.channel : 0) + way * p.grad_out.way,
        p.grad_out, left);
  }
  FP_DEVICE Matrix<T> agg_of(int way) const {  // G
    return pixels.matrix(static_cast<const T*>(p.agg.data) +
                             (int64_t(image) * problem.ways + way) * p.agg.image +
                             int64_t(first_pixel) * p.agg.pixel,
                         p.agg, left);
  }
  FP_DEVICE Stream stream_of(const Bag& bag) const {
    return {prototypes, stages, at.warp, rows_of<T>(p.protos, bag.begin, bag.count, problem.dim)};
  }

  FP_DEVICE void load_queries(Rows& rows) const {
    pixels.load(feat, p.statistics.query + int64_t(image) * 2 * problem.pixels + first_pixel, left);
    copy_async_wait<0>();
    sync_block();
    if constexpr (Traits::kCentred)
      pixels.for_channels(
          [&](int d) { *pixels.queries.at(pixels.pixel, d) -= pixels.mean[pixels.pixel]; });
    FP_UNROLL
    for (int h = 0; h < 2; ++h) {
      rows.rnorm[h] = pixels.rnorm[at.g + 8 * h];
      const float r = of_constant(rows.rnorm[h], problem.eps);
      rows.power[h] = power_of_two_near(r);
      rows.rnorm_power[h] = r * rows.power[h];
    }
  }

  // dO of a class, delta = <dO, G>, the sum of dO.
  FP_DEVICE void load_grads(int way) const {
    pixels.grads.load_product(enhanced_of(way), feat);
    sync_block();
    const int pixel = pixels.pixel;
    const bool inside = pixel < left;
    const T* const agg = agg_of(way).data;
    float sums[2] = {};
    pixels.for_channels([&](int d) {
      const float x = to_float(*pixels.grads.at(pixel, d));
      const float y = inside ? to_float(agg[d * p.agg.channel + pixel * p.agg.pixel]) : 0;
      sums[0] = multiply_add(x, y, sums[0]);
      sums[1] += x;
    });
    sum_parts<kRows>(reinterpret_cast<float*>(weights), sums);
    if (pixels.part == 0) {
      const int64_t to = (int64_t(image) * problem.ways + way) * problem.pixels + first_pixel;
      pixels.delta[pixel] = sums[0];
      pixels.sum_grad[pixel] = sums[1];
      pixels.lse[pixel] = inside ? p.statistics.lse[to + pixel] : 0;
      if (at.slice == 0 && inside) p.delta[to + pixel] = sums[0];
    }
    sync_block();
  }

  // S = F P^T and dA = dO P^T.
  FP_DEVICE void multiply(Products& s, Products& da, const uint8_t* keys) const {
    constexpr int kPartDim = kDim / Traits::kWarpsK;
    FP_NO_UNROLL
    for (int k = at.warp_k * kPartDim; k < (at.warp_k + 1) * kPartDim; k += 2 * Op::kDepth) {
      typename Op::B b;
      Op::template load<Traits::kRowBytes, false>(b, keys, at.column0, k);
      FP_UNROLL
      for (int step = 0; step < 2; ++step) {
        typename Op::A a;
        load_pixels(a, pixels.queries, 0, k + step * Op::kDepth);
        Op::multiply(s[step], a, b, step, precise);
        load_pixels(a, pixels.grads, 0, k + step * Op::kDepth);
        Op::multiply(da[step], a, b, step, precise);
      }
    }
    at.sum_products(s, da, partials, at.g);
  }

  // dS, and what it is multiplied with P by; `stats` are those of the tile, with `count` rows.
  FP_DEVICE void form_coefficients(const Products& s, const Products& da, Rows& rows,
                                   const float* stats, int count, float scale) const {
    if (at.warp_k != 0) return;
    FP_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = h * 8 + at.g;
      float pair[2];
      FP_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int column = at.column0 + 2 * at.i + j;
        const bool inside = column < count;
        const float mean_p = inside ? stats[column] : 0;
        const float rnorm_p = inside ? stats[problem.total + column] : 0;
        float product = s[0][2 * h + j], grad_weight = da[0][2 * h + j];
        if constexpr (Traits::kCentred)
          grad_weight += pixels.sum_grad[row] * mean_p;
        else
          product -= float(problem.dim) * pixels.mean[row] * mean_p;
        const float cos = product * (rows.rnorm[h] * rnorm_p);
        const float weight = inside ? exp2_fast(multiply_add(cos, scale, -pixels.lse[row])) : 0;
        const float grad_cos = weight * (grad_weight - pixels.delta[row]) * (scale * kLn2);
        rows.cos[h] = multiply_add(grad_cos, cos, rows.cos[h]);
        pair[j] = to_float(from_float<T>(grad_cos * (rows.rnorm_power[h] * rnorm_p)));
        if constexpr (!Traits::kCentred) rows.mean[h] = multiply_add(pair[j], mean_p, rows.mean[h]);
      }
      Op::store_pair(weights + at.pair_offset(row), pair[0], pair[1]);
    }
  }

  // The products' part of dF as floats where a tile of prototypes was; then piece by piece.
  FP_DEVICE void finish(const float (&acc)[1][kNTiles][4], const Rows& rows) const {
    FP_UNROLL
    for (int h = 0; h < 2; ++h) at.share_sums(exchange, h * 8 + at.g, rows.cos[h], rows.mean[h]);
    sync_block();
    const MapTile<float, kRows, kDim> result{prototypes, pixels.channel_rows};
    FP_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = h * 8 + at.g;
      const auto sums = at.shared_sums(exchange, row);
      FP_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        FP_UNROLL
        for (int j = 0; j < 2; ++j)
          *result.at(row, at.channel0 + n * 8 + 2 * at.i + j) =
              (acc[0][n][2 * h + j] - sums.second) / rows.power[h];
      }
      if (at.warp == 0 && at.i == 0)
        pixels.delta[row] = projection_factor(rows.rnorm[h], problem.eps) * sums.first;
    }
    sync_block();
    if (p.temperature_terms != nullptr && at.slice == 0 && thread_index() == 0) {
      float sum = 0;
      for (int row = 0; row < kRows && row < left; ++row)
        for (int other = 0; other < Traits::kWarpsN; ++other)
          sum += exchange[2 * (other * kRows + row)];
      p.temperature_terms[tile] = sum;
    }
    store(result);
  }

 private:
  // dF of a piece: the result, less its projection on F, and dY1 + dY2 G of all classes.
  FP_DEVICE void store(const MapTile<float, kRows, kDim>& result) const {
    const Matrix<T> to =
        pixels.matrix(static_cast<T*>(p.grad_feat.data) + image * p.grad_feat.image +
                          int64_t(first_pixel) * p.grad_feat.pixel,
                      p.grad_feat, left);
    const auto load = [](const Matrix<T>& from, int row, int column) {
      return Piece<T>::load(from, from.has_pieces(), row, column);
    };
    constexpr int kCount = Piece<T>::kCount;
    const bool channel_rows = pixels.channel_rows;
    const int columns = (channel_rows ? kRows : Traits::kSliceDim) / kCount;
    const int rows = channel_rows ? Traits::kSliceDim : kRows;
    FP_NO_UNROLL
    for (int index = thread_index(); index < rows * columns; index += kThreads) {
      const int row = index / columns + (channel_rows ? at.first_channel : 0);
      const int column = index % columns * kCount + (channel_rows ? 0 : at.first_channel);
      Piece<T> sum = load(feat, row, column);
      FP_UNROLL
      for (int k = 0; k < kCount; ++k) {
        const int pixel = channel_rows ? column + k : row;
        const int channel = channel_rows ? row : column + k;
        sum.x[k] =
            *result.at(pixel, channel) - (sum.x[k] - pixels.mean[pixel]) * pixels.delta[pixel];
      }
      FP_NO_UNROLL
      for (int way = 0; way < problem.ways; ++way) {
        const Piece<T> a = load(enhanced_of(way), row, column), b = load(agg_of(way), row, column);
        FP_UNROLL
        for (int k = 0; k < kCount; ++k) sum.x[k] = multiply_add(a.x[k], b.x[k], sum.x[k]);
        if (problem.concat) {
          const Piece<T> c = load(copy_of(way), row, column);
          FP_UNROLL
          for (int k = 0; k < kCount; ++k) sum.x[k] += c.x[k];
        }
      }
      sum.store(to, to.has_pieces(), row, column);
    }
  }
};

template <class Traits>
FP_KERNEL backward_query_kernel(FP_GRID_CONSTANT BackwardParams p, FP_GRID_CONSTANT int stages) {
  using Block = BackwardQueryBlock<Traits>;
  const Block block{p, stages};
  typename Block::Rows rows;
  block.load_queries(rows);
  float acc[1][Traits::kNTiles][4] = {};

  FP_NO_UNROLL
  for (int way = 0; way < p.problem.ways; ++way) {
    const Bag bag = load_bag(p.offsets, block.episode * p.problem.ways + way, p.problem.total);
    const float scale = exponent_scale(p.problem, bag.count);
    const typename Block::Stream stream = block.stream_of(bag);
    stream.load(0);
    block.load_grads(way);
    FP_NO_UNROLL
    for (int step = 0; step < stream.steps; ++step) {
      const int first = step * Traits::kN;
      const float* const stats = p.statistics.protos + bag.begin + first;
      const uint8_t* const keys = stream.wait(step, stats, 0);
      typename Block::Products s = {}, da = {};
      block.multiply(s, da, keys);
      block.form_coefficients(s, da, rows, stats, bag.count - first, scale);
      sync_block();
      multiply_prototypes<Traits>(acc, block.weights, keys, block.at.channel0, block.precise);
      stream.release(step);
    }
    if (!bag.valid) rows.cos[0] = rows.cos[1] = not_a_number();
    copy_async_wait<0>();
    sync_block();
  }
  block.finish(acc, rows);
}

}  // namespace fastproto::cuda::sm80
