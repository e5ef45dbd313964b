// SPDX-License-Identifier: Apache-2.0
// Tiles in shared memory and the products of mma.sync, for every kernel of this folder.
//
// A tile holds rows of 16-byte pieces; the pieces of neighbouring rows are permuted (swizzled), so
// that eight rows of one column lie in different banks. A tile of a feature map has pixels or
// channels as rows, whichever global memory has: it is never transposed, the matrix loads are.
#pragma once

#include "../common/math.cuh"
#include "configs.h"

namespace fastproto::cuda::sm80 {

constexpr int kWarps = kThreads / 32;

// Byte offset of byte `byte` of row `row`; pieces of 8 consecutive rows in one column differ in
// their bank (rows below 128 bytes share a line of banks, and are permuted by the line).
template <int kRowBytes>
FP_HOST_DEVICE int swizzled(int row, int byte) {
  static_assert(kRowBytes >= 16 && (kRowBytes & (kRowBytes - 1)) == 0);
  constexpr int kPieces = kRowBytes / 16;
  constexpr int kRowsOfLine = kPieces < 8 ? 8 / kPieces : 1;
  constexpr int kMask = kPieces < 8 ? kPieces - 1 : 7;
  // The part that is not permuted apart, so that compilers make it an instruction's immediate.
  const int piece = (byte / 16 & 7) ^ ((row / kRowsOfLine) & kMask);
  return row * kRowBytes + byte / 128 * 128 + piece * 16 + byte % 16;
}

// A matrix in global memory.
template <class T>
struct Matrix {
  static constexpr int kPerPiece = 16 / int(sizeof(T));
  const T* data;
  int64_t row_stride;
  int64_t column_stride;
  int rows;  // zeros outside
  int columns;
  // Whether rows are made of whole aligned pieces of 16 bytes.
  FP_DEVICE bool has_pieces() const {
    return column_stride == 1 &&
           (uint64_t(data) | uint64_t(row_stride * int64_t(sizeof(T)))) % 16 == 0;
  }
  // What is inside is asked of row and column and their ends alone, in all of csrc/cuda: of a count
  // that is clamped first, as min(max(x, 0), 8) == 8, ptxas 13.0 makes a branch on the predicate of
  // VIMNMX.RELU for sm_90, which is taken for x = 0 (python_tests/op/cuda/test_resources.py).
  FP_DEVICE bool contains(int row, int column) const { return row < rows && column < columns; }
  FP_DEVICE bool contains_piece(int row, int column) const {
    return row < rows && column + kPerPiece <= columns;
  }
};

// Starts loading [kRows][kColumns]; ends at the next copy_async_wait and barrier.
template <class T, int kRows, int kColumns>
FP_DEVICE void load_rows(uint8_t* tile, const Matrix<T>& from) {
  constexpr int kPerPiece = Matrix<T>::kPerPiece, kPieces = kColumns / kPerPiece;
  const bool pieces = from.has_pieces();
  FP_NO_UNROLL
  for (int i = thread_index(); i < kRows * kPieces; i += kThreads) {
    const int row = i / kPieces, column = i % kPieces * kPerPiece;
    uint8_t* to = tile + swizzled<kColumns* int(sizeof(T))>(row, column * int(sizeof(T)));
    const T* source = from.data + row * from.row_stride + column * from.column_stride;
    if (pieces) {
      const bool inside = from.contains(row, column);
      const int bytes = (from.columns - column) * int(sizeof(T));
      copy_async_16(to, inside ? source : from.data,
                    from.contains_piece(row, column) ? 16
                    : inside                         ? bytes
                                                     : 0);
    } else {
      FP_UNROLL
      for (int k = 0; k < kPerPiece; ++k)
        reinterpret_cast<T*>(to)[k] =
            from.contains(row, column + k) ? source[k * from.column_stride] : T{};
    }
  }
}

// The reverse, for rows [first_row, + rows) and columns [first_column, + columns) of a tile; both
// ranges of columns are multiples of pieces. `to` is the matrix that the whole tile stands for.
template <class T, int kColumns>
FP_DEVICE void store_rows(const Matrix<T>& to, const uint8_t* tile, int first_row, int rows,
                          int first_column, int columns) {
  constexpr int kPerPiece = Matrix<T>::kPerPiece;
  const int pieces = columns / kPerPiece;
  const bool whole = to.has_pieces();
  FP_NO_UNROLL
  for (int i = thread_index(); i < rows * pieces; i += kThreads) {
    const int row = first_row + i / pieces, column = first_column + i % pieces * kPerPiece;
    const uint8_t* from = tile + swizzled<kColumns* int(sizeof(T))>(row, column * int(sizeof(T)));
    T* target = const_cast<T*>(to.data) + row * to.row_stride + column * to.column_stride;
    if (whole && to.contains_piece(row, column)) {
      *reinterpret_cast<Vector16*>(target) = *reinterpret_cast<const Vector16*>(from);
    } else {
      FP_UNROLL
      for (int k = 0; k < kPerPiece; ++k)
        if (to.contains(row, column + k))
          target[k * to.column_stride] = reinterpret_cast<const T*>(from)[k];
    }
  }
}

// 16 bytes' worth of numbers of a row, as floats; zeros outside the matrix.
template <class T>
struct Piece {
  static constexpr int kCount = Matrix<T>::kPerPiece;
  float x[kCount];

