// SPDX-License-Identifier: Apache-2.0
// What kernels are written in, and the one switch between a GPU and its emulation on the CPU:
// compiled by nvcc they see ptx.cuh, hopper.cuh and launch.h, by a C++ compiler with
// FASTPROTO_EMULATE the same names (and CUDA's keywords) from python_tests/support/emulator.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#define FP_DEVICE __device__ __forceinline__
#define FP_KERNEL __global__ void
#define FP_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define FP_GRID_CONSTANT const __grid_constant__
// For index arithmetic that tests on the CPU call as well.
#define FP_HOST_DEVICE __host__ __device__ __forceinline__
#define FP_UNROLL _Pragma("unroll")
#define FP_NO_UNROLL _Pragma("unroll 1")

namespace fastproto::cuda {

// Two-byte floats by their bits: the same type on a GPU and in its emulation.
struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};
struct alignas(16) Vector16 {
  uint32_t x[4];
};

// An mbarrier, in shared memory.
struct Barrier {
  uint64_t state;
};
// A CUtensorMap, made by make_tensor_map in launch.h; a kernel parameter (__grid_constant__).
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};
// Which type a tensor map moves; both have two bytes.
enum class MapType : int { kBFloat16, kFloat16 };

struct Grid {
  int blocks;
  int threads;
  int shared_bytes;
  int cluster = 1;
  void* stream = nullptr;  // a cudaStream_t
};

}  // namespace fastproto::cuda

#ifdef FASTPROTO_EMULATE
#include <emulator.h>
#else
#include "hopper.cuh"
#include "launch.h"
#include "ptx.cuh"
#endif
