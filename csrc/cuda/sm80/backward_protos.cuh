// SPDX-License-Identifier: Apache-2.0
// The gradient of the prototypes by mma.sync. A block owns kRows prototypes of one bag and, of the
// channels of the result, all or (small problems) one of kSlices; it walks over the pixels of all
// queries of the bag's episode in tiles of kQ. Four products a tile: S^T = P F^T and dA^T = P dO^T,
// then dP += A^T dO and dP += dS^T F into one accumulator.
//
// Which bag a block serves is found on the device: bag b owns the tiles from offsets[b] / kRows + b
// on, a few more than it needs, so that the host need not know how large the bags are.
//
// Budget, D = 512: half types, 32 rows: P 32 + F 32 + dO 32 + A and dS 4 KiB, dP in 64 registers;
// 16 rows: P 16 and half the registers; float32, 16 rows: P 32 + F 32 + dO 32 + 8 KiB.
#pragma once

#include "backward_tiles.cuh"

namespace fastproto::cuda::sm80 {

template <class T, int kDim, int kRows_, int kSlices>
struct BackwardProtosTraits : TraitsOf<T, kDim, kSlices> {
  static constexpr int kRows = kRows_;
  static constexpr int kSize = int(sizeof(T));
  static constexpr int kQ = backward_protos_pixels(kSize);  // pixels of a tile
  static constexpr int kWarpsN = kQ / 8, kWarpsM = kRows / 16;
  static constexpr int kWarpsK = kWarps / kWarpsN / kWarpsM;
  static constexpr int kMTiles = 1;
  using Pixels = PixelTile<T, kQ, kDim>;

  static constexpr int kProtoBytes = kRows * kDim * kSize;
  static constexpr int kWeightRowBytes = kQ * kSize;
  static constexpr int kWeightBytes = kRows * kWeightRowBytes;  // A^T; dS^T has as many
  static constexpr int kPartialBytes = (kWarpsK - 1) * 2 * kRows * kQ * 4;
  static constexpr int kFloats = kRows * 3;  // of every prototype: mean, rnorm, projection
  static constexpr int kSharedBytes = backward_protos_bytes(kSize, kDim, kRows);

  static_assert(kSharedBytes == kProtoBytes + 2 * Pixels::kMapBytes + 2 * kWeightBytes +
                                    kPartialBytes + (Pixels::kFloats + kFloats) * 4);
  static_assert(kWarpsN * kWarpsM * kWarpsK == kWarps);
  static_assert(kQ == 2 * Operands<T>::kDepth, "one B holds the pixels of a tile");
  static_assert(2 * kWeightBytes + kPartialBytes >= 8 * kRows * kWarpsN, "exchange");
  static_assert(kSize == 2 || kPartialBytes >= 4 * kThreads, "scratch of the sum of dO");
  static_assert(2 * Pixels::kMapBytes >= kRows * kDim * 4, "the result lies where F and dO were");
  static_assert(kSharedBytes <= 163 * 1024);
};

// The bag that owns tile `tile` of the prototypes; `bags` for the rows of no bag. The same in every
// thread. No bag whose number is above the tile's, though its offset may make no sense.
template <int kRows>
FP_DEVICE int find_bag(const int32_t* offsets, int tile, int bags) {
  int bag = 0;
  for (int first = 1; first <= bags; first += 32) {
    const int other = first + lane_index();
    const bool owns = other <= bags && other <= tile && offsets[other] / kRows + other <= tile;
    const uint32_t found = ballot(owns);
    for (int bit = 0; bit < 32; ++bit) bag += found >> bit & 1;
  }
  return bag;
}

// What a block owns, and the phases of its work.
template <class Traits>
struct BackwardProtosBlock {
  using T = typename Traits::T;
  using Op = typename Traits::Op;
  static constexpr int kRows = Traits::kRows, kQ = Traits::kQ, kDim = Traits::kDim;
  static constexpr int kNTiles = Traits::kNTiles, kWarpsM = Traits::kWarpsM;
  using Products = float[2][4];
  using Result = float[kWarpsM][kNTiles][4];
  // Of a thread's two rows of S^T.
  struct Rows {
    float mean[2], rnorm[2], power[2];
    float sum_cos[2] = {}, sum_mean[2] = {};  // of dS c; of dS r(F) mean(F), as the accumulator
  };

