// SPDX-License-Identifier: Apache-2.0
#include "null.h"

#include <cstring>

#include "../api/checks.h"

namespace fastproto {
namespace {

using torch::stable::Tensor;

Tensor null_cpu(Tensor input) {
  FP_CHECK(input.scalar_type() == torch::headeronly::ScalarType::Float,
           "input: found another dtype; allowed: float32.");
  const Tensor x = torch::stable::contiguous(input);
  Tensor y = torch::stable::empty_like(x);
  std::memcpy(y.data_ptr(), x.data_ptr(), size_t(x.numel()) * sizeof(float));
  return y;
}

}  // namespace
}  // namespace fastproto

STABLE_TORCH_LIBRARY_IMPL(fastproto, CPU, m) { m.impl("null", TORCH_BOX(&fastproto::null_cpu)); }
