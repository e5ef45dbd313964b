// SPDX-License-Identifier: Apache-2.0
// The machine's float32 ceiling: multiply-adds on registers alone. Benchmarks measure it beside the
// kernels, on the same instruction set.
#pragma once

#include "vec.h"

namespace fastproto::cpu {
namespace {

// One core does `rounds` rounds; returns the floating-point operations done. *sum keeps the work
// from being dropped.
int64_t fma_loop(int64_t rounds, float* sum) {
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

}  // namespace
}  // namespace fastproto::cpu
