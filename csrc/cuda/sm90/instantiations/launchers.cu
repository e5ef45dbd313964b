// SPDX-License-Identifier: Apache-2.0
// The launchers of csrc/cuda/kernels.h: a switch over the type.
#include "../../dispatch.h"
#include "../../kernels.h"
#include "../backward.h"

namespace fastproto::cuda::sm90 {

#define FP_DECLARE(T)                                                                         \
  extern template const char* launch_forward_of<T>(const ForwardParams&, int, void*);         \
  extern template const char* launch_forward_latency_of<T>(const ForwardParams&, int, void*); \
  extern template const char* launch_backward_query_of<T>(const BackwardParams&,              \
                                                          const KernelPlan&, void*);          \
  extern template const char* launch_backward_protos_of<T>(const BackwardParams&,             \
                                                           const KernelPlan&, void*);
FP_DECLARE(bf16)
FP_DECLARE(half)
#undef FP_DECLARE

namespace {
constexpr const char* kUnknownRows =
    "sm90: found rows that are no multiples of 16 bytes, maps of two layouts, or no statistics of "
    "the prototypes";
}  // namespace

const char* launch_forward(const ForwardParams& p, DType dtype, const KernelPlan& plan,
                           void* stream) {
  const bool latency = plan.kernel == Kernel::kSm90Latency;
  if (latency ? !forward_latency_applies(p) : !forward_applies(p)) return kUnknownRows;
  return with_type<bf16, half>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return latency ? launch_forward_latency_of<T>(p, plan.blocks, stream)
                   : launch_forward_of<T>(p, plan.blocks, stream);
  });
}

const char* launch_backward_query(const BackwardParams& p, DType dtype, const KernelPlan& plan,
                                  void* stream) {
  if (!backward_query_applies(p)) return kUnknownRows;
  return with_type<bf16, half>(dtype, [&](auto tag) {
    return launch_backward_query_of<typename decltype(tag)::type>(p, plan, stream);
  });
}

const char* launch_backward_protos(const BackwardParams& p, DType dtype, const KernelPlan& plan,
                                   void* stream) {
  if (!backward_protos_applies(p)) return kUnknownRows;
  return with_type<bf16, half>(dtype, [&](auto tag) {
    return launch_backward_protos_of<typename decltype(tag)::type>(p, plan, stream);
  });
}

}  // namespace fastproto::cuda::sm90
