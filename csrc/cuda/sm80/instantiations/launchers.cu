// SPDX-License-Identifier: Apache-2.0
// The launchers of csrc/cuda/kernels.h: a switch over the type.
#include "../../dispatch.h"
#include "../launch.cuh"

namespace fastproto::cuda::sm80 {

template const char* launch_proto_stats_of<float>(const ForwardParams&, void*);
template const char* launch_proto_stats_of<bf16>(const ForwardParams&, void*);
template const char* launch_proto_stats_of<half>(const ForwardParams&, void*);

const char* launch_proto_stats(const ForwardParams& p, DType dtype, void* stream) {
  return with_type<float, bf16, half>(dtype, [&](auto tag) {
    return launch_proto_stats_of<typename decltype(tag)::type>(p, stream);
  });
}

const char* launch_forward(const ForwardParams& p, DType dtype, const KernelPlan& plan,
                           void* stream) {
  return with_type<float, bf16, half>(dtype, [&](auto tag) {
    return launch_forward_type<typename decltype(tag)::type>(p, plan, stream);
  });
}

const char* launch_backward_query(const BackwardParams& p, DType dtype, const KernelPlan& plan,
                                  void* stream) {
  return with_type<float, bf16, half>(dtype, [&](auto tag) {
    return launch_backward_query_type<typename decltype(tag)::type>(p, plan, stream);
  });
}

const char* launch_backward_protos(const BackwardParams& p, DType dtype, const KernelPlan& plan,
                                   void* stream) {
  return with_type<float, bf16, half>(dtype, [&](auto tag) {
    return launch_backward_protos_type<typename decltype(tag)::type>(p, plan, stream);
  });
}

}  // namespace fastproto::cuda::sm80