  const BackwardParams& p;
  const Problem& problem = p.problem;
  const bool precise = problem.precision == Float32Precision::kTf32x3;
  const int bags = problem.episodes * problem.ways, tile = block_index() / Traits::kSlices;
  const int bag = find_bag<kRows>(p.offsets, tile, bags);
  const bool is_bag = bag < bags;
  const int begin = p.offsets[bag], end = is_bag ? p.offsets[bag + 1] : problem.total;
  // The tile's number less those before begin's: in this order it cannot overflow.
  const int first_row = begin % kRows + (tile - bag) * kRows, left = end - first_row;
  const int episode = bag / problem.ways, way = bag % problem.ways;

  uint8_t* const protos = shared_memory();
  uint8_t* const maps = protos + Traits::kProtoBytes;
  uint8_t* const weights = maps + 2 * Traits::Pixels::kMapBytes;  // A^T
  uint8_t* const coefficients = weights + Traits::kWeightBytes;   // dS^T
  float* const partials = reinterpret_cast<float*>(coefficients + Traits::kWeightBytes);
  const typename Traits::Pixels pixels{p, maps, partials + Traits::kPartialBytes / 4};
  float* const mean = pixels.mean + Traits::Pixels::kFloats;
  float* const rnorm = mean + kRows;
  float* const projection = rnorm + kRows;
  float* const exchange = reinterpret_cast<float*>(weights);  // after all: [kWarpsN][kRows][2]

  const Place<Traits> at{};

  // Scales dS r(P) into the range of float16; bounded, because A is scaled with it.
  FP_DEVICE float power_of(int row) const {
    const float power = power_of_two_near(of_constant(rnorm[row], problem.eps));
    return fminf(fmaxf(power, 1.0f), 1024.0f);
  }

  // Rows of no bag may hold anything, their gradient is zero; offsets that make no sense give NaN.
  FP_DEVICE bool is_valid() const { return is_bag && begin >= 0 && end <= problem.total; }
  FP_DEVICE void fill() const {
    const T value = from_float<T>(is_bag ? not_a_number() : 0);
    T* const to = const_cast<T*>(rows_of<T>(p.grad_protos, first_row, left, problem.dim).data);
    for (int index = thread_index(); index < kRows * Traits::kSliceDim; index += kThreads) {
      const int row = index / Traits::kSliceDim, d = at.first_channel + index % Traits::kSliceDim;
      const int number = first_row + row;
      if (number >= 0 && number < end && number < problem.total && d < problem.dim)
        to[int64_t(row) * problem.dim + d] = value;
    }
  }

  FP_DEVICE void load_prototypes(Rows& rows) const {
    load_rows<T, kRows, kDim>(protos, rows_of<T>(p.protos, first_row, left, problem.dim));
    copy_async_commit();
    if (thread_index() < kRows) {
      const bool inside = thread_index() < left;
      const float* from = p.statistics.protos + first_row + thread_index();
      mean[thread_index()] = inside ? from[0] : 0;
      rnorm[thread_index()] = inside ? from[problem.total] : 0;
    }
    copy_async_wait<0>();
    sync_block();
    if constexpr (Traits::kCentred)
      for (int row = at.warp; row < kRows; row += kWarps)
        subtract_mean<Traits::kRowBytes>(protos, row, mean[row], problem.dim);
    FP_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = at.row0 + at.g + 8 * h;
      rows.power[h] = power_of(row);
      rows.mean[h] = mean[row];
      rows.rnorm[h] = rnorm[row];
    }
  }

