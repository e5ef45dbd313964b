// SPDX-License-Identifier: Apache-2.0
// The products of mma.sync on tiles in shared memory, and which part of them a thread has.
#pragma once

#include "tiles.cuh"

namespace fastproto::cuda::sm80 {

// Operands of mma.sync. An A is [16][kDepth]; a B is [2 * kDepth][8], two products deep. `load`
// takes them from a tile whose rows are A's rows (B's columns), k contiguous, or, Transposed, whose
// rows are k.
template <class T>
struct Operands {
  static constexpr int kDepth = 16;
  struct A {
    uint32_t x[4];
  };
  struct B {
    uint32_t x[4];
  };

  template <int kRowBytes, bool Transposed>
  static FP_DEVICE void load(A& a, const uint8_t* tile, int row, int k) {
    const int lane = lane_index();
    const int at =
        Transposed ? swizzled<kRowBytes>(k + lane / 16 * 8 + lane % 8, (row + lane / 8 % 2 * 8) * 2)
                   : swizzled<kRowBytes>(row + lane % 16, (k + lane / 16 * 8) * 2);
    load_matrix<Transposed>(a.x, tile + at);
  }
  template <int kRowBytes, bool Transposed>
  static FP_DEVICE void load(B& b, const uint8_t* tile, int column, int k) {
    const int lane = lane_index();
    const int at = Transposed ? swizzled<kRowBytes>(k + lane, column * 2)
                              : swizzled<kRowBytes>(column + lane % 8, (k + lane / 8 * 8) * 2);
    load_matrix<Transposed>(b.x, tile + at);
  }
  // c += a b[step]
  static FP_DEVICE void multiply(float (&c)[4], const A& a, const B& b, int step, bool) {
    mma_16816<T>(c, a.x, b.x[2 * step], b.x[2 * step + 1]);
  }
  static FP_DEVICE void store_pair(uint8_t* to, float x, float y) {
    *reinterpret_cast<uint32_t*>(to) = pack<T>(x, y);
  }
};

// float32: every number is a sum of two TF32 numbers; a product is three of theirs, or one.
template <>
struct Operands<float> {
  static constexpr int kDepth = 8;
  struct Split {
    float high[4], low[4];
    template <int kRowBytes, bool Transposed>
    FP_DEVICE void load(int j, const uint8_t* tile, int row, int k) {
      const float x = *reinterpret_cast<const float*>(
          tile + (Transposed ? swizzled<kRowBytes>(k, row * 4) : swizzled<kRowBytes>(row, k * 4)));
      high[j] = to_tf32(x);
      low[j] = to_tf32(x - high[j]);
    }
  };
  struct A : Split {};
  struct B : Split {};

