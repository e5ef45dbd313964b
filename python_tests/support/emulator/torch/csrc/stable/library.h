// SPDX-License-Identifier: Apache-2.0
// Found before torch's header of this name, which it changes: what csrc registers for CUDA becomes
// ops of CPU tensors in a library of its own, which have no device to guard and no stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include_next <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) \
  _STABLE_TORCH_LIBRARY_IMPL(fastproto_emulated, CPU, m, C10_UID)

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(DeviceIndex) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard NoGuard

inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
