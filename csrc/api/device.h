// SPDX-License-Identifier: Apache-2.0
// The device of a CUDA op's tensors, and what its launches say.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdio>
#include <map>
#include <mutex>

#include "checks.h"

namespace fastproto::cuda {

inline void check_cuda(cudaError_t error) {
  FP_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error), ".");
}

struct Chip {
  int capability, multiprocessors, shared_memory;
};

// The tensor's device is the current one meanwhile.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    check_cuda(cudaGetDevice(&device_));
  }
  void* stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return stream;
  }
  Chip chip() const {
    static std::mutex mutex;
    static std::map<int, Chip> chips;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto known = chips.find(device_);
    if (known != chips.end()) return known->second;
    const auto ask = [this](cudaDeviceAttr attribute) {
      int value = 0;
      check_cuda(cudaDeviceGetAttribute(&value, attribute, device_));
      return value;
    };
    return chips[device_] = {
               10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor),
               ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int device_ = 0;
};

// What a launcher returned. The text is printed as well: torch < 2.13 drops that of what is thrown.
inline void check_launch(const char* error, const char* function, const char* kernel) {
  if (error == nullptr) return;
  std::fprintf(stderr, "fastproto: %s: %s kernel: %s\n", function, kernel, error);
  STD_TORCH_CHECK(false, function, ": ", kernel, " kernel: ", error, ".");
}

}  // namespace fastproto::cuda
