// SPDX-License-Identifier: Apache-2.0
// Forward of proto_attention in bfloat16 on the CPU's bfloat16 units. Symbols as in docs/math.md.
//
//     S^T[N, W] = P[N, D] . F[D, W]     on the numbers as they are: products are exact in float32
//     c = (S - D P_mean F_mean) rp rq   in float32
//     O^T[D, W] += P^T . w              w rounded to bfloat16, and so summed: weights sum to 1
//
// The algebraic centring loses mean^2/std^2 in accuracy, so this takes only what loses little: a
// vector whose mean dwarfs its spread, is constant, or holds NaN or Inf, t so small that weights
// underflow, D that is no multiple of 32, bags of one: these go to the float32 kernel.
#pragma once

#include "gemm_bf16.h"
#include "proto_attention_fwd.h"

namespace fastproto::cpu {
namespace {

struct alignas(64) StripBf16 {
  float scaled_mean[kMostPixels];  // F_mean rq
  uint16_t* pairs;                 // [D/2][width][2] F
  bool ordinary;                   // fit for the algebraic centring
};

struct FwdScratchBf16 : Scratch {
  Tiling tiling;
  Strip<float> strips[kMostStrips];  // without centred panels
  StripBf16 inputs[kMostStrips];
  uint16_t* rows;        // [kBlockProtos][D] P, zeros below
  uint16_t* transposed;  // [D][kBlockProtos] P^T
  float* scores;         // [kBlockProtos][width]
  uint16_t* weights;     // [kBlockProtos/2][width][2]

  FwdScratchBf16(void* memory, int64_t dim, Tiling t) : Scratch(memory), tiling(t) {
    for (int64_t i = 0; i < t.strips; ++i) {
      inputs[i].pairs = take<uint16_t>(dim * t.width);
      strips[i].out = take<float>(dim * t.width);
    }
    rows = take<uint16_t>(kBlockProtos * dim);
    transposed = take<uint16_t>(dim * kBlockProtos);
    scores = take<float>(kBlockProtos * t.width);
    weights = take<uint16_t>(kBlockProtos * t.width);
  }
};

using BitVec = VecTypes<float>::Bits;
using HalfVec = VecTypes<float>::HalfBits;

FASTPROTO_INLINE BitVec load_bits(const uint16_t* p) {
  HalfVec half;
  __builtin_memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, BitVec);
}
FASTPROTO_INLINE Vec<float> as_floats(BitVec bits) {
  Vec<float> v;
  __builtin_memcpy(&v, &bits, sizeof(v));
  return v;
}

// The sums of one vector (or of one per lane) that the algebraic centring needs, relative to its
// first number.
struct Moments {
  float mean;
  float rnorm;
  bool ordinary;

