// SPDX-License-Identifier: Apache-2.0
// fma_loop: what the benchmarks measure the machine's arithmetic ceiling with.
#include <vector>

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
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<double> done(size_t(threads), 0.0);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float sum = 1e-3f;
      done[size_t(i)] = double(set.fma_loop(rounds, &sum)) + (sum > 0 ? 0 : 1);
    }
  });
  double total = 0;
  for (double part : done) total += part;
  *static_cast<double*>(operations.data_ptr()) = total;
}

}  // namespace
}  // namespace fastproto

STABLE_TORCH_LIBRARY_IMPL(fastproto, CPU, m) {
  m.impl("fma_loop", TORCH_BOX(&fastproto::fma_loop));
}
