// SPDX-License-Identifier: Apache-2.0
// The table of a CPU with bfloat16 units: AVX-512's, but for bfloat16.
#pragma once

#include "proto_attention_bwd_bf16.h"

namespace fastproto::cpu {

extern const KernelTable kAvx512Kernels;

namespace {

constexpr KernelTable make_bf16_table() {
  return {
      [](DType dtype, const ProtoAttnShape& s, Tiling tiling) {
        const int64_t wide = kAvx512Kernels.forward_scratch(dtype, s, tiling);
        const int64_t narrow = FwdScratchBf16(nullptr, s.dim, tiling).bytes;
        return dtype == DType::kBFloat16 && narrow > wide ? narrow : wide;
      },
      [](DType dtype, const ProtoAttnShape& s, Tiling tiling) {
        const int64_t wide = kAvx512Kernels.backward_scratch(dtype, s, tiling);
        const int64_t narrow = BwdScratchBf16(nullptr, s.dim, tiling).bytes;
        return dtype == DType::kBFloat16 && narrow > wide ? narrow : wide;
      },
      [](DType dtype, const ProtoAttnFwdParams& p, Tiling tiling, TaskQueue& queue, void* scratch) {
        if (dtype == DType::kBFloat16) return forward_bf16(p, tiling, queue, scratch);
        kAvx512Kernels.forward(dtype, p, tiling, queue, scratch);
      },
      [](DType dtype, const ProtoAttnBwdParams& p, const BackwardPass& pass, TaskQueue& queue,
         void* scratch) {
        if (dtype == DType::kBFloat16) return backward_bf16(p, pass, queue, scratch);
        kAvx512Kernels.backward(dtype, p, pass, queue, scratch);
      },
      [](int64_t rounds, float* sum) { return kAvx512Kernels.fma_loop(rounds, sum); },
  };
}

}  // namespace
}  // namespace fastproto::cpu
