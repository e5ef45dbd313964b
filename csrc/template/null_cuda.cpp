// SPDX-License-Identifier: Apache-2.0
// Guard, check, allocate, launch: the host side of the template op on CUDA.
#include <cuda_runtime.h>

#include "../api/device.h"
#include "null.h"

namespace fastproto {
namespace {

using torch::stable::Tensor;

Tensor null_cuda(Tensor input) {
  FP_CHECK(input.scalar_type() == torch::headeronly::ScalarType::Float,
           "input: found another dtype; allowed: float32.");
  const cuda::OnDevice device(input);
  const Tensor x = torch::stable::contiguous(input);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  launch_null_kernel(static_cast<const float*>(x.data_ptr()), static_cast<float*>(y.data_ptr()),
                     x.numel(), device.stream());
  const cudaError_t error = cudaGetLastError();
  FP_CHECK(error == cudaSuccess, "null: ", cudaGetErrorString(error));
  return y;
}

}  // namespace
}  // namespace fastproto

STABLE_TORCH_LIBRARY_IMPL(fastproto, CUDA, m) { m.impl("null", TORCH_BOX(&fastproto::null_cuda)); }
