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

#include "tiles.cuh"

namespace fastproto::cuda::sm80 {

template <class T_, int kDim_, int kRows_, int kSlices_>
struct BackwardProtosTraits {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr int kRows = kRows_;
  static constexpr int kSlices = kSlices_;
  static constexpr int kSize = int(sizeof(T));
  static constexpr bool kCentred = kSize == 4;
  static constexpr int kQ = backward_protos_pixels(kSize);  // pixels of a tile
  static constexpr int kWarpsN = kQ / 8;
  static constexpr int kWarpsM = kRows / 16;
  static constexpr int kWarpsK = kWarps / kWarpsN / kWarpsM;
  static constexpr int kSliceDim = kDim / kSlices;
  static constexpr int kNTiles = kSliceDim / kWarps / 8;

  static constexpr int kProtoBytes = kRows * kDim * kSize;
  static constexpr int kMapBytes = kQ * kDim * kSize;
  static constexpr int kWeightRowBytes = kQ * kSize;
  static constexpr int kWeightBytes = kRows * kWeightRowBytes;  // A^T; dS^T has as many
  static constexpr int kPartialBytes = (kWarpsK - 1) * 2 * kRows * kQ * 4;
  // Of every pixel: mean, rnorm, lse, delta, sum of dO; of every prototype: mean, rnorm,
  // projection.
  static constexpr int kFloats = kQ * 5 + kRows * 3;
  static constexpr int kThreads = sm80::kThreads;
  static constexpr int kSharedBytes = backward_protos_bytes(kSize, kDim, kRows);
  static constexpr int kMaxRegisters = 255;

