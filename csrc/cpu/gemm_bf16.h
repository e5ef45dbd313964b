// SPDX-License-Identifier: Apache-2.0
// The matrix product on bfloat16 numbers with float32 sums:
//     C[M, N] (+)= A[M, K] . B[K, N]
// A's rows are contiguous. B comes in pairs of rows, [K/2][N][2], as both instructions want it:
// vdpbf16ps multiplies a broadcast pair of A with 16 pairs of B, an AMX tile holds 16 rows of 32 of
// A and 16 rows of 16 pairs of B. M is a multiple of 16, N of 16, K of 32; C's rows are contiguous.
//
// Budget, vdpbf16ps: that of gemm.h, at twice the rate of float32. AMX: 4 tiles of C + 2 of A + 2
// of B; 4 products (64 cycles) per 4 loads (32 cycles).
#pragma once

#include "gemm.h"

namespace fastproto::cpu {
namespace {

// An operand of bfloat16 numbers; `stride` in numbers (in pairs for B).
struct RowsBf16 {
  const uint16_t* data;
  int64_t stride;
};
struct PairsBf16 {
  const uint16_t* data;
  int64_t stride;
};

#if defined(__AMX_BF16__)

// Every thread sets its tiles up before the first product and gives them back after the last.
class MatrixUnit {
 public:
  MatrixUnit() {
    struct alignas(64) {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;
};

// Tiles 0..3 hold C (row-major), 4 and 5 A, 6 and 7 B.
template <int Rows, int Columns>  // in tiles
FASTPROTO_INLINE void tiles_bf16(int64_t k_size, RowsBf16 a, PairsBf16 b, float* c, int64_t c_row,
                                 bool accumulate) {
  const int64_t c_bytes = c_row * 4, a_bytes = a.stride * 2, b_bytes = b.stride * 4;
  float* lower = c + 16 * c_row;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (Columns > 1) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (Rows > 1) _tile_loadd(2, lower, c_bytes);
    if constexpr (Rows > 1 && Columns > 1) _tile_loadd(3, lower + 16, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (Columns > 1) _tile_zero(1);
    if constexpr (Rows > 1) _tile_zero(2);
    if constexpr (Rows > 1 && Columns > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < k_size; k += 32) {
    const uint16_t *left = a.data + k, *right = b.data + k * b.stride;
    _tile_loadd(6, right, b_bytes);
    _tile_loadd(4, left, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Rows > 1) {
      _tile_loadd(5, left + 16 * a.stride, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (Columns > 1) {
      _tile_loadd(7, right + 32, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (Rows > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (Columns > 1) _tile_stored(1, c + 16, c_bytes);
  if constexpr (Rows > 1) _tile_stored(2, lower, c_bytes);
  if constexpr (Rows > 1 && Columns > 1) _tile_stored(3, lower + 16, c_bytes);
}

void gemm_bf16(int64_t m_size, int64_t n_size, int64_t k_size, RowsBf16 a, PairsBf16 b, float* c,
               int64_t c_row, bool accumulate) {
  asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler that they read memory
  for (int64_t m = 0; m < m_size;) {
    const bool two = m_size - m >= 32;
    const RowsBf16 rows{a.data + m * a.stride, a.stride};
    for (int64_t n = 0; n < n_size;) {
      const PairsBf16 pairs{b.data + 2 * n, b.stride};
      float* at = c + m * c_row + n;
      const auto product = [&]<int Columns>() {
        if (two)
          tiles_bf16<2, Columns>(k_size, rows, pairs, at, c_row, accumulate);
        else
          tiles_bf16<1, Columns>(k_size, rows, pairs, at, c_row, accumulate);
        n += 16 * Columns;
      };
      if (n_size - n >= 32)
        product.template operator()<2>();
      else
        product.template operator()<1>();
    }
    m += two ? 32 : 16;
  }
  asm volatile("" ::: "memory");
}

#else

struct MatrixUnit {};

void gemm_bf16(int64_t m_size, int64_t n_size, int64_t k_size, RowsBf16 a, PairsBf16 b, float* c,
               int64_t c_row, bool accumulate) {
  const auto* left = reinterpret_cast<const Pair*>(a.data);
  const auto* right = reinterpret_cast<const Pair*>(b.data);
  gemm<float>(m_size, n_size, k_size / 2, {left, a.stride / 2, 1}, right, b.stride, c, c_row,
              accumulate);
}

#endif

}  // namespace
}  // namespace fastproto::cpu