  Moments(float first, float sum, float squares, float dim, float eps) {
    mean = first + sum / dim;
    const float centred = squares - sum / dim * sum;
    rnorm = 1.0f / __builtin_sqrtf(centred);
    // False for NaN. 1024: the cosine keeps 24 - 10 bits, more than bfloat16 has.
    ordinary = centred > 4 * eps * eps && centred < 1e30f && squares < 64 * centred &&
               dim * mean * mean < 1024 * centred;
  }
};

// Rounded up to the 16 rows of a tile.
inline int64_t whole_tiles(int64_t rows) { return (rows + 15) / 16 * 16; }

// Rounded up to the 32 of a product's depth.
inline int64_t product_depth(int64_t rows) { return (rows + 31) / 32 * 32; }

// One vector of pixels of row(0) ... row(rows - 1), bfloat16 bits, as pairs of rows of `width`
// pixels; zeros to the whole depth of a product.
template <class Row>
FASTPROTO_INLINE void store_row_pairs(int64_t rows, int64_t width, uint16_t* pairs, Row&& row) {
  for (int64_t r = 0; r < product_depth(rows); r += 2) {
    BitVec pair = {};
    if (r < rows) pair = row(r);
    if (r + 1 < rows) pair |= row(r + 1) << 16;
    __builtin_memcpy(pairs + r * width, &pair, 64);
  }
}

// Interleaves the channels of a strip in pairs and takes its statistics.
inline void load_pairs(TileView<const BFloat16> src, int64_t dim, int64_t width, float eps,
                       Strip<float>& strip, StripBf16& input) {
  constexpr int L = kLanes<float>;
  float first[kMostPixels], sum[kMostPixels] = {}, squares[kMostPixels] = {};
  const bool columns = src.pixels_contiguous();
  const auto* data = reinterpret_cast<const uint16_t*>(src.data);
  for (int64_t d0 = 0; d0 < dim; d0 += 2 * L) {
    for (int64_t x = 0; x < width; x += L) {
      const int64_t count = src.count - x;
      BitVec pairs[L];  // [channel pair][pixel]
      if (columns && count >= L) {
        prefetch_block<false>(src, dim, d0 + 2 * L, x);
        prefetch_block<false>(src, dim, d0 + 3 * L, x);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          const uint16_t* at = data + (d0 + 2 * i) * src.stride_channel + x;
          pairs[i] = load_bits(at) | (load_bits(at + src.stride_channel) << 16);
        }
      } else if (columns) {
        for (int i = 0; i < L; ++i) {
          const uint16_t* at = data + (d0 + 2 * i) * src.stride_channel + x;
          pairs[i] = BitVec{};
          for (int64_t j = 0; j < count; ++j)
            pairs[i][j] = at[j] | uint32_t(at[src.stride_channel + j]) << 16;
        }
      } else {
        for (int i = 0; i < L; ++i) {
          pairs[i] = BitVec{};
          if (i < count) __builtin_memcpy(&pairs[i], data + (x + i) * src.stride_pixel + d0, 64);
        }
        transpose(pairs);
      }
      if (d0 == 0) store(first + x, as_floats(pairs[0] << 16));
      const Vec<float> origin = load(first + x);
      Vec<float> part = {}, part_squares = {};
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        __builtin_memcpy(input.pairs + ((d0 / 2 + i) * width + x) * 2, &pairs[i], 64);
        const Vec<float> low = as_floats(pairs[i] << 16) - origin;
        const Vec<float> high = as_floats(pairs[i] & 0xffff0000u) - origin;
        part += low + high;
        part_squares += low * low;
        part_squares += high * high;
      }
      store(sum + x, load(sum + x) + part);
      store(squares + x, load(squares + x) + part_squares);
    }
  }
  input.ordinary = true;
  for (int64_t x = 0; x < width; ++x) {
    const Moments m(first[x], sum[x], squares[x], float(dim), eps);
    const bool inside = x < src.count;
    if (inside && !m.ordinary) input.ordinary = false;
    strip.stats.mean[x] = inside ? m.mean : 0;
    strip.stats.rnorm[x] = inside ? m.rnorm : 0;
    input.scaled_mean[x] = inside ? m.mean * m.rnorm : 0;
  }
}

// [rows][D] -> [D][kBlockProtos], two rows at a time; rows past `rows` up to a multiple of 32 are
// zeros.
inline void transpose_protos(RowsBf16 protos, int64_t rows, int64_t dim, uint16_t* transposed) {
  constexpr int L = kLanes<float>;
  for (int64_t n0 = 0; n0 < rows; n0 += 2 * L)
    for (int64_t d = 0; d < dim; d += L) {
      BitVec pairs[L];  // [row pair][channel]
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        const int64_t n = n0 + 2 * i;
        const uint16_t* at = protos.data + n * protos.stride + d;
        pairs[i] = n < rows ? load_bits(at) : BitVec{};
        if (n + 1 < rows) pairs[i] |= load_bits(at + protos.stride) << 16;
      }
      transpose(pairs);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
        __builtin_memcpy(transposed + (d + i) * kBlockProtos + n0, &pairs[i], 64);
    }
}

// Statistics of a block of prototypes; false when one is not fit.
inline bool proto_moments(const BFloat16* protos, int64_t rows, int64_t dim, float eps,
                          ProtoStats<float>* stats) {
  constexpr int L = kLanes<float>;
  for (int64_t n = 0; n < rows; ++n) {
    const BFloat16* row = protos + n * dim;
    const float first = to_acc(row[0]);
    Vec<float> sums[2] = {}, squares[2] = {};
    for (int64_t d = 0; d < dim; d += 2 * L)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const Vec<float> x = load_as(row + d + i * L) - first;
        sums[i] += x;
        squares[i] += x * x;
      }
    const Moments m(first, sum_lanes<float>(sums[0] + sums[1]),
                    sum_lanes<float>(squares[0] + squares[1]), float(dim), eps);
    if (!m.ordinary) return false;
    stats->mean[n] = m.mean;
    stats->rnorm[n] = m.rnorm;
    stats->free[n] = 1;
  }
  return true;
}

// The rows of a block as whole tiles: nothing behind the bag may be read, so where `rows` is no
// multiple of 16 they are copied, with zeros below.
inline RowsBf16 load_block_rows(const BFloat16* protos, int64_t rows, int64_t dim, uint16_t* copy) {
  if (rows % 16 == 0) return {reinterpret_cast<const uint16_t*>(protos), dim};
  copy_bytes(protos, copy, rows * dim * 2);
  std::memset(copy + rows * dim, 0, size_t((whole_tiles(rows) - rows) * dim * 2));
  return {copy, dim};
}