  template <int kRowBytes, bool Transposed>
  static FP_DEVICE void load(A& a, const uint8_t* tile, int row, int k) {
    const int g = lane_index() / 4, i = lane_index() % 4;
    FP_UNROLL
    for (int j = 0; j < 4; ++j)
      a.template load<kRowBytes, Transposed>(j, tile, row + g + j % 2 * 8, k + i + j / 2 * 4);
  }
  template <int kRowBytes, bool Transposed>
  static FP_DEVICE void load(B& b, const uint8_t* tile, int column, int k) {
    const int g = lane_index() / 4, i = lane_index() % 4;
    FP_UNROLL
    for (int j = 0; j < 4; ++j)
      b.template load<kRowBytes, Transposed>(j, tile, column + g, k + i + j * 4);
  }
  static FP_DEVICE void multiply(float (&c)[4], const A& a, const B& b, int step, bool precise) {
    if (precise) {  // the small terms first
      mma_1688_tf32(c, a.low, b.high[2 * step], b.high[2 * step + 1]);
      mma_1688_tf32(c, a.high, b.low[2 * step], b.low[2 * step + 1]);
    }
    mma_1688_tf32(c, a.high, b.high[2 * step], b.high[2 * step + 1]);
  }
  static FP_DEVICE void store_pair(uint8_t* to, float x, float y) {
    reinterpret_cast<float*>(to)[0] = x;
    reinterpret_cast<float*>(to)[1] = y;
  }
};

// An A or a B of a map's tile in whichever layout, for a product over channels: its rows (columns)
// are pixels.
template <class Operand, class T, int kPixels, int kDim>
FP_DEVICE void load_pixels(Operand& to, const MapTile<T, kPixels, kDim>& tile, int pixel,
                           int channel) {
  using Tile = MapTile<T, kPixels, kDim>;
  if (tile.channel_rows)
    Operands<T>::template load<Tile::kChannelRowBytes, true>(to, tile.data, pixel, channel);
  else
    Operands<T>::template load<Tile::kPixelRowBytes, false>(to, tile.data, pixel, channel);
}
// The same for a product over pixels.
template <class Operand, class T, int kPixels, int kDim>
FP_DEVICE void load_channels(Operand& to, const MapTile<T, kPixels, kDim>& tile, int channel,
                             int pixel) {
  using Tile = MapTile<T, kPixels, kDim>;
  if (tile.channel_rows)
    Operands<T>::template load<Tile::kChannelRowBytes, false>(to, tile.data, channel, pixel);
  else
    Operands<T>::template load<Tile::kPixelRowBytes, true>(to, tile.data, channel, pixel);
}

// Calls each(m, h) for the rows of a thread's kTiles tiles of 16: 16 m + 8 h + g.
template <int kTiles, class Each>
FP_DEVICE void for_rows(const Each& each) {
  FP_UNROLL
  for (int m = 0; m < kTiles; ++m) {
    FP_UNROLL
    for (int h = 0; h < 2; ++h) each(m, h);
  }
}

// What all Traits have: numbers of a type, padded channels, the part of them that a block's result
// has (kSliceDim), of which a warp has kNTiles times 8.
template <class T_, int kDim_, int kSlices_>
struct TraitsOf {
  using T = T_;
  using Op = Operands<T>;
  static constexpr int kDim = kDim_;
  static constexpr int kSlices = kSlices_;
  static constexpr bool kCentred = sizeof(T) == 4;  // float32 tiles are centred in shared memory
  static constexpr int kSliceDim = kDim / kSlices;
  static constexpr int kNTiles = kSliceDim / kWarps / 8;
  static constexpr int kRowBytes = kDim * int(sizeof(T));
  static constexpr int kThreads = sm80::kThreads;
  static constexpr int kMaxRegisters = 255;
  static_assert(kNTiles >= 1 && kNTiles * 8 * kWarps * kSlices == kDim);
  static_assert(kThreads * kMaxRegisters <= 65536);
};

// Which part of its block's products a thread has. Of S (and dA) its warp has 8 columns from
// column0 on, kMTiles times 16 rows from row0 on, and part warp_k of the sum over channels; of the
// result all rows and the channels from channel0 on. Of 16 rows and 8 columns a thread has rows
// g + 8 h and columns 2 i + j: element 2 h + j of its four.
template <class Traits>
struct Place {
  int slice = block_index() % Traits::kSlices;
  int lane = lane_index(), warp = warp_index();
  int g = lane / 4, i = lane % 4;
  int warp_n = warp % Traits::kWarpsN;
  int warp_m = warp / Traits::kWarpsN % Traits::kWarpsM;
  int warp_k = warp / Traits::kWarpsN / Traits::kWarpsM;
  int row0 = warp_m * Traits::kMTiles * 16, column0 = warp_n * 8;
  int first_channel = slice * Traits::kSliceDim;
  int channel0 = first_channel + warp * Traits::kNTiles * 8;

  // Of a tile of weights, where this thread's two of a row lie.
  FP_DEVICE int pair_offset(int row) const {
    return swizzled<Traits::kWeightRowBytes>(row,
                                             (column0 + 2 * i) * int(sizeof(typename Traits::T)));
  }

