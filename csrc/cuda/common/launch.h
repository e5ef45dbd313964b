// SPDX-License-Identifier: Apache-2.0
// From the host: launching a kernel, describing a tensor to TMA. Everything returns an error text
// (null: none), which csrc/api turns into an exception.
#pragma once

#include <cuda.h>

#include <atomic>

#include "platform.h"

namespace fastproto::cuda {

// Blocks start in clusters of `cluster` neighbours. The kernel may use grid.shared_bytes of dynamic
// shared memory; the permission is asked for once per device and kernel.
template <auto Kernel, class... Params>
const char* launch(const Grid& grid, const Params&... params) {
  if (grid.blocks == 0) return nullptr;
  static std::atomic<int> allowed[64];  // bytes, by device
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && (device >= 64 || allowed[device].load() < grid.shared_bytes)) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(Kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes);
    if (error == cudaSuccess && device < 64) allowed[device].store(grid.shared_bytes);
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(grid.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = {unsigned(grid.blocks), 1, 1};
  config.blockDim = {unsigned(grid.threads), 1, 1};
  config.dynamicSmemBytes = size_t(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(grid.stream);
  config.attrs = &attribute;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, Kernel, params...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Sizes and boxes innermost first; strides in bytes, of dimensions 1 and up. 128-byte swizzle (the
// box is 128 bytes wide at most), zeros outside. The driver's function is looked up at run time:
// the library links no driver.
inline const char* make_tensor_map(TensorMap* map, MapType type, int rank, const void* data,
                                   const uint64_t* sizes, const uint64_t* strides,
                                   const uint32_t* box) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<Encode>(function)
               : nullptr;
  }();
  if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled (CUDA 12.0)";
  const uint32_t steps[5] = {1, 1, 1, 1, 1};
  const auto run = [&] {
    return encode(reinterpret_cast<CUtensorMap*>(map),
                  type == MapType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                  cuuint32_t(rank), const_cast<void*>(data), sizes, strides, box, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = run();
  if (result != CUDA_SUCCESS) {
    // The driver wants a current context. A thread that has only set its device may have none, as
    // torch's threads of the backward: this makes the device's own current.
    int device = 0;
    if (cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess)
      result = run();
  }
  if (result == CUDA_SUCCESS) return nullptr;
  if (result == CUDA_ERROR_INVALID_VALUE) return "cuTensorMapEncodeTiled refused a tensor";
  // Not about the tensor: an earlier kernel's failure, say. The numbers are those of the runtime.
  return cudaGetErrorString(cudaError_t(result));
}

}  // namespace fastproto::cuda
