// SPDX-License-Identifier: Apache-2.0
#include "../common/pack.cuh"

namespace fastproto::cuda {

const char* launch_pack(const PackParams& params, DType dtype, void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_pack_of<float>(params, stream);
    case DType::kBFloat16:
      return launch_pack_of<bf16>(params, stream);
    case DType::kFloat16:
      return launch_pack_of<half>(params, stream);
    default:
      return "no kernel for this dtype";
  }
}

const char* launch_pack_backward(const PackBackwardParams& params, DType dtype, void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_pack_backward_of<float>(params, stream);
    case DType::kBFloat16:
      return launch_pack_backward_of<bf16>(params, stream);
    case DType::kFloat16:
      return launch_pack_backward_of<half>(params, stream);
    default:
      return "no kernel for this dtype";
  }
}

}  // namespace fastproto::cuda
