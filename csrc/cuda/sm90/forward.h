// SPDX-License-Identifier: Apache-2.0
// The host's view of the Hopper forward kernels: when they apply, how they are launched.
#pragma once

#include "../params.h"

namespace fastproto::cuda::sm90 {

// What the kernels are compiled for, for the plan; their Traits assert the same. `dim` is that of
// the template, D or more.
constexpr int kSharedLimit = 227 * 1024;  // dynamic shared memory of a block: all there is
constexpr int forward_threads() { return 384; }
constexpr int forward_stages(int dim) { return dim == 512 ? 2 : 4; }
constexpr int forward_bytes(int dim) {
  const int slices = dim / 64, stages = forward_stages(dim);
  return ((1 + stages) * slices + 4) * 8192 + 8 * (stages * (slices + 2) + slices + 2) + 2560;
}
constexpr int forward_latency_cluster(int dim) { return dim / 64; }
constexpr int forward_latency_threads(int dim) { return dim / 2; }
constexpr int forward_latency_bytes(int dim) { return dim / 64 * 12864 + 192; }

// TMA and cp.async move 16 bytes at a time: 8 numbers of two bytes.
constexpr bool is_vector(int64_t elements) { return elements % 8 == 0; }
inline bool is_vector(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// A dimension that a tensor map can step along; a stride of 0 is the same data all along.
constexpr bool is_tma_dim(int64_t size, int64_t stride) {
  return size <= 1 || (stride >= 0 && is_vector(stride) && stride < (int64_t(1) << 38));
}

// The layout of maps of `pixels`: of one pixel, either.
inline bool is_channels_last(const Dense& maps, int pixels) {
  return maps.channel == 1 && (maps.pixel != 1 || pixels == 1);
}
inline bool is_channels_last(const ForwardParams& p) {
  return is_channels_last(p.out, p.problem.pixels);
}

// Whether maps in this layout have rows of whole vectors: dense ones, which may be absent, and
// strided ones, whose rows do not overlap, as the manual of tensor maps has it.
inline bool has_vectors(const Dense& maps, bool channels_last) {
  return is_vector(maps.data) && (channels_last ? maps.channel : maps.pixel) == 1;
}
inline bool has_vectors(const Problem& s, const Strided& maps, bool channels_last) {
  const int64_t inner = channels_last ? maps.channel : maps.pixel;
  const int64_t row = channels_last ? maps.pixel : maps.channel;
  const int rows = channels_last ? s.pixels : s.dim, length = channels_last ? s.dim : s.pixels;
  return s.dim >= 8 && s.dim <= kMaxDim && is_vector(s.dim) && s.pixels >= 1 &&
         (channels_last || is_vector(s.pixels)) && inner == 1 && is_vector(maps.data) &&
         is_tma_dim(rows, row) && (rows == 1 || row >= length) &&
         is_tma_dim(s.queries, maps.query) && is_tma_dim(s.episodes, maps.episode) &&
         is_tma_dim(s.ways, maps.way);
}

// What both kernels need, of two-byte types.
inline bool vectors_apply(const ForwardParams& p) {
  const bool channels_last = is_channels_last(p);
  return has_vectors(p.problem, p.feat, channels_last) && has_vectors(p.out, channels_last) &&
         (p.agg.data == nullptr || has_vectors(p.agg, channels_last)) && is_vector(p.protos);
}

// forward.cuh: throughput. Needs the prototypes' statistics.
inline bool forward_applies(const ForwardParams& p) {
  return vectors_apply(p) && (p.statistics.protos != nullptr || p.problem.total == 0);
}
template <class T>  // bf16, half
const char* launch_forward_of(const ForwardParams& p, int blocks, void* stream);

// forward_latency.cuh: few pixels. Computes the prototypes' statistics where they are null.
inline bool forward_latency_applies(const ForwardParams& p) { return vectors_apply(p); }
template <class T>
const char* launch_forward_latency_of(const ForwardParams& p, int blocks, void* stream);

}  // namespace fastproto::cuda::sm90