// The bag's O^T and sums in every strip; false when a prototype is not fit.
inline bool attend_bf16(const ForwardParams& p, int64_t begin, int64_t end, float origin,
                        FwdScratchBf16& s) {
  constexpr int L = kLanes<float>;
  const int64_t dim = p.problem.dim, width = s.tiling.width;
  const float inv_t = float(1.0 / p.problem.temperature);
  clear_sums<float>(inv_t, s.tiling, s.strips);
  for (int64_t n = begin; n < end; n += kBlockProtos) {
    const int64_t rows = end - n < kBlockProtos ? end - n : kBlockProtos;
    const auto* protos = static_cast<const BFloat16*>(p.protos) + n * dim;
    ProtoStats<float> stats;
    if (!proto_moments(protos, rows, dim, float(p.problem.eps), &stats)) return false;
    const RowsBf16 block = load_block_rows(protos, rows, dim, s.rows);
    transpose_protos(block, rows, dim, s.transposed);
    for (int64_t i = 0; i < s.tiling.strips && s.strips[i].count > 0; ++i) {
      Strip<float>& strip = s.strips[i];
      gemm_bf16(whole_tiles(rows), width, dim, block, {s.inputs[i].pairs, width}, s.scores, width,
                false);
      for (int64_t x = 0; x < width; x += L) {
        const Vec<float> rnorm = load(strip.stats.rnorm + x);
        const Vec<float> scaled_mean = load(s.inputs[i].scaled_mean + x);
        const Vec<float> bound = load(strip.bound + x);
        Vec<float> sum = load(strip.sum + x), mean_sum = load(strip.mean_sum + x);
        const auto weight = [&](int64_t r) __attribute__((always_inline)) {
          const float by = stats.rnorm[r] * inv_t, minus = float(dim) * stats.mean[r] * by;
          const Vec<float> exponent =
              load(s.scores + r * width + x) * (by * rnorm) - (minus * scaled_mean + bound);
          const BitVec bits = bfloat16_bits(exp_nonpositive(exponent));
          const Vec<float> w = as_floats(bits << 16);
          sum += w;
          mean_sum += w * (stats.mean[r] - origin);
          return bits;
        };
        store_row_pairs(rows, width, s.weights + 2 * x, weight);
        store(strip.sum + x, sum);
        store(strip.mean_sum + x, mean_sum);
      }
      gemm_bf16(dim, width, product_depth(rows), {s.transposed, kBlockProtos}, {s.weights, width},
                strip.out, width, n > begin);
    }
  }
  return true;
}

// Tasks as in `forward`.
void forward_bf16(const ForwardParams& p, Tiling tiling, TaskQueue& queue, void* memory) {
  const int64_t dim = p.problem.dim, width = tiling.width;
  if (dim % 32 != 0 || p.problem.temperature < kSmallestStaticT<float>)
    return forward<BFloat16>(p, tiling, queue, memory);
  [[maybe_unused]] MatrixUnit unit;
  FwdScratchBf16 s(memory, dim, tiling);
  int64_t loaded = -1, first, stop;
  while (queue.take(&first, &stop))
    for (int64_t number = first; number < stop; ++number) {
      const ForwardTask task(p, tiling, number);
      bool fit = task.size() > 1;
      if (fit && task.pixel_tile != loaded) {
        const FwdScratchBf16 again(memory, dim, tiling);  // AddressSanitizer's pieces of it
        task.place(p, tiling, s.strips);
        for (int64_t i = 0; i < tiling.strips && s.strips[i].count > 0; ++i)
          load_pairs(task.feat<BFloat16>(p, s.strips[i]), dim, width, float(p.problem.eps),
                     s.strips[i], s.inputs[i]);
        loaded = task.pixel_tile;
      }
      for (int64_t i = 0; fit && i < tiling.strips && s.strips[i].count > 0; ++i)
        fit = s.inputs[i].ordinary;
      const float origin = fit ? row_mean(task.first_proto<BFloat16>(p), dim) : 0;
      if (fit && attend_bf16(p, task.begin, task.end, origin, s)) {
        for (int64_t i = 0; i < tiling.strips && s.strips[i].count > 0; ++i)
          finish_strip<BFloat16>(p, task, origin, width, false, s.strips[i]);
      } else {
        FwdScratch<float> wide(memory, dim, tiling);  // the same memory
        loaded = -1;
        forward_task<BFloat16>(p, task, wide, &loaded);
        loaded = -1;  // of ours, nothing is left
      }
    }
}

}  // namespace
}  // namespace fastproto::cpu