  static FP_DEVICE Piece load(const Matrix<T>& m, bool pieces, int row, int column) {
    const T* from = m.data + row * m.row_stride + column * m.column_stride;
    Piece piece;
    if (pieces && m.contains_piece(row, column)) {
      const Vector16 v = load_global_16(from);
      FP_UNROLL
      for (int k = 0; k < 4; ++k) {
        if constexpr (sizeof(T) == 2)
          unpack<T>(v.x[k], &piece.x[2 * k], &piece.x[2 * k + 1]);
        else
          piece.x[k] = bits_to_float(v.x[k]);
      }
    } else {
      FP_UNROLL
      for (int k = 0; k < kCount; ++k)
        piece.x[k] = m.contains(row, column + k) ? to_float(from[k * m.column_stride]) : 0;
    }
    return piece;
  }
  FP_DEVICE Vector16 rounded() const {
    Vector16 v;
    FP_UNROLL
    for (int k = 0; k < 4; ++k) {
      if constexpr (sizeof(T) == 2)
        v.x[k] = pack<T>(x[2 * k], x[2 * k + 1]);
      else
        v.x[k] = float_to_bits(x[k]);
    }
    return v;
  }
  FP_DEVICE void store(const Matrix<T>& m, bool pieces, int row, int column) const {
    T* to = const_cast<T*>(m.data) + row * m.row_stride + column * m.column_stride;
    if (pieces && m.contains_piece(row, column)) {
      *reinterpret_cast<Vector16*>(to) = rounded();
    } else {
      FP_UNROLL
      for (int k = 0; k < kCount; ++k)
        if (m.contains(row, column + k)) to[k * m.column_stride] = from_float<T>(x[k]);
    }
  }
};

// A tile of products a * b, rounded: dO = dY2 * F. Seen after the next barrier.
template <class T, int kRows, int kColumns>
FP_DEVICE void load_product_rows(uint8_t* tile, const Matrix<T>& a, const Matrix<T>& b) {
  constexpr int kPieces = kColumns / Piece<T>::kCount;
  const bool a_pieces = a.has_pieces(), b_pieces = b.has_pieces();
  FP_NO_UNROLL
  for (int i = thread_index(); i < kRows * kPieces; i += kThreads) {
    const int row = i / kPieces, column = i % kPieces * Piece<T>::kCount;
    Piece<T> product = Piece<T>::load(a, a_pieces, row, column);
    const Piece<T> factor = Piece<T>::load(b, b_pieces, row, column);
    FP_UNROLL
    for (int k = 0; k < Piece<T>::kCount; ++k) product.x[k] *= factor.x[k];
    *reinterpret_cast<Vector16*>(tile + swizzled<kColumns* int(sizeof(T))>(
                                            row, column * int(sizeof(T)))) = product.rounded();
  }
}

// A tile of a feature map, kPixels x kDim.
template <class T, int kPixels, int kDim>
struct MapTile {
  static constexpr int kBytes = kPixels * kDim * int(sizeof(T));
  static constexpr int kChannelRowBytes = kPixels * int(sizeof(T));  // rows are channels
  static constexpr int kPixelRowBytes = kDim * int(sizeof(T));       // rows are pixels
  uint8_t* data;
  bool channel_rows;

