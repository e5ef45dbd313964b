// SPDX-License-Identifier: Apache-2.0
// The one matrix product of all kernels, on panels in cache:
//     C[M, N] = A[M, K] . B[K, N]   or   C += A . B
// A is read element by element (broadcast) with two strides, so it may be transposed; the rows of
// B and C are contiguous, and N is a multiple of kPanel<Acc>.
//
// Budget, AVX-512: 6 x 4 accumulators + 4 of B + 1 broadcast = 29 of 32 registers; 24 FMA per
// 4 + 6 loads. AVX2: 6 x 2 + 2 + 1 = 15 of 16; 12 FMA per 2 + 6 loads.
#pragma once

#include "vec.h"

namespace fastproto::cpu {
namespace {

constexpr int kRows = 6;
template <class Acc>
constexpr int kPanel = kLanes<Acc> * kTileVecs;

template <class Acc>
struct MatrixA {
  const Acc* data;
  int64_t stride_row;
  int64_t stride_k;
};

template <int Rows, class Acc>
inline void gemm_micro(const Acc* a, int64_t a_row, int64_t a_k, const Acc* b, int64_t b_k, Acc* c,
                       int64_t c_row, int64_t k_size, bool accumulate) {
  constexpr int L = kLanes<Acc>;
  Vec<Acc> acc[Rows][kTileVecs];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kTileVecs; ++v) acc[r][v] = Vec<Acc>{};
  for (int64_t k = 0; k < k_size; ++k, a += a_k, b += b_k) {
    Vec<Acc> row[kTileVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVecs; ++v) row[v] = load(b + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vec<Acc> x = splat(a[r * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVecs; ++v) acc[r][v] += x * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kTileVecs; ++v) {
      Acc* at = c + r * c_row + v * L;
      store(at, accumulate ? load(at) + acc[r][v] : acc[r][v]);
    }
}

template <class Acc>
void gemm_chunk(int64_t m_size, int64_t n_size, int64_t k_size, MatrixA<Acc> a, const Acc* b,
                int64_t b_k, Acc* c, int64_t c_row, bool accumulate) {
  for (int64_t n = 0; n < n_size; n += kPanel<Acc>) {
    int64_t m = 0;
    for (; m + kRows <= m_size; m += kRows)
      gemm_micro<kRows>(a.data + m * a.stride_row, a.stride_row, a.stride_k, b + n, b_k,
                        c + m * c_row + n, c_row, k_size, accumulate);
    const Acc* a_rest = a.data + m * a.stride_row;
    Acc* c_rest = c + m * c_row + n;
    const auto rest = [&]<int Rows>() {
      gemm_micro<Rows>(a_rest, a.stride_row, a.stride_k, b + n, b_k, c_rest, c_row, k_size,
                       accumulate);
    };
    switch (m_size - m) {
      case 1:
        rest.template operator()<1>();
        break;
      case 2:
        rest.template operator()<2>();
        break;
      case 3:
        rest.template operator()<3>();
        break;
      case 4:
        rest.template operator()<4>();
        break;
      case 5:
        rest.template operator()<5>();
        break;
      default:
        break;
    }
  }
}

// K in chunks with sums of their own: B's chunk stays in the first-level cache while all rows of A
// pass, and rounding errors grow with the chunk's length instead of K's.
template <class Acc>
void gemm(int64_t m_size, int64_t n_size, int64_t k_size, MatrixA<Acc> a, const Acc* b, int64_t b_k,
          Acc* c, int64_t c_row, bool accumulate) {
  constexpr int64_t kChunk = 128;
  for (int64_t k = 0; k < k_size; k += kChunk) {
    const int64_t size = k_size - k < kChunk ? k_size - k : kChunk;
    gemm_chunk<Acc>(m_size, n_size, size, {a.data + k * a.stride_k, a.stride_row, a.stride_k},
                    b + k * b_k, b_k, c, c_row, accumulate || k > 0);
  }
}

}  // namespace
}  // namespace fastproto::cpu