  // The products S and dA of the backward: the halves of each, and the parts that warps other than
  // the first of a slice of channels have; the first one has the sums after. `partials` are
  // [kWarpsK - 1][2][kRows][columns] floats. A barrier where there are several.
  FP_DEVICE void sum_products(float (&s)[2][4], float (&da)[2][4], float* partials, int row) const {
    constexpr int kColumns = Traits::kWarpsN * 8, kPart = Traits::kRows * kColumns;
    FP_UNROLL
    for (int j = 0; j < 4; ++j) {
      s[0][j] += s[1][j];
      da[0][j] += da[1][j];
    }
    if constexpr (Traits::kWarpsK > 1) {
      const auto part = [&](int other, int j) {
        return partials + 2 * other * kPart + (row + j / 2 * 8) * kColumns + column0 + 2 * i +
               j % 2;
      };
      FP_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (warp_k == 0) continue;
        part(warp_k - 1, j)[0] = s[0][j];
        part(warp_k - 1, j)[kPart] = da[0][j];
      }
      sync_block();
      FP_UNROLL
      for (int j = 0; j < 4; ++j) {
        FP_UNROLL
        for (int other = 0; other < Traits::kWarpsK - 1; ++other) {
          s[0][j] += part(other, j)[0];
          da[0][j] += part(other, j)[kPart];
        }
      }
    }
  }

  // Two sums of a row, over the columns that the four lanes of a row have; in [kWarpsN][kRows][2].
  FP_DEVICE void share_sums(float* exchange, int row, float x, float y) const {
    const float first = sum_of_quad(x), second = sum_of_quad(y);
    if (i != 0 || warp_k != 0) return;
    exchange[2 * (warp_n * Traits::kRows + row)] = first;
    exchange[2 * (warp_n * Traits::kRows + row) + 1] = second;
  }
  // Both of a row over all columns, behind a barrier.
  struct Sums {
    float first = 0, second = 0;
  };
  static FP_DEVICE Sums shared_sums(const float* exchange, int row) {
    Sums sums;
    FP_UNROLL
    for (int other = 0; other < Traits::kWarpsN; ++other) {
      sums.first += exchange[2 * (other * Traits::kRows + row)];
      sums.second += exchange[2 * (other * Traits::kRows + row) + 1];
    }
    return sums;
  }
};

// acc += W B: W two products deep from column k of a tile of weights on; load(b, n) loads B's
// n-th 8 columns, this warp's.
template <class Traits, int kMTiles, class Load>
FP_DEVICE void multiply_weights(float (&acc)[kMTiles][Traits::kNTiles][4], const uint8_t* weights,
                                int k, bool precise, const Load& load) {
  using Op = typename Traits::Op;
  typename Op::A a[kMTiles][2];
  FP_UNROLL
  for (int m = 0; m < kMTiles; ++m) {
    FP_UNROLL
    for (int step = 0; step < 2; ++step)
      Op::template load<Traits::kWeightRowBytes, false>(a[m][step], weights, m * 16,
                                                        k + step * Op::kDepth);
  }
  FP_UNROLL
  for (int n = 0; n < Traits::kNTiles; ++n) {
    typename Op::B b;
    load(b, n);
    FP_UNROLL
    for (int m = 0; m < kMTiles; ++m) {
      FP_UNROLL
      for (int step = 0; step < 2; ++step) Op::multiply(acc[m][n], a[m][step], b, step, precise);
    }
  }
}
// The same of a whole tile of prototypes: acc += W P.
template <class Traits, int kMTiles>
FP_DEVICE void multiply_prototypes(float (&acc)[kMTiles][Traits::kNTiles][4],
                                   const uint8_t* weights, const uint8_t* keys, int channel0,
                                   bool precise) {
  using Op = typename Traits::Op;
  FP_NO_UNROLL
  for (int k = 0; k < Traits::kN; k += 2 * Op::kDepth)
    multiply_weights<Traits>(acc, weights, k, precise, [&](typename Op::B& b, int n) {
      Op::template load<Traits::kRowBytes, true>(b, keys, channel0 + n * 8, k);
    });
}

}  // namespace fastproto::cuda::sm80
