// SPDX-License-Identifier: Apache-2.0
#include "../common/pack.cuh"
#include "../dispatch.h"

namespace fastproto::cuda {

const char* launch_pack(const PackParams& params, DType dtype, void* stream) {
  return with_type<float, bf16, half>(dtype, [&](auto tag) {
    return launch_pack_of<typename decltype(tag)::type>(params, stream);
  });
}

const char* launch_pack_backward(const PackBackwardParams& params, DType dtype, void* stream) {
  return with_type<float, bf16, half>(dtype, [&](auto tag) {
    return launch_pack_backward_of<typename decltype(tag)::type>(params, stream);
  });
}

}  // namespace fastproto::cuda
