// SPDX-License-Identifier: Apache-2.0
// fma_loop: what the benchmarks measure the machine's arithmetic ceiling with.
#include <atomic>

#include "../cpu/kernels.h"
#include "checks.h"

namespace fastproto {
namespace {

using torch::stable::Tensor;

// See schemas.cpp.
void fma_loop(Tensor operations, int64_t rounds) {
  FP_CHECK(operations.scalar_type() == torch::headeronly::ScalarType::Double &&
               operations.numel() == 1 && operations.is_contiguous(),
           "operations: found another tensor; allowed: one element of float64.");
  const auto& set = cpu::instruction_set(cpu::current_level());
  std::atomic<int64_t> total = 0;
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t i, int64_t end) {
    for (float sum = 1e-3f; i < end; ++i) total += set.fma_loop(rounds, &sum) + (sum > 0 ? 0 : 1);
  });
  *static_cast<double*>(operations.data_ptr()) = double(total);
}

}  // namespace
}  // namespace fastproto

STABLE_TORCH_LIBRARY_IMPL(fastproto, CPU, m) {
  m.impl("fma_loop", TORCH_BOX(&fastproto::fma_loop));
}
