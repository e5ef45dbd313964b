// SPDX-License-Identifier: Apache-2.0
// The one switch between a GPU and its emulation on the CPU. Kernels include this and nothing of
// CUDA's or torch's; compiled by nvcc they see ptx.cuh, by a C++ compiler with FASTPROTO_EMULATE
// the same names from csrc/cuda/emulator, which runs every lane of a grid on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef FASTPROTO_EMULATE
#include "../emulator/cuda.h"
#else
#include <cuda_runtime.h>
#define FP_DEVICE __device__ __forceinline__
#define FP_KERNEL __global__ void
#define FP_GRID_CONSTANT const __grid_constant__
// For index arithmetic that tests on the CPU call as well.
#define FP_HOST_DEVICE __host__ __device__ __forceinline__
#define FP_UNROLL _Pragma("unroll")
#define FP_NO_UNROLL _Pragma("unroll 1")
#endif

namespace fastproto::cuda {

// Two-byte floats by their bits: the same type on a GPU and in its emulation.
struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

}  // namespace fastproto::cuda

#ifdef FASTPROTO_EMULATE
#include "../emulator/primitives.h"
#else
#include "ptx.cuh"
#endif
