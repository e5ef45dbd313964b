// SPDX-License-Identifier: Apache-2.0
// The host's view of the Hopper backward kernels: when they apply, how they are launched.
#pragma once

#include "forward.h"

namespace fastproto::cuda {
struct KernelPlan;
}

namespace fastproto::cuda::sm90 {

// What the kernels are compiled for, for the plan; their Traits assert the same. `dim` is that of
// the template, D or more.
constexpr int backward_threads() { return 384; }
constexpr int backward_query_ring(int dim) { return dim == 512 ? 10 : 16; }
constexpr int backward_query_bytes(int dim) {
  const int boxes = dim / 64, ring = backward_query_ring(dim);
  return (2 * boxes + ring + 2) * 8192 + 2568 + 8 * (boxes + 2 * ring + 5);
}
constexpr int backward_protos_ring(int dim) { return dim == 512 ? 9 : 10; }
constexpr int backward_protos_bytes(int dim) {
  const int boxes = dim / 64, ring = backward_protos_ring(dim);
  return (boxes + 2 * ring + 2) * 8192 + 2576 + 8 * (3 * ring + 5);
}

inline bool is_channels_last(const BackwardParams& p) {
  return is_channels_last(p.agg, p.problem.pixels);
}

// What both kernels need: two-byte types in vectors, features and gradients in one layout.
inline bool backward_vectors_apply(const BackwardParams& p) {
  const bool channels_last = is_channels_last(p);
  return has_vectors(p.problem, p.feat, channels_last) &&
         has_vectors(p.problem, p.grad_out, channels_last) && is_vector(p.protos) &&
         (p.statistics.protos != nullptr || p.problem.total == 0);
}

// backward_query.cuh: dF and delta.
constexpr int kBackwardQueryPixels = 64;
inline bool backward_query_applies(const BackwardParams& p) {
  return backward_vectors_apply(p) && has_vectors(p.agg, is_channels_last(p)) &&
         has_vectors(p.grad_feat, is_channels_last(p));
}
template <class T>  // bf16, half
const char* launch_backward_query_of(const BackwardParams& p, const KernelPlan& plan, void* stream);

// backward_protos.cuh: dP; reads delta.
constexpr int kBackwardProtosRows = 64;
inline bool backward_protos_applies(const BackwardParams& p) {
  return backward_vectors_apply(p) && is_vector(p.grad_protos);
}
template <class T>  // bf16, half
const char* launch_backward_protos_of(const BackwardParams& p, const KernelPlan& plan,
                                      void* stream);

}  // namespace fastproto::cuda::sm90
