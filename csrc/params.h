// SPDX-License-Identifier: Apache-2.0
// What a kernel sees: sizes, raw pointers and strides (in elements). No torch below csrc/api.
#pragma once

#include <cstdint>

namespace fastproto {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Prototypes of all bags, packed in the order (episode, class).
struct Bags {
  const void* protos;      // [N_total, D], rows contiguous
  const int32_t* offsets;  // [E*K + 1], where each bag starts
};

// A stack of feature maps [images, channels, pixels]; one of the two inner strides is 1.
struct Maps {
  void* data;
  int64_t stride_channel;
  int64_t stride_pixel;
  int64_t stride_image;
};

struct ProtoAttnShape {
  int64_t episodes;  // E
  int64_t queries;   // Q, query images per episode
  int64_t ways;      // K, bags per episode
  int64_t dim;       // D
  int64_t pixels;    // HW
  int64_t total;     // N_total, rows of `protos`; rows past offsets[E*K] belong to no bag
  bool concat;       // out = [F ; G*F] rather than G*F
  double temperature;
  double eps;
};

// The query features [E, Q, D, HW]; E and Q have strides of their own.
struct Features {
  const void* data;
  int64_t stride_episode;
  int64_t stride_query;
  int64_t stride_channel;
  int64_t stride_pixel;
};

struct ProtoAttnFwdParams {
  ProtoAttnShape shape;
  Features feat;
  Bags bags;
  Maps out;  // [E*Q*K, 2D or D, HW]
  // For the backward, in float (double for float64); null where not wanted.
  Maps agg;     // [E*Q*K, D, HW] Gc = G - mean, centred: <dO, G> would lose digits to the mean
  void* stats;  // [E*Q*K, 3, HW] bound (of c/t) and 1/sum of the softmax, mean taken out of G
};

struct ProtoAttnBwdParams {
  ProtoAttnShape shape;
  Features feat;
  Bags bags;
  Maps grad_out;                   // [E*Q*K, 2D or D, HW]
  Maps agg;                        // [E*Q*K, D, HW]
  const void* stats;               // [E*Q*K, 3, HW]
  Maps grad_feat;                  // [E*Q, D, HW]
  void* grad_protos;               // [N_total, D] contiguous, or nullptr: not wanted
  double* grad_temperature_parts;  // [tasks of the feature pass], or nullptr: not wanted
};

// Hands out task numbers to the workers of one pass; every task writes its own outputs, so the
// result does not depend on who does what.
struct TaskQueue {
  int64_t next = 0;
  int64_t end = 0;
  int64_t grain = 1;

  // The next run of tasks [*begin, *stop); false when none is left.
  __attribute__((always_inline)) bool take(int64_t* begin, int64_t* stop) {
    *begin = __atomic_fetch_add(&next, grain, __ATOMIC_RELAXED);
    *stop = *begin + grain < end ? *begin + grain : end;
    return *begin < end;
  }
};

}  // namespace fastproto
