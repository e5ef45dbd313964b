// SPDX-License-Identifier: Apache-2.0
// The kernels of one instruction set: compiled for each with its flags, under a name of its own. Of
// a CPU with bfloat16 units only those for bfloat16: the others are AVX-512's.
#if defined(__AVX512BF16__)
#include "proto_attention_bwd_bf16.h"
#else
#include "proto_attention_bwd.h"
#endif

namespace fastproto::cpu {
namespace {

template <class T>
constexpr Kernels kKernels = {
    [](const Problem& p, Tiling t) { return FwdScratch<AccOf<T>>(nullptr, p.dim, t).bytes(); },
    [](const Problem& p, Tiling t) { return BwdScratch<AccOf<T>>(nullptr, p.dim, t).bytes(); },
    forward<T>, backward<T>};

}  // namespace

#if defined(__AVX512BF16__)
// The float32 kernels get what is not fit, in the same memory.
extern const Kernels FASTPROTO_KERNELS = {
    [](const Problem& p, Tiling t) {
      const int64_t wide = kKernels<BFloat16>.forward_scratch(p, t);
      const int64_t narrow = FwdScratchBf16(nullptr, p.dim, t).bytes();
      return narrow > wide ? narrow : wide;
    },
    [](const Problem& p, Tiling t) {
      const int64_t wide = kKernels<BFloat16>.backward_scratch(p, t);
      const int64_t narrow = BwdScratchBf16(nullptr, p.dim, t).bytes();
      return narrow > wide ? narrow : wide;
    },
    forward_bf16, backward_bf16};
#else
// The machine's float32 ceiling, for benchmarks: multiply-adds on registers alone.
// One core does `rounds` rounds; returns the floating-point operations done. *sum keeps the work
// from being dropped.
static int64_t fma_loop(int64_t rounds, float* sum) {
  // Latency 4 or 5, two units: at least 10 independent chains.
  constexpr int kChains = 12;
  Vec<float> chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = splat(1.0f + float(i) * *sum);
  const Vec<float> factor = splat(0.999999f), term = splat(1e-6f);
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * factor + term;
  Vec<float> total = {};
  for (int i = 0; i < kChains; ++i) total += chain[i];
  for (int i = 0; i < kLanes<float>; ++i) *sum += total[i];
  return rounds * kChains * kLanes<float> * 2;
}

extern const InstructionSet FASTPROTO_KERNELS = {
    {kKernels<float>, kKernels<double>, kKernels<BFloat16>, kKernels<Float16>}, fma_loop};
#endif

}  // namespace fastproto::cpu
