// SPDX-License-Identifier: Apache-2.0
// Checks of what reaches the op, in sentences. fastproto.proto_attention checks the same before and
// raises ArgumentError; these are for callers of torch.ops.fastproto.* and for C++.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define FP_CHECK(condition, ...) STD_TORCH_CHECK(condition, "proto_attention: ", __VA_ARGS__)

namespace fastproto {

inline void check_rank(const torch::stable::Tensor& t, const char* name, int64_t rank,
                       const char* shape) {
  FP_CHECK(t.dim() == rank, name, ": found ", t.dim(), " dimensions; allowed: ", rank, ", ", shape,
           ".");
}

}  // namespace fastproto