  // F, dO and the numbers of the pixels from `first` on.
  FP_DEVICE void load_pixel_tile(int query, int first) const {
    const int pixel = pixels.pixel, count = problem.pixels - first;
    const int64_t image = int64_t(episode) * problem.queries + query;
    const Matrix<T> feat = pixels.matrix(map_of<T>(p.feat, episode, query, first), p.feat, count);
    const T* const grad = map_of<T>(p.grad_out, episode, query, first) + way * p.grad_out.way +
                          (problem.concat ? problem.dim * p.grad_out.channel : 0);
    pixels.load(feat, p.statistics.query + image * 2 * problem.pixels + first, count);
    if (thread_index() < kQ) {
      const int64_t from = (image * problem.ways + way) * problem.pixels + first + pixel;
      pixels.lse[pixel] = pixel < count ? p.statistics.lse[from] : 0;
      pixels.delta[pixel] = pixel < count ? p.delta[from] : 0;
    }
    pixels.grads.load_product(pixels.matrix(grad, p.grad_out, count), feat);
    copy_async_wait<0>();
    sync_block();
    if constexpr (Traits::kCentred) {
      float sum[1] = {};
      pixels.for_channels([&](int d) {
        *pixels.queries.at(pixel, d) -= pixels.mean[pixel];
        sum[0] += to_float(*pixels.grads.at(pixel, d));
      });
      sum_parts<kQ>(partials, sum);
      if (pixels.part == 0) pixels.sum_grad[pixel] = sum[0];
      sync_block();
    }
  }

  // S^T = P F^T and dA^T = P dO^T.
  FP_DEVICE void multiply(Products& s, Products& da) const {
    constexpr int kPartDim = kDim / Traits::kWarpsK;
    FP_NO_UNROLL
    for (int k = at.warp_k * kPartDim; k < (at.warp_k + 1) * kPartDim; k += 2 * Op::kDepth) {
      typename Op::B b, c;
      load_pixels(b, pixels.queries, at.column0, k);
      load_pixels(c, pixels.grads, at.column0, k);
      FP_UNROLL
      for (int step = 0; step < 2; ++step) {
        typename Op::A a;
        Op::template load<Traits::kRowBytes, false>(a, protos, at.row0, k + step * Op::kDepth);
        Op::multiply(s[step], a, b, step, precise);
        Op::multiply(da[step], a, c, step, precise);
      }
    }
    at.sum_products(s, da, partials, at.row0 + at.g);
  }

