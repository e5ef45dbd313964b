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
  return p.agg.channel == 1 && (p.agg.pixel != 1 || p.problem.pixels == 1);
}

// What both kernels need: two-byte types of D <= 512 in rows that start at multiples of 16 bytes,
// features and gradients in one layout.
inline bool backward_vectors_apply(const BackwardParams& p) {
  const Problem& s = p.problem;
  const bool channels_last = is_channels_last(p);
  const auto inner = [&](const auto& maps) { return channels_last ? maps.channel : maps.pixel; };
  const auto row = [&](const auto& maps) { return channels_last ? maps.pixel : maps.channel; };
  const int rows = channels_last ? s.pixels : s.dim, length = channels_last ? s.dim : s.pixels;
  const auto walkable = [&](const Strided& maps) {
    return inner(maps) == 1 && is_vector(maps.data) && is_tma_dim(rows, row(maps)) &&
           (rows == 1 || row(maps) >= length) && is_tma_dim(s.queries, maps.query) &&
           is_tma_dim(s.episodes, maps.episode);
  };
  return s.dim >= 8 && s.dim <= 512 && is_vector(s.dim) && s.pixels >= 1 &&
         (channels_last || is_vector(s.pixels)) && walkable(p.feat) && walkable(p.grad_out) &&
         is_tma_dim(s.ways, p.grad_out.way) && is_vector(p.protos) &&
         (p.statistics.protos != nullptr || s.total == 0);
}

// backward_query.cuh: dF and delta.
constexpr int kBackwardQueryPixels = 64;
inline bool backward_query_applies(const BackwardParams& p) {
  const auto inner = [&](const Dense& maps) {
    return is_channels_last(p) ? maps.channel : maps.pixel;
  };
  return backward_vectors_apply(p) && inner(p.agg) == 1 && inner(p.grad_feat) == 1 &&
         is_vector(p.agg.data) && is_vector(p.grad_feat.data);
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