  FP_DEVICE T* at(int pixel, int channel) const {
    const int size = int(sizeof(T));
    return reinterpret_cast<T*>(data + (channel_rows
                                            ? swizzled<kChannelRowBytes>(channel, pixel * size)
                                            : swizzled<kPixelRowBytes>(pixel, channel * size)));
  }
  // `map` points at channel 0 of the tile's first pixel; `pixels` are left there.
  FP_DEVICE Matrix<T> matrix(const T* map, int64_t channel, int64_t pixel, int channels,
                             int pixels) const {
    return channel_rows ? Matrix<T>{map, channel, pixel, channels, pixels}
                        : Matrix<T>{map, pixel, channel, pixels, channels};
  }
  FP_DEVICE void load(const T* map, int64_t channel, int64_t pixel, int channels,
                      int pixels) const {
    const Matrix<T> from = matrix(map, channel, pixel, channels, pixels);
    if (channel_rows)
      load_rows<T, kDim, kPixels>(data, from);
    else
      load_rows<T, kPixels, kDim>(data, from);
  }
  // The elementwise product of two maps in the place of one.
  FP_DEVICE void load_product(const Matrix<T>& a, const Matrix<T>& b) const {
    if (channel_rows)
      load_product_rows<T, kDim, kPixels>(data, a, b);
    else
      load_product_rows<T, kPixels, kDim>(data, a, b);
  }
  // Channels [first, first + count).
  FP_DEVICE void store(T* map, int64_t channel, int64_t pixel, int channels, int pixels, int first,
                       int count) const {
    const Matrix<T> to = matrix(map, channel, pixel, channels, pixels);
    if (channel_rows)
      store_rows<T, kPixels>(to, data, first, count, 0, kPixels);
    else
      store_rows<T, kDim>(to, data, 0, kPixels, first, count);
  }
};

// Rows of a map are channels unless channels alone are contiguous.
FP_DEVICE bool has_channel_rows(int64_t channel_stride, int64_t pixel_stride) {
  return channel_stride != 1 || pixel_stride == 1;
}

// Operands of mma.sync. An A is [16][kDepth]; a B is [2 * kDepth][8], two products deep.
template <class T>
struct Operands {
  static constexpr int kDepth = 16;
  struct A {
    uint32_t x[4];
  };
  struct B {
    uint32_t x[4];
  };

  // A from a tile whose rows are A's (k contiguous), or, Transposed, whose rows are k.
  template <int kRowBytes, bool Transposed>
  static FP_DEVICE void load_a(A& a, const uint8_t* tile, int row, int k) {
    const int lane = lane_index();
    const int at =
        Transposed ? swizzled<kRowBytes>(k + lane / 16 * 8 + lane % 8, (row + lane / 8 % 2 * 8) * 2)
                   : swizzled<kRowBytes>(row + lane % 16, (k + lane / 16 * 8) * 2);
    load_matrix<Transposed>(a.x, tile + at);
  }
  // B from a tile whose rows are B's columns (k contiguous), or, Transposed, whose rows are k.
  template <int kRowBytes, bool Transposed>
  static FP_DEVICE void load_b(B& b, const uint8_t* tile, int column, int k) {
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
  struct A {
    float high[4], low[4];
  };
  struct B {
    float high[4], low[4];
  };

  static FP_DEVICE float element(const uint8_t* tile, int offset) {
    return *reinterpret_cast<const float*>(tile + offset);
  }
  static FP_DEVICE void split(float x, float* high, float* low) {
    *high = to_tf32(x);
    *low = to_tf32(x - *high);
  }
  template <int kRowBytes, bool Transposed>
  static FP_DEVICE void load_a(A& a, const uint8_t* tile, int row, int k) {
    const int g = lane_index() / 4, i = lane_index() % 4;
    FP_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int r = row + g + j % 2 * 8, c = k + i + j / 2 * 4;
      split(
          element(tile, Transposed ? swizzled<kRowBytes>(c, r * 4) : swizzled<kRowBytes>(r, c * 4)),
          &a.high[j], &a.low[j]);
    }
  }
  template <int kRowBytes, bool Transposed>
  static FP_DEVICE void load_b(B& b, const uint8_t* tile, int column, int k) {
    const int g = lane_index() / 4, i = lane_index() % 4;
    FP_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int r = k + i + j * 4, c = column + g;
      split(
          element(tile, Transposed ? swizzled<kRowBytes>(r, c * 4) : swizzled<kRowBytes>(c, r * 4)),
          &b.high[j], &b.low[j]);
    }
  }
  static FP_DEVICE void multiply(float (&c)[4], const A& a, const B& b, int step, bool precise) {
    if (precise) {  // the small terms first
      mma_1688_tf32(c, a.low, b.high[2 * step], b.high[2 * step + 1]);
      mma_1688_tf32(c, a.high, b.low[2 * step], b.low[2 * step + 1]);
    }
    mma_1688_tf32(c, a.high, b.high[2 * step], b.high[2 * step + 1]);
  }
  static FP_DEVICE void store_pair(uint8_t* to, float x, float y) {
    float* pair = reinterpret_cast<float*>(to);
    pair[0] = x;
    pair[1] = y;
  }
};

