// SPDX-License-Identifier: Apache-2.0
// What the kernels of this folder are compiled for, for the plan: plain C++. `size` is the bytes of
// a number (2 or 4), `dim` the padded channels. The kernels' Traits assert the same numbers.
#pragma once

namespace fastproto::cuda::sm80 {

constexpr int kThreads = 256;
// Slices of the channels of a result: 1, or this many.
constexpr int most_slices(int dim) { return dim / 64; }

// Forward: 16 rows with any slices; 64 rows with one slice, half types alone.
constexpr int forward_tile_n(int size, int rows) { return size == 2 && rows == 16 ? 64 : 32; }
constexpr int forward_bytes(int size, int dim, int rows, int stages) {
  const int n = forward_tile_n(size, rows);
  return (rows + stages * n) * dim * size + rows * n * size + rows * (3 + 2 * (n / 8)) * 4;
}

// Backward of the queries: 16 rows.
constexpr int backward_query_tile_n(int size) { return size == 2 ? 64 : 16; }
constexpr int backward_query_bytes(int size, int dim, int stages) {
  const int n = backward_query_tile_n(size), warps_k = 8 / (n / 8);
  return (2 * 16 + stages * n) * dim * size + 16 * n * size + (warps_k - 1) * 2 * 16 * n * 4 +
         16 * 5 * 4;
}

// Backward of the prototypes: 16 rows with any slices; 32 rows with one slice, half types alone.
constexpr int backward_protos_pixels(int size) { return size == 2 ? 32 : 16; }
constexpr int backward_protos_bytes(int size, int dim, int rows) {
  const int q = backward_protos_pixels(size), warps_k = 8 / (q / 8) / (rows / 16);
  return (rows + 2 * q) * dim * size + 2 * rows * q * size + (warps_k - 1) * 2 * rows * q * 4 +
         (5 * q + 3 * rows) * 4;
}

}  // namespace fastproto::cuda::sm80
