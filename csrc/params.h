// SPDX-License-Identifier: Apache-2.0
// What the kernels of the CPU and of CUDA see: sizes, raw pointers and strides (in elements).
// Symbols: docs/math.md. No torch below csrc/api.
#pragma once

#include <cstdint>

namespace fastproto {

// The table of types: our name, torch's, Python's, bytes, the CUDA kernels' type (double: none).
#define FP_DTYPES(ROW)                          \
  ROW(kFloat32, Float, "float32", 4, float)     \
  ROW(kFloat64, Double, "float64", 8, double)   \
  ROW(kBFloat16, BFloat16, "bfloat16", 2, bf16) \
  ROW(kFloat16, Half, "float16", 2, half)

#define FP_ROW(name, ...) name,
enum class DType : int { FP_DTYPES(FP_ROW) };
#undef FP_ROW

template <class Int, class Real>
struct ProblemOf {
  Int episodes;  // E
  Int queries;   // Q, query images per episode
  Int ways;      // K, bags per episode
  Int dim;       // D
  Int pixels;    // HW
  Int total;     // N_total, rows of `protos`; rows past offsets[E*K] belong to no bag
  Int concat;    // 1: out = [F ; G*F], 0: G*F alone
  Real temperature;
  Real eps;
};

// Query features, or gradients of outputs. Pixels run as one dimension.
struct Strided {
  const void* data;
  int64_t episode, query, way, channel, pixel;  // strides; `way` is 0 for features
};

// A dense stack of maps that the kernels write (or wrote): [E*Q*K or E*Q][channels][HW], either
// NCHW (channel = HW, pixel = 1) or channels_last (channel = 1, pixel = channels).
struct Dense {
  void* data;
  int64_t image, channel, pixel;  // strides
};

}  // namespace fastproto