  // A^T and dS^T.
  FP_DEVICE void form_weights(const Products& s, const Products& da, Rows& rows,
                              float scale) const {
    if (at.warp_k != 0) return;
    FP_UNROLL
    for (int h = 0; h < 2; ++h) {
      float a_pair[2], c_pair[2];
      FP_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int column = at.column0 + 2 * at.i + j;
        float product = s[0][2 * h + j], grad_weight = da[0][2 * h + j];
        if constexpr (Traits::kCentred)
          grad_weight += rows.mean[h] * pixels.sum_grad[column];
        else
          product -= float(problem.dim) * rows.mean[h] * pixels.mean[column];
        const float cos = product * (rows.rnorm[h] * pixels.rnorm[column]);
        const float weight = exp2_fast(multiply_add(cos, scale, -pixels.lse[column]));
        const float grad_cos = weight * (grad_weight - pixels.delta[column]) * (scale * kLn2);
        rows.sum_cos[h] = multiply_add(grad_cos, cos, rows.sum_cos[h]);
        const float rnorm_power = of_constant(rows.rnorm[h], problem.eps) * rows.power[h];
        c_pair[j] = to_float(from_float<T>(grad_cos * (rnorm_power * pixels.rnorm[column])));
        if constexpr (!Traits::kCentred)
          rows.sum_mean[h] = multiply_add(c_pair[j], pixels.mean[column], rows.sum_mean[h]);
        a_pair[j] = weight * rows.power[h];
      }
      const int to = at.pair_offset(at.row0 + h * 8 + at.g);
      Op::store_pair(weights + to, a_pair[0], a_pair[1]);
      Op::store_pair(coefficients + to, c_pair[0], c_pair[1]);
    }
  }

  // dP += A^T dO + dS^T F.
  FP_DEVICE void accumulate(Result& acc) const {
    FP_UNROLL
    for (int which = 0; which < 2; ++which)
      multiply_weights<Traits>(
          acc, which == 0 ? weights : coefficients, 0, precise, [&](typename Op::B& b, int n) {
            load_channels(b, which == 0 ? pixels.grads : pixels.queries, at.channel0 + n * 8, 0);
          });
  }

  // The products' part of dP as floats where F and dO were; then piece by piece.
  FP_DEVICE void finish(const Result& acc, const Rows& rows) const {
    FP_UNROLL
    for (int h = 0; h < 2; ++h)
      at.share_sums(exchange, at.row0 + h * 8 + at.g, rows.sum_cos[h], rows.sum_mean[h]);
    sync_block();
    const auto result = [&](int row, int d) {
      return reinterpret_cast<float*>(maps + swizzled<kDim * 4>(row, d * 4));
    };
    for_rows<kWarpsM>([&](int m, int h) {
      const int row = m * 16 + h * 8 + at.g;
      const float means = at.shared_sums(exchange, row).second;
      const float inverse = 1 / power_of(row);  // a power of two: exact
      FP_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        FP_UNROLL
        for (int j = 0; j < 2; ++j)
          *result(row, at.channel0 + n * 8 + 2 * at.i + j) =
              (acc[m][n][2 * h + j] - means) * inverse;
      }
    });
    if (thread_index() < kRows)
      projection[thread_index()] = projection_factor(rnorm[thread_index()], problem.eps) *
                                   at.shared_sums(exchange, thread_index()).first;
    sync_block();
    const Matrix<T> from = rows_of<T>(p.protos, first_row, left, problem.dim),
                    to = rows_of<T>(p.grad_protos, first_row, left, problem.dim);
    const bool from_pieces = from.has_pieces(), to_pieces = to.has_pieces();
    constexpr int kCount = Piece<T>::kCount, kPieces = Traits::kSliceDim / kCount;
    FP_NO_UNROLL
    for (int index = thread_index(); index < kRows * kPieces; index += kThreads) {
      const int row = index / kPieces, column = at.first_channel + index % kPieces * kCount;
      Piece<T> sum = Piece<T>::load(from, from_pieces, row, column);
      FP_UNROLL
      for (int k = 0; k < kCount; ++k)
        sum.x[k] = *result(row, column + k) - (sum.x[k] - mean[row]) * projection[row];
      sum.store(to, to_pieces, row, column);
    }
  }
};

template <class Traits>
FP_KERNEL backward_protos_kernel(FP_GRID_CONSTANT BackwardParams p) {
  using Block = BackwardProtosBlock<Traits>;
  const Block block{p};
  if (block.first_row >= block.end) return;  // more than the bag needs
  if (!block.is_valid()) {
    block.fill();
    return;
  }
  const float scale = exponent_scale(p.problem, block.end - block.begin);
  typename Block::Rows rows;
  block.load_prototypes(rows);
  typename Block::Result acc = {};

  FP_NO_UNROLL
  for (int query = 0; query < p.problem.queries; ++query) {
    FP_NO_UNROLL
    for (int first = 0; first < p.problem.pixels; first += Traits::kQ) {
      sync_block();  // the products of the tile before are done
      block.load_pixel_tile(query, first);
      typename Block::Products s = {}, da = {};
      block.multiply(s, da);
      block.form_weights(s, da, rows, scale);
      sync_block();
      block.accumulate(acc);
    }
  }
  sync_block();
  block.finish(acc, rows);
}

}  // namespace fastproto::cuda::sm80