// As load_a and load_b, of a map's tile in whichever layout; rows (columns) are pixels, k channels.
template <class T, int kPixels, int kDim>
FP_DEVICE void load_a(typename Operands<T>::A& a, const MapTile<T, kPixels, kDim>& tile, int pixel,
                      int channel) {
  using Tile = MapTile<T, kPixels, kDim>;
  if (tile.channel_rows)
    Operands<T>::template load_a<Tile::kChannelRowBytes, true>(a, tile.data, pixel, channel);
  else
    Operands<T>::template load_a<Tile::kPixelRowBytes, false>(a, tile.data, pixel, channel);
}

// B of a product over channels (columns are pixels) and of one over pixels (columns are channels).
template <class T, int kPixels, int kDim>
FP_DEVICE void load_b_of_channels(typename Operands<T>::B& b, const MapTile<T, kPixels, kDim>& tile,
                                  int pixel, int channel) {
  using Tile = MapTile<T, kPixels, kDim>;
  if (tile.channel_rows)
    Operands<T>::template load_b<Tile::kChannelRowBytes, true>(b, tile.data, pixel, channel);
  else
    Operands<T>::template load_b<Tile::kPixelRowBytes, false>(b, tile.data, pixel, channel);
}
template <class T, int kPixels, int kDim>
FP_DEVICE void load_b_of_pixels(typename Operands<T>::B& b, const MapTile<T, kPixels, kDim>& tile,
                                int channel, int pixel) {
  using Tile = MapTile<T, kPixels, kDim>;
  if (tile.channel_rows)
    Operands<T>::template load_b<Tile::kChannelRowBytes, false>(b, tile.data, channel, pixel);
  else
    Operands<T>::template load_b<Tile::kPixelRowBytes, true>(b, tile.data, channel, pixel);
}

// The products S and dA of the two backward kernels: the halves of each, and the parts that warps
// other than the first of a slice of channels have; the first one has the sums after. `partials`
// are [kWarpsK - 1][2][rows * columns] floats, of which this thread's four lie at (row, column), +
// 1, and row + 8. A barrier where there are several.
template <int kWarpsK, int kRows, int kColumns>
FP_DEVICE void sum_products(float (&s)[2][4], float (&da)[2][4], float* partials, int warp_k,
                            int row, int column) {
  FP_UNROLL
  for (int j = 0; j < 4; ++j) {
    s[0][j] += s[1][j];
    da[0][j] += da[1][j];
  }
  if constexpr (kWarpsK > 1) {
    FP_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int at = (row + j / 2 * 8) * kColumns + column + j % 2;
      if (warp_k > 0) {
        partials[(warp_k - 1) * 2 * kRows * kColumns + at] = s[0][j];
        partials[((warp_k - 1) * 2 + 1) * kRows * kColumns + at] = da[0][j];
      }
    }
    sync_block();
    FP_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int at = (row + j / 2 * 8) * kColumns + column + j % 2;
      FP_UNROLL
      for (int other = 0; other < kWarpsK - 1; ++other) {
        s[0][j] += partials[other * 2 * kRows * kColumns + at];
        da[0][j] += partials[(other * 2 + 1) * kRows * kColumns + at];
      }
    }
  }
}

// Mean and reciprocal norm of each of kPixels pixels, by all threads; `scratch` is 2 kThreads
// floats. A barrier must come before, and comes after.
template <class T, int kPixels, int kDim>
FP_DEVICE void map_statistics(const MapTile<T, kPixels, kDim>& tile, int channels, float eps,
                              float* scratch, float* mean, float* rnorm) {
  constexpr int kParts = kThreads / kPixels;
  const int pixel = thread_index() % kPixels, part = thread_index() / kPixels;
  const float first = to_float(*tile.at(pixel, 0));
  RowSums sums;
  for (int channel = part; channel < channels; channel += kParts)
    sums.add(to_float(*tile.at(pixel, channel)) - first);
  scratch[2 * thread_index()] = sums.total;
  scratch[2 * thread_index() + 1] = sums.squares;
  sync_block();
  if (part == 0) {
    for (int other = 1; other < kParts; ++other) {
      sums.total += scratch[2 * (other * kPixels + pixel)];
      sums.squares += scratch[2 * (other * kPixels + pixel) + 1];
    }
    const RowStatistics found = row_statistics(first, sums, channels, eps);
    mean[pixel] = found.mean;
    rnorm[pixel] = found.rnorm;
  }
  sync_block();
}

}  // namespace fastproto::cuda::sm80
