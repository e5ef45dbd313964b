// SPDX-License-Identifier: Apache-2.0
// The one matrix product of all kernels, on panels in cache:
//     C[M, N] = A[M, K] . B[K, N]   or   C += A . B
// A is read element by element (broadcast) with two strides, so it may be transposed; the rows of
// B and C are contiguous. B's rows are readable to the next whole vector; C's are never touched
// past N. Elements of A and B are numbers of C's type, or Pairs (gemm_bf16.h) of them along K.
//
// Budget, AVX-512: 6 x 4 accumulators + 4 of B + 1 broadcast = 29 of 32 registers; 24 FMA per
// 4 + 6 loads. AVX2: 6 x 2 + 2 + 1 = 15 of 16; 12 FMA per 2 + 6 loads. Narrow panels take 12 rows,
// which keeps at least 12 independent sums.
#pragma once

#include "vec.h"

namespace fastproto::cpu {
namespace {

constexpr int kMostVecs = kVecBytes == 64 ? 4 : 2;

template <class In>
struct MatrixA {
  const In* data;
  int64_t stride_row;
  int64_t stride_k;
};

// Memory that a later step will read, fetched into the second-level cache a few lines at a time
// while a product runs.
struct Ahead {
  const char* next = nullptr;
  const char* end = nullptr;

  void fetch() {
    constexpr int kLines = 12;  // of 64 bytes, per call of the micro-kernel
    for (int i = 0; i < kLines && next < end; ++i, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// `Tail`: the only vector of a row of C has but `lanes` lanes.
template <int Rows, int Vecs, bool Tail, class Acc, class In>
inline void gemm_micro(MatrixA<In> a, const In* b, int64_t b_k, Acc* c, int64_t c_row,
                       int64_t k_size, bool accumulate, int64_t lanes) {
  constexpr int L = kLanes<Acc>;
  Vec<Acc> acc[Rows][Vecs];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) {
      acc[r][v] = Vec<Acc>{};
      if (accumulate) __builtin_prefetch(c + r * c_row + v * L, 1, 3);
    }
  const In* x = a.data;
  for (int64_t k = 0; k < k_size; ++k, x += a.stride_k, b += b_k) {
    decltype(load(b)) row[Vecs];
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) row[v] = load(b + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const auto value = splat(x[r * a.stride_row]);
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) acc[r][v] = multiply_add(acc[r][v], value, row[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) {
      Acc* at = c + r * c_row + v * L;
      if constexpr (Tail)
        store_as(accumulate ? load_as(at, lanes) + acc[r][v] : acc[r][v], at, lanes);
      else
        store(at, accumulate ? load(at) + acc[r][v] : acc[r][v]);
    }
}

// Columns [0, Vecs vectors) of C, all rows.
template <int Vecs, bool Tail, class Acc, class In>
void gemm_columns(int64_t m_size, int64_t k_size, MatrixA<In> a, const In* b, int64_t b_k, Acc* c,
                  int64_t c_row, bool accumulate, int64_t lanes, Ahead* ahead) {
  constexpr int kMain = Vecs == 4 || (kVecBytes < 64 && Vecs == 2) ? 6 : 12;
  int64_t m = 0;
  const auto rows = [&]<int Rows>() {
    gemm_micro<Rows, Vecs, Tail>({a.data + m * a.stride_row, a.stride_row, a.stride_k}, b, b_k,
                                 c + m * c_row, c_row, k_size, accumulate, lanes);
    if (ahead != nullptr) ahead->fetch();
    m += Rows;
  };
  while (m + kMain <= m_size) rows.template operator()<kMain>();
  if constexpr (kMain > 6)
    if (m + 6 <= m_size) rows.template operator()<6>();
  const int64_t left = m_size - m;
  if (left == 1) rows.template operator()<1>();
  if (left == 2) rows.template operator()<2>();
  if (left == 3) rows.template operator()<3>();
  if (left == 4) rows.template operator()<4>();
  if (left == 5) rows.template operator()<5>();
}

// K in chunks with sums of their own: B's chunk stays in the first-level cache while all rows of A
// pass, and rounding errors grow with the chunk's length instead of K's.
template <class Acc, class In>
void gemm(int64_t m_size, int64_t n_size, int64_t k_size, MatrixA<In> a, const In* b, int64_t b_k,
          Acc* c, int64_t c_row, bool accumulate, Ahead* ahead = nullptr) {
  constexpr int64_t kChunk = 2 * kVecBytes;
  constexpr int L = kLanes<Acc>;
  for (int64_t n = 0; n < n_size;) {
    const int64_t left = n_size - n;
    int64_t done = 0;
    for (int64_t k = 0; k < k_size; k += kChunk) {
      const int64_t size = k_size - k < kChunk ? k_size - k : kChunk;
      const auto columns = [&]<int Vecs, bool Tail>() {
        gemm_columns<Vecs, Tail>(m_size, size, {a.data + k * a.stride_k, a.stride_row, a.stride_k},
                                 b + k * b_k + n, b_k, c + n, c_row, accumulate || k > 0, left,
                                 ahead);
        done = Vecs * L;
      };
      if (kMostVecs >= 4 && left >= 4 * L)
        columns.template operator()<kMostVecs, false>();
      else if (left >= 2 * L)
        columns.template operator()<2, false>();
      else if (left >= L)
        columns.template operator()<1, false>();
      else
        columns.template operator()<1, true>();
    }
    n += done;
  }
}

}  // namespace
}  // namespace fastproto::cpu
