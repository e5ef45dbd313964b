// SPDX-License-Identifier: Apache-2.0
// What csrc takes from CUDA's header of this name, for a C++ compiler: keywords that say nothing,
// and a device whose number is its capability, 90 (an H200) unless the environment asks for
// another.
#pragma once

#include <cmath>
#include <cstdlib>

#define __device__
#define __host__
#define __global__ inline
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDevice(int* device) {
  const char* asked = std::getenv("FASTPROTO_EMULATE_CAPABILITY");
  *device = asked != nullptr ? std::atoi(asked) : 90;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const bool hopper = device == 90;
  const int values[] = {device / 10, device % 10, hopper ? 132 : 108, (hopper ? 227 : 163) * 1024};
  *value = values[attribute];
  return cudaSuccess;
}
