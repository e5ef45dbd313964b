// SPDX-License-Identifier: Apache-2.0
// The device of a CUDA op's tensors, and what its launches say. With FASTPROTO_EMULATE the CPU.
#pragma once

#ifndef FASTPROTO_EMULATE
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include <cstdio>

#include "checks.h"

namespace fastproto::cuda {

#ifdef FASTPROTO_EMULATE

struct OnDevice {
  explicit OnDevice(const torch::stable::Tensor&) {}
  void* stream() const { return nullptr; }
};

#else

// The tensor's device is the current one meanwhile.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(tensor.get_device_index()) {}
  void* stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return stream;
  }

 private:
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

#endif

// What a launcher returned. The text is printed as well: torch < 2.13 drops that of what is thrown.
inline void check_launch(const char* error, const char* function, const char* kernel) {
  if (error == nullptr) return;
  std::fprintf(stderr, "fastproto: %s: %s kernel: %s\n", function, kernel, error);
  STD_TORCH_CHECK(false, function, ": ", kernel, " kernel: ", error, ".");
}

}  // namespace fastproto::cuda
