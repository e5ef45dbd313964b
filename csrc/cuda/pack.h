// SPDX-License-Identifier: Apache-2.0
// Prototypes that a mask selects, packed: what the kernels of common/pack.cuh see, and their
// launchers. Each returns an error text, or null. Strides are in elements, `stream` is a
// cudaStream_t.
//
// A bag (one class of one episode) has C + 1 candidates: its C = S * pixels cells and their
// weighted average. Kept candidates of all bags come first, in their order; then, all zeros, a
// spare row for every other candidate. So each row has one owner, and no atomics are needed.
#pragma once

#include <cstdint>

#include "../params.h"

namespace fastproto::cuda {

struct PackShape {
  int32_t bags;    // E*K
  int32_t ways;    // K
  int32_t shots;   // S
  int32_t pixels;  // hw
  int32_t dim;     // D
};

struct PackParams {
  PackShape shape;
  const void* features;                   // [E, S, D, hw]
  int64_t episode, shot, channel, pixel;  // their strides
  const float* share;                     // [E*K, C]: how much of a cell belongs to the class
  float threshold;                        // the share above which a cell is kept
  int32_t append_global;                  // 1: every bag with a share keeps its average
  // A candidate's rank r among the kept ones of its bag, or -1 - r if it is not kept itself: r then
  // counts the kept ones before it.
  int32_t* position;  // [E*K, C + 1]
  int32_t* counts;    // [E*K]: kept candidates
  float* mass;        // [E*K]: sum of the shares
  void* protos;       // [E*K*(C + 1), D]
  int32_t* offsets;   // [E*K + 1]
};

struct PackBackwardParams {
  PackShape shape;
  const void* grad_protos;  // [E*K*(C + 1), D]
  const float* share;       // the forward's, as are the next three
  const int32_t* position;
  const float* mass;
  const int32_t* offsets;
  void* grad_features;  // [E*S, D, hw], dense: NCHW, or channels_last
  int32_t channels_last;
};

const char* launch_pack(const PackParams& params, DType dtype, void* stream);
const char* launch_pack_backward(const PackBackwardParams& params, DType dtype, void* stream);

// Blocks of the largest launch above: 32 bits must hold them.
constexpr int64_t pack_blocks(int64_t bags, int64_t shots, int64_t pixels, int64_t dim) {
  return bags * ((dim + 31) / 32) + bags * shots * ((pixels + 31) / 32) * ((dim + 63) / 64);
}

}  // namespace fastproto::cuda
