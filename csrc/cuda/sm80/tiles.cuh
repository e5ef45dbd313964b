// SPDX-License-Identifier: Apache-2.0
// Tiles in shared memory, for every kernel of this folder, and how they are loaded and stored.
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

// `count` rows of `protos` (or of their gradients) from `row` on.
template <class T>
FP_DEVICE Matrix<T> rows_of(const void* protos, int row, int count, int dim) {
  return {static_cast<const T*>(protos) + int64_t(row) * dim, dim, 1, count, dim};
}

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

// float32: row `row` of a tile of prototypes less its mean, by a warp.
template <int kRowBytes>
FP_DEVICE void subtract_mean(uint8_t* tile, int row, float mean, int channels) {
  for (int d = lane_index(); d < channels; d += 32)
    *reinterpret_cast<float*>(tile + swizzled<kRowBytes>(row, d * 4)) -= mean;
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
  template <class Strides>
  FP_DEVICE Matrix<T> matrix(const T* map, const Strides& s, int channels, int pixels) const {
    const int64_t channel = s.channel, pixel = s.pixel;  // read once: selected, no branch
    return channel_rows ? Matrix<T>{map, channel, pixel, channels, pixels}
                        : Matrix<T>{map, pixel, channel, pixels, channels};
  }
  FP_DEVICE void load(const Matrix<T>& from) const {
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
  FP_DEVICE void store(const Matrix<T>& to, int first, int count) const {
    if (channel_rows)
      store_rows<T, kPixels>(to, data, first, count, 0, kPixels);
    else
      store_rows<T, kDim>(to, data, 0, kPixels, first, count);
  }
};

// Channel 0 of a pixel of an image (of class 0).
template <class T>
FP_DEVICE const T* map_of(const Strided& maps, int episode, int query, int pixel) {
  return static_cast<const T*>(maps.data) + episode * maps.episode + query * maps.query +
         int64_t(pixel) * maps.pixel;
}

// Rows of a map are channels unless channels alone are contiguous.
FP_DEVICE bool has_channel_rows(int64_t channel_stride, int64_t pixel_stride) {
  return channel_stride != 1 || pixel_stride == 1;
}

// The prototypes of a bag in tiles of kN, of which `stages` are in shared memory.
template <class T, int kN, int kDim>
struct PrototypeStream {
  static constexpr int kRowBytes = kDim * int(sizeof(T));
  uint8_t* memory;
  int stages;
  int warp;
  Matrix<T> bag;
  int steps = (bag.rows + kN - 1) / kN;

  // Starts loading tile `step`, if there is one.
  FP_DEVICE void load(int step) const {
    if (step < steps)
      load_rows<T, kN, kDim>(tile(step),
                             rows_of<T>(bag.data, step * kN, bag.rows - step * kN, bag.columns));
    copy_async_commit();
  }
  FP_DEVICE uint8_t* tile(int step) const { return memory + step % stages * kN * kRowBytes; }
  // The tile, for all threads, while the next one loads; in float32 less the means of its rows,
  // which are means[first] and on.
  FP_DEVICE uint8_t* wait(int step, const float* means, int first) const {
    if (stages == 2) {
      load(step + 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    sync_block();
    if constexpr (sizeof(T) == 4) {
      for (int row = warp; row < kN && row < bag.rows - step * kN; row += kWarps)
        subtract_mean<kRowBytes>(tile(step), row, means[first + row], bag.columns);
      sync_block();
    }
    return tile(step);
  }
  // After the last use of the tile.
  FP_DEVICE void release(int step) const {
    sync_block();
    if (stages == 1) load(step + 1);
  }
};

// Adds up each pixel's sums over the kThreads / kPixels threads that share it (thread_index() %
// kPixels): the first of them has all. `scratch` is kCount kThreads floats; a barrier.
template <int kPixels, int kCount>
FP_DEVICE void sum_parts(float* scratch, float (&sums)[kCount]) {
  FP_UNROLL
  for (int k = 0; k < kCount; ++k) scratch[kCount * thread_index() + k] = sums[k];
  sync_block();
  if (thread_index() >= kPixels) return;
  for (int other = 1; other < kThreads / kPixels; ++other) {
    FP_UNROLL
    for (int k = 0; k < kCount; ++k)
      sums[k] += scratch[kCount * (other * kPixels + thread_index()) + k];
  }
}

// Mean and reciprocal norm of each of kPixels pixels, by all threads; `scratch` is 2 kThreads
// floats. A barrier must come before, and comes after.
template <class T, int kPixels, int kDim>
FP_DEVICE void map_statistics(const MapTile<T, kPixels, kDim>& tile, int channels, float eps,
                              float* scratch, float* mean, float* rnorm) {
  const int pixel = thread_index() % kPixels;
  const float first = to_float(*tile.at(pixel, 0));
  RowSums sums;
  for (int channel = thread_index() / kPixels; channel < channels; channel += kThreads / kPixels)
    sums.add(to_float(*tile.at(pixel, channel)) - first);
  float parts[2] = {sums.total, sums.squares};
  sum_parts<kPixels>(scratch, parts);
  if (thread_index() < kPixels) {
    const RowStatistics found = row_statistics(first, {parts[0], parts[1]}, channels, eps);
    mean[pixel] = found.mean;
    rnorm[pixel] = found.rnorm;
  }
  sync_block();
}

}  // namespace fastproto::cuda::sm80
