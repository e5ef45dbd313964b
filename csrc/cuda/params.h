// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels see beside csrc/params.h.
#pragma once

#include "../params.h"

namespace fastproto::cuda {

// Channels that the kernels are compiled for: 256 and 512; fewer are padded with zeros.
constexpr int kMaxDim = 512;
constexpr int padded_dim(int64_t dim) { return dim <= 256 ? 256 : kMaxDim; }

// How float32 products are computed: PyTorch's setting for float32 matrix products.
enum class Float32Precision : int {
  kTf32x3,  // "highest": three TF32 products, the digits of float32
  kTf32,    // "high", "medium"
};

struct Problem : ProblemOf<int32_t, float> {
  // 1: softmax relative to the maximum of the pixel so far; 0: relative to the bound c = 1, which
  // needs no maximum and is safe in float32 and bfloat16 for t >= 2/60.
  int32_t running_max;
  Float32Precision precision;
  const void* temperature_tensor;  // one float, or one double, in place of `temperature`; or null
  int32_t temperature_is_double;
};

// Per-row statistics of the softmax and of centring; all float32, dense.
struct Statistics {
  float* protos;  // [2, N_total]: mean, then 1 / max(|P - mean|, eps) (0 for a constant vector)
  float* query;   // [E*Q, 2, HW]: the same of F
  float* lse;     // [E*Q*K, HW]: log2 sum_j exp2(c_j log2(e) / t); w_j = exp2(c_j log2(e)/t - lse)
};

struct ForwardParams {
  Problem problem;
  Strided feat;            // [E, Q, D, HW]
  const void* protos;      // [N_total, D] contiguous
  const int32_t* offsets;  // [E*K + 1]
  // `statistics.protos` is read where not null (proto_stats_kernel wrote it), else the kernel
  // computes what it needs; `query` and `lse` are written where not null.
  Statistics statistics;
  Dense out;  // [E*Q*K, 2D or D, HW]
  Dense agg;  // [E*Q*K, D, HW] G in the features' type for the backward; null: not wanted
};

struct BackwardParams {
  Problem problem;
  Strided feat;
  Strided grad_out;  // [E, Q, K, 2D or D, HW]
  const void* protos;
  const int32_t* offsets;
  Statistics statistics;     // all read
  Dense agg;                 // read
  float* delta;              // [E*Q*K, HW] <dO, G>: backward_query writes it, backward_protos reads
  Dense grad_feat;           // [E*Q, D, HW]
  void* grad_protos;         // [N_total, D] contiguous
  float* temperature_terms;  // [programs of backward_query]: sum of dS c; null: not wanted
};

}  // namespace fastproto::cuda
