// SPDX-License-Identifier: Apache-2.0
// Which kernels a problem runs with: a pure function of sizes and chip. The number of prototypes
// has no say beyond the rows of `protos`, which is all that the host knows of it.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "../params.h"

namespace fastproto::cuda {

enum class Kernel : int { kNone, kSm80Latency, kSm80Throughput, kSm90Latency, kSm90Throughput };

inline const char* kernel_name(Kernel kernel) {
  switch (kernel) {
    case Kernel::kSm80Latency:
      return "sm80 latency";
    case Kernel::kSm80Throughput:
      return "sm80 throughput";
    case Kernel::kSm90Latency:
      return "sm90 latency";
    case Kernel::kSm90Throughput:
      return "sm90 throughput";
    default:
      return "none";
  }
}

// What the choice may depend on.
struct Request {
  int capability;  // 10 * major + minor
  int multiprocessors;
  int shared_memory;  // bytes that a block may have
  DType dtype;
  int64_t episodes, queries, ways, dim, pixels;
  int64_t total;  // rows of `protos`
  bool save;      // whether a backward follows
  bool tma_ok;    // every tensor starts and steps in multiples of 16 bytes
};

// One launch.
struct KernelPlan {
  Kernel kernel = Kernel::kNone;
  int tile_m = 0;  // pixels of a tile
  int tile_n = 0;  // prototypes of a tile
  int slices = 1;  // blocks that share the channels of a tile's result
  int cluster = 1;
  int blocks = 0;
  int threads = 0;
  int shared_bytes = 0;
};
using ForwardPlan = KernelPlan;
using BackwardPlan = KernelPlan;

struct Plan {
  std::string error;  // why there is none; empty: there is
  KernelPlan stats;   // kNone: the forward computes the statistics of prototypes on its way
  KernelPlan forward;
  KernelPlan backward_query;
  KernelPlan backward_protos;
};

constexpr int kMaxDim = 512;

}  // namespace fastproto::cuda
