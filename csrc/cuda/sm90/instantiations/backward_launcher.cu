// SPDX-License-Identifier: Apache-2.0
// The backward launchers of csrc/cuda/kernels.h.
#include "../../dispatch.h"
#include "../../kernels.h"
#include "../backward.h"

namespace fastproto::cuda::sm90 {

extern template const char* launch_backward_query_of<bf16>(const BackwardParams&, const KernelPlan&,
                                                           void*);
extern template const char* launch_backward_query_of<half>(const BackwardParams&, const KernelPlan&,
                                                           void*);
extern template const char* launch_backward_protos_of<bf16>(const BackwardParams&,
                                                            const KernelPlan&, void*);
extern template const char* launch_backward_protos_of<half>(const BackwardParams&,
                                                            const KernelPlan&, void*);

namespace {
constexpr const char* kUnknownRows =
    "sm90: found rows that are no multiples of 16 bytes, or maps of two layouts";
}  // namespace

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
