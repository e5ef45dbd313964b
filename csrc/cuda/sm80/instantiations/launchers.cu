// SPDX-License-Identifier: Apache-2.0
// The launchers of csrc/cuda/kernels.h: a switch over the type.
#include "../launch.cuh"

namespace fastproto::cuda::sm80 {

template const char* launch_proto_stats_of<float>(const ForwardParams&, void*);
template const char* launch_proto_stats_of<bf16>(const ForwardParams&, void*);
template const char* launch_proto_stats_of<half>(const ForwardParams&, void*);

constexpr const char* kUnknownType = "sm80: found a type that is not compiled";

const char* launch_proto_stats(const ForwardParams& p, DType dtype, void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_proto_stats_of<float>(p, stream);
    case DType::kBFloat16:
      return launch_proto_stats_of<bf16>(p, stream);
    case DType::kFloat16:
      return launch_proto_stats_of<half>(p, stream);
    default:
      return kUnknownType;
  }
}

const char* launch_forward(const ForwardParams& p, DType dtype, const ForwardPlan& plan,
                           void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_forward_type<float>(p, plan, stream);
    case DType::kBFloat16:
      return launch_forward_type<bf16>(p, plan, stream);
    case DType::kFloat16:
      return launch_forward_type<half>(p, plan, stream);
    default:
      return kUnknownType;
  }
}

const char* launch_backward_query(const BackwardParams& p, DType dtype, const BackwardPlan& plan,
                                  void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_backward_query_type<float>(p, plan, stream);
    case DType::kBFloat16:
      return launch_backward_query_type<bf16>(p, plan, stream);
    case DType::kFloat16:
      return launch_backward_query_type<half>(p, plan, stream);
    default:
      return kUnknownType;
  }
}

const char* launch_backward_protos(const BackwardParams& p, DType dtype, const BackwardPlan& plan,
                                   void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_backward_protos_type<float>(p, plan, stream);
    case DType::kBFloat16:
      return launch_backward_protos_type<bf16>(p, plan, stream);
    case DType::kFloat16:
      return launch_backward_protos_type<half>(p, plan, stream);
    default:
      return kUnknownType;
  }
}

}  // namespace fastproto::cuda::sm80
