// SPDX-License-Identifier: Apache-2.0
// How the ops refuse what fastproto.proto_attention cannot have checked: it has looked at shapes,
// types and devices, and C++ asks of a tensor no more than its values and whether there is a plan.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "../params.h"

#define FP_CHECK(condition, ...) STD_TORCH_CHECK(condition, "proto_attention: ", __VA_ARGS__)

namespace fastproto {

inline DType dtype_of(const torch::stable::Tensor& t) {
#define FP_ROW(name, torch_name, ...) \
  if (t.scalar_type() == torch::headeronly::ScalarType::torch_name) return DType::name;
  FP_DTYPES(FP_ROW)
#undef FP_ROW
  FP_CHECK(false, "feat: found another dtype; allowed: float32, bfloat16, float16, float64.");
  return {};
}

}  // namespace fastproto
