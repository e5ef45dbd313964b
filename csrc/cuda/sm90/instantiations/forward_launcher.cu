// SPDX-License-Identifier: Apache-2.0
// The forward launcher of csrc/cuda/kernels.h.
#include "../../dispatch.h"
#include "../../kernels.h"
#include "../forward.h"

namespace fastproto::cuda::sm90 {

extern template const char* launch_forward_of<bf16>(const ForwardParams&, int, void*);
extern template const char* launch_forward_of<half>(const ForwardParams&, int, void*);
extern template const char* launch_forward_latency_of<bf16>(const ForwardParams&, int, void*);
extern template const char* launch_forward_latency_of<half>(const ForwardParams&, int, void*);

namespace {

template <class T>
const char* launch_as(const ForwardParams& p, const KernelPlan& plan, void* stream) {
  if (plan.kernel == Kernel::kSm90Latency)
    return forward_latency_applies(p) ? launch_forward_latency_of<T>(p, plan.blocks, stream)
                                      : "sm90: found rows that are no multiples of 16 bytes";
  return forward_applies(p) ? launch_forward_of<T>(p, plan.blocks, stream)
                            : "sm90: found rows that are no multiples of 16 bytes, or no "
                              "statistics of the prototypes";
}

}  // namespace

const char* launch_forward(const ForwardParams& p, DType dtype, const KernelPlan& plan,
                           void* stream) {
  return with_type<bf16, half>(
      dtype, [&](auto tag) { return launch_as<typename decltype(tag)::type>(p, plan, stream); });
}

}  // namespace fastproto::cuda::sm90