  static_assert(kSharedBytes ==
                kProtoBytes + 2 * kMapBytes + 2 * kWeightBytes + kPartialBytes + kFloats * 4);
  static_assert(kNTiles >= 1 && kNTiles * 8 * kWarps * kSlices == kDim);
  static_assert(kWarpsN * kWarpsM * kWarpsK == kWarps);
  static_assert(kQ == 2 * Operands<T>::kDepth, "one B holds the pixels of a tile");
  static_assert(2 * kWeightBytes + kPartialBytes >= 8 * kRows * kWarpsN, "exchange");
  static_assert(2 * kMapBytes >= kRows * kDim * 4, "the result is staged where F and dO were");
  static_assert(kSharedBytes <= 163 * 1024 && kThreads * kMaxRegisters <= 65536);
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

template <class Traits>
FP_KERNEL backward_protos_kernel(FP_GRID_CONSTANT BackwardParams p) {
  using T = typename Traits::T;
  using Op = Operands<T>;
  constexpr int kRows = Traits::kRows, kQ = Traits::kQ, kDim = Traits::kDim;
  constexpr int kSize = Traits::kSize, kNTiles = Traits::kNTiles;
  constexpr int kDepth = Op::kDepth, kRowBytes = kDim * kSize;
  const Problem& problem = p.problem;
  const bool precise = problem.precision == Float32Precision::kTf32x3;

  // ---- Which prototypes this block owns.
  const int slice = block_index() % Traits::kSlices, tile = block_index() / Traits::kSlices;
  const int bags = problem.episodes * problem.ways;
  const int bag = find_bag<kRows>(p.offsets, tile, bags);
  const bool is_bag = bag < bags;
  const int begin = p.offsets[bag], end = is_bag ? p.offsets[bag + 1] : problem.total;
  // The tile's number less those before begin's: in this order it cannot overflow.
  const int first_row = begin % kRows + (tile - bag) * kRows;
  if (first_row >= end) return;  // more than the bag needs
  T* const to = static_cast<T*>(p.grad_protos) + int64_t(first_row) * problem.dim;
  const int first_channel = slice * Traits::kSliceDim;
  // Rows of no bag may hold anything, their gradient is zero; offsets that make no sense give NaN.
  if (!is_bag || begin < 0 || end > problem.total) {
    const T fill = from_float<T>(is_bag ? not_a_number() : 0);
    for (int index = thread_index(); index < kRows * Traits::kSliceDim; index += kThreads) {
      const int row = index / Traits::kSliceDim, d = first_channel + index % Traits::kSliceDim;
      const int at = first_row + row;
      if (at >= 0 && at < end && at < problem.total && d < problem.dim)
        to[int64_t(row) * problem.dim + d] = fill;
    }
    return;
  }
  const int left = end - first_row;
  const float scale = exponent_scale(problem, end - begin);
  const Matrix<T> proto_matrix{static_cast<const T*>(p.protos) + int64_t(first_row) * problem.dim,
                               problem.dim, 1, left, problem.dim};
  const int episode = bag / problem.ways, way = bag % problem.ways;

  // ---- Shared memory.
  uint8_t* const protos = shared_memory();
  const bool channel_rows = has_channel_rows(p.feat.channel, p.feat.pixel);
  const MapTile<T, kQ, kDim> queries{protos + Traits::kProtoBytes, channel_rows};
  const MapTile<T, kQ, kDim> grads{queries.data + Traits::kMapBytes, channel_rows};
  uint8_t* const weights = grads.data + Traits::kMapBytes;       // A^T
  uint8_t* const coefficients = weights + Traits::kWeightBytes;  // dS^T
  float* const partials = reinterpret_cast<float*>(coefficients + Traits::kWeightBytes);
  float* const mean_q = partials + Traits::kPartialBytes / 4;
  float* const rnorm_q = mean_q + kQ;
  float* const lse = rnorm_q + kQ;
  float* const delta = lse + kQ;
  float* const sum_grad = delta + kQ;
  float* const mean = sum_grad + kQ;
  float* const rnorm = mean + kRows;
  float* const projection = rnorm + kRows;
  float* const exchange = reinterpret_cast<float*>(weights);  // after all: [kWarpsN][kRows][2]

  const int lane = lane_index(), warp = warp_index();
  const int g = lane / 4, i = lane % 4;
  const int warp_n = warp % Traits::kWarpsN;
  const int warp_m = warp / Traits::kWarpsN % Traits::kWarpsM;
  const int warp_k = warp / Traits::kWarpsN / Traits::kWarpsM;
  const int row0 = warp_m * 16, column0 = warp_n * 8;
  const int thread_pixel = thread_index() % kQ, part = thread_index() / kQ;
  constexpr int kParts = kThreads / kQ;

  // ---- The prototypes.
  load_rows<T, kRows, kDim>(protos, proto_matrix);
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
    for (int row = warp; row < kRows; row += kWarps)
      for (int d = lane; d < problem.dim; d += 32)
        *reinterpret_cast<float*>(protos + swizzled<kRowBytes>(row, d * 4)) -= mean[row];
  // Scales dS r(P) into the range of float16; bounded, because A is scaled with it.
  const auto power_of = [&](int row) {
    const float power = power_of_two_near(of_constant(rnorm[row], problem.eps));
    return fminf(fmaxf(power, 1.0f), 1024.0f);
  };
  const float power[2] = {power_of(row0 + g), power_of(row0 + g + 8)};
  const float row_mean[2] = {mean[row0 + g], mean[row0 + g + 8]};
  const float row_rnorm[2] = {rnorm[row0 + g], rnorm[row0 + g + 8]};

  float acc[Traits::kWarpsM][kNTiles][4] = {};
  float sum_cos[2] = {}, sum_mean[2] = {};
  const int channel0 = first_channel + warp * kNTiles * 8;
  const int tiles = (problem.pixels + kQ - 1) / kQ;

  FP_NO_UNROLL
  for (int query = 0; query < problem.queries; ++query) {
    const int64_t image = int64_t(episode) * problem.queries + query;
    const T* const feat =
        static_cast<const T*>(p.feat.data) + episode * p.feat.episode + query * p.feat.query;
    const T* const grad = static_cast<const T*>(p.grad_out.data) + episode * p.grad_out.episode +
                          query * p.grad_out.query + way * p.grad_out.way +
                          (problem.concat ? problem.dim * p.grad_out.channel : 0);
    FP_NO_UNROLL
    for (int step = 0; step < tiles; ++step) {
      const int first_pixel = step * kQ, pixels = problem.pixels - first_pixel;
      sync_block();  // the products of the tile before are done
      const T* const tile_feat = feat + int64_t(first_pixel) * p.feat.pixel;
      queries.load(tile_feat, p.feat.channel, p.feat.pixel, problem.dim, pixels);
      copy_async_commit();
      if (thread_index() < kQ) {
        const bool inside = thread_pixel < pixels;
        const float* stats = p.statistics.query + image * 2 * problem.pixels + first_pixel;
        const int64_t at = (image * problem.ways + way) * problem.pixels + first_pixel;
        mean_q[thread_pixel] = inside ? stats[thread_pixel] : 0;
        rnorm_q[thread_pixel] = inside ? stats[problem.pixels + thread_pixel] : 0;
        lse[thread_pixel] = inside ? p.statistics.lse[at + thread_pixel] : 0;
        delta[thread_pixel] = inside ? p.delta[at + thread_pixel] : 0;
      }
      grads.load_product(
          grads.matrix(grad + int64_t(first_pixel) * p.grad_out.pixel, p.grad_out.channel,
                       p.grad_out.pixel, problem.dim, pixels),
          grads.matrix(tile_feat, p.feat.channel, p.feat.pixel, problem.dim, pixels));
      copy_async_wait<0>();
      sync_block();
      if constexpr (Traits::kCentred) {
        float sum = 0;
        for (int d = part; d < problem.dim; d += kParts) {
          *queries.at(thread_pixel, d) -= mean_q[thread_pixel];
          sum += to_float(*grads.at(thread_pixel, d));
        }
        float* const scratch = partials;
        static_assert(!Traits::kCentred || Traits::kPartialBytes >= 4 * kThreads);
        scratch[thread_index()] = sum;
        sync_block();
        if (part == 0) {
          for (int other = 1; other < kParts; ++other) sum += scratch[other * kQ + thread_pixel];
          sum_grad[thread_pixel] = sum;
        }
        sync_block();
      }

      // ---- S^T and dA^T.
      float s[2][4] = {}, da[2][4] = {};
      constexpr int kPartDim = kDim / Traits::kWarpsK;
      FP_NO_UNROLL
      for (int k = warp_k * kPartDim; k < (warp_k + 1) * kPartDim; k += 2 * kDepth) {
        typename Op::B b, c;
        load_b_of_channels(b, queries, column0, k);
        load_b_of_channels(c, grads, column0, k);
        FP_UNROLL
        for (int half_step = 0; half_step < 2; ++half_step) {
          typename Op::A a;
          Op::template load_a<kRowBytes, false>(a, protos, row0, k + half_step * kDepth);
          Op::multiply(s[half_step], a, b, half_step, precise);
          Op::multiply(da[half_step], a, c, half_step, precise);
        }
      }
      sum_products<Traits::kWarpsK, kRows, kQ>(s, da, partials, warp_k, row0 + g, column0 + 2 * i);

      // ---- A^T and dS^T.
      if (warp_k == 0) {
        FP_UNROLL
        for (int h = 0; h < 2; ++h) {
          const int row = row0 + h * 8 + g;
          float a_pair[2], c_pair[2];
          FP_UNROLL
          for (int j = 0; j < 2; ++j) {
            const int column = column0 + 2 * i + j;
            float product = s[0][2 * h + j], grad_weight = da[0][2 * h + j];
            if constexpr (Traits::kCentred)
              grad_weight += row_mean[h] * sum_grad[column];
            else
              product -= float(problem.dim) * row_mean[h] * mean_q[column];
            const float cos = product * (row_rnorm[h] * rnorm_q[column]);
            const float weight = exp2_fast(multiply_add(cos, scale, -lse[column]));
            const float grad_cos = weight * (grad_weight - delta[column]) * (scale * kLn2);
            sum_cos[h] = multiply_add(grad_cos, cos, sum_cos[h]);
            const float rnorm_power = of_constant(row_rnorm[h], problem.eps) * power[h];
            c_pair[j] = to_float(from_float<T>(grad_cos * (rnorm_power * rnorm_q[column])));
            if constexpr (!Traits::kCentred)
              sum_mean[h] = multiply_add(c_pair[j], mean_q[column], sum_mean[h]);
            a_pair[j] = weight * power[h];
          }
          const int at = swizzled<Traits::kWeightRowBytes>(row, (column0 + 2 * i) * kSize);
          Op::store_pair(weights + at, a_pair[0], a_pair[1]);
          Op::store_pair(coefficients + at, c_pair[0], c_pair[1]);
        }
      }
      sync_block();

      // ---- dP += A^T dO + dS^T F.
      FP_UNROLL
      for (int which = 0; which < 2; ++which) {
        typename Op::A a[Traits::kWarpsM][2];
        FP_UNROLL
        for (int m = 0; m < Traits::kWarpsM; ++m) {
          FP_UNROLL
          for (int half_step = 0; half_step < 2; ++half_step)
            Op::template load_a<Traits::kWeightRowBytes, false>(
                a[m][half_step], which == 0 ? weights : coefficients, m * 16, half_step * kDepth);
        }
        FP_UNROLL
        for (int n = 0; n < kNTiles; ++n) {
          typename Op::B b;
          load_b_of_pixels(b, which == 0 ? grads : queries, channel0 + n * 8, 0);
          FP_UNROLL
          for (int m = 0; m < Traits::kWarpsM; ++m) {
            FP_UNROLL
            for (int half_step = 0; half_step < 2; ++half_step)
              Op::multiply(acc[m][n], a[m][half_step], b, half_step, precise);
          }
        }
      }
    }
  }
  sync_block();

  // ---- Sums over the columns of warps.
  FP_UNROLL
  for (int h = 0; h < 2; ++h) {
    const float cos = sum_of_quad(sum_cos[h]), means = sum_of_quad(sum_mean[h]);
    if (i == 0 && warp_k == 0) {
      exchange[2 * (warp_n * kRows + row0 + h * 8 + g)] = cos;
      exchange[2 * (warp_n * kRows + row0 + h * 8 + g) + 1] = means;
    }
  }
  sync_block();

  // ---- The products' part of dP as floats where F and dO were; then piece by piece.
  const auto result = [&](int row, int d) {
    return reinterpret_cast<float*>(queries.data + swizzled<kDim * 4>(row, d * 4));
  };
  FP_UNROLL
  for (int m = 0; m < Traits::kWarpsM; ++m) {
    FP_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = m * 16 + h * 8 + g;
      float means = 0;
      for (int other = 0; other < Traits::kWarpsN; ++other)
        means += exchange[2 * (other * kRows + row) + 1];
      const float inverse = 1 / power_of(row);  // a power of two: exact
      FP_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        FP_UNROLL
        for (int j = 0; j < 2; ++j)
          *result(row, channel0 + n * 8 + 2 * i + j) = (acc[m][n][2 * h + j] - means) * inverse;
      }
    }
  }
  if (thread_index() < kRows) {
    float cos = 0;
    for (int other = 0; other < Traits::kWarpsN; ++other)
      cos += exchange[2 * (other * kRows + thread_index())];
    projection[thread_index()] = projection_factor(rnorm[thread_index()], problem.eps) * cos;
  }
  sync_block();
  const Matrix<T> target{to, problem.dim, 1, left, problem.dim};
  const bool pieces = proto_matrix.has_pieces(), target_pieces = target.has_pieces();
  constexpr int kCount = Piece<T>::kCount, kPieces = Traits::kSliceDim / kCount;
  FP_NO_UNROLL
  for (int index = thread_index(); index < kRows * kPieces; index += kThreads) {
    const int row = index / kPieces, column = first_channel + index % kPieces * kCount;
    Piece<T> sum = Piece<T>::load(proto_matrix, pieces, row, column);
    FP_UNROLL
    for (int k = 0; k < kCount; ++k)
      sum.x[k] = *result(row, column + k) - (sum.x[k] - mean[row]) * projection[row];
    sum.store(target, target_pieces, row, column);
  }
}

// Blocks for `total` rows in `bags` bags whose sizes the host does not know: see find_bag.
template <class Traits>
const char* launch_backward_protos_of(const BackwardParams& p, void* stream) {
  const Problem& problem = p.problem;
  const int tiles = problem.total / Traits::kRows + problem.episodes * problem.ways + 1;
  return launch<backward_protos_kernel<Traits>>(
      Grid{tiles * Traits::kSlices, kThreads, Traits::kSharedBytes, 1, stream}, p);
}

}  // namespace fastproto::cuda::sm80
