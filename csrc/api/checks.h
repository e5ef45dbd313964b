// SPDX-License-Identifier: Apache-2.0
// Checks of what reaches the op, in sentences. fastproto.proto_attention checks the same before and
// raises ArgumentError; these are for callers of torch.ops.fastproto.* and for C++.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "../params.h"

#define FP_CHECK(condition, ...) STD_TORCH_CHECK(condition, "proto_attention: ", __VA_ARGS__)

namespace fastproto {

inline void check_rank(const torch::stable::Tensor& t, const char* name, int64_t rank,
                       const char* shape) {
  FP_CHECK(t.dim() == rank, name, ": found ", t.dim(), " dimensions; allowed: ", rank, ", ", shape,
           ".");
}

inline bool is_same_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

// Nothing where no kernel takes the type.
inline std::optional<DType> dtype_of(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return std::nullopt;
  }
}

inline bool has_sizes(const torch::stable::Tensor& t, std::initializer_list<int64_t> sizes) {
  const auto found = t.sizes();
  return std::equal(found.begin(), found.end(), sizes.begin(), sizes.end());
}

// Everything about feat, protos and offsets that can be checked without reading a value.
inline void check_inputs(const torch::stable::Tensor& feat, const torch::stable::Tensor& protos,
                         const torch::stable::Tensor& offsets, double eps) {
  check_rank(feat, "feat", 5, "[E, Q, D, H, W]");
  check_rank(protos, "protos", 2, "[N_total, D]");
  check_rank(offsets, "offsets", 1, "[E*K + 1]");
  const int64_t episodes = feat.size(0), bags = offsets.size(0) - 1;
  FP_CHECK(protos.scalar_type() == feat.scalar_type(),
           "protos: found a dtype other than that of feat; allowed: the same.");
  FP_CHECK(offsets.scalar_type() == torch::headeronly::ScalarType::Int,
           "offsets: found another dtype; allowed: int32.");
  FP_CHECK(is_same_device(protos, feat) && is_same_device(offsets, feat),
           "protos, offsets: found another device than that of feat; allowed: the same.");
  FP_CHECK(feat.size(2) >= 1 && protos.size(1) == feat.size(2), "protos: found ", protos.size(1),
           " channels; allowed: those of feat, ", feat.size(2), ", at least 1.");
  FP_CHECK(episodes >= 1 && bags >= 1 && bags % episodes == 0, "offsets: found ", bags + 1,
           " entries; allowed: E*K + 1 with E = ", episodes, ", E and K at least 1.");
  FP_CHECK(eps > 0, "eps: found ", eps, "; allowed: a number above 0.");
}

// Of a temperature given as a tensor.
inline void check_temperature_tensor(const torch::stable::Tensor& t,
                                     const torch::stable::Tensor& feat) {
  using torch::headeronly::ScalarType;
  FP_CHECK(is_same_device(t, feat),
           "temperature: found another device than that of feat; allowed: the same.");
  FP_CHECK(t.numel() == 1, "temperature: found a tensor of ", t.numel(),
           " elements; allowed: one.");
  FP_CHECK(t.scalar_type() == ScalarType::Double || t.scalar_type() == ScalarType::Float,
           "temperature: found a tensor of another dtype; allowed: float32, float64.");
}

}  // namespace fastproto
