// SPDX-License-Identifier: Apache-2.0
// From a plan to the template it names, for one type: what instantiations/*.cu are made of.
#pragma once

#include "../kernels.h"
#include "backward_protos.cuh"
#include "backward_query.cuh"
#include "forward.cuh"
#include "proto_stats.cuh"

namespace fastproto::cuda::sm80 {

constexpr const char* kUnknownPlan = "sm80: found a plan whose tile is not compiled";

template <class T, int kDim>
const char* launch_forward_dim(const ForwardParams& p, const KernelPlan& plan, void* stream) {
  constexpr int kSlices = most_slices(kDim);
  if (plan.tile_m == 16 && plan.slices == kSlices)
    return launch_forward_of<ForwardTraits<T, kDim, 16, kSlices>>(p, plan.stages, stream);
  if (plan.tile_m == 16 && plan.slices == 1)
    return launch_forward_of<ForwardTraits<T, kDim, 16, 1>>(p, plan.stages, stream);
  if constexpr (sizeof(T) == 2)
    if (plan.tile_m == 64 && plan.slices == 1)
      return launch_forward_of<ForwardTraits<T, kDim, 64, 1>>(p, plan.stages, stream);
  return kUnknownPlan;
}

template <class T>
const char* launch_forward_type(const ForwardParams& p, const KernelPlan& plan, void* stream) {
  return plan.dim == 256   ? launch_forward_dim<T, 256>(p, plan, stream)
         : plan.dim == 512 ? launch_forward_dim<T, 512>(p, plan, stream)
                           : kUnknownPlan;
}

template <class T, int kDim>
const char* launch_backward_query_dim(const BackwardParams& p, const KernelPlan& plan,
                                      void* stream) {
  constexpr int kSlices = most_slices(kDim);
  if (plan.tile_m == 16 && plan.slices == kSlices)
    return launch_backward_query_of<BackwardQueryTraits<T, kDim, kSlices>>(p, plan.stages, stream);
  if (plan.tile_m == 16 && plan.slices == 1)
    return launch_backward_query_of<BackwardQueryTraits<T, kDim, 1>>(p, plan.stages, stream);
  return kUnknownPlan;
}

template <class T>
const char* launch_backward_query_type(const BackwardParams& p, const KernelPlan& plan,
                                       void* stream) {
  return plan.dim == 256   ? launch_backward_query_dim<T, 256>(p, plan, stream)
         : plan.dim == 512 ? launch_backward_query_dim<T, 512>(p, plan, stream)
                           : kUnknownPlan;
}

template <class T, int kDim>
const char* launch_backward_protos_dim(const BackwardParams& p, const KernelPlan& plan,
                                       void* stream) {
  constexpr int kSlices = most_slices(kDim);
  if (plan.tile_n == 16 && plan.slices == kSlices)
    return launch_backward_protos_of<BackwardProtosTraits<T, kDim, 16, kSlices>>(p, stream);
  if (plan.tile_n == 16 && plan.slices == 1)
    return launch_backward_protos_of<BackwardProtosTraits<T, kDim, 16, 1>>(p, stream);
  if constexpr (sizeof(T) == 2)
    if (plan.tile_n == 32 && plan.slices == 1)
      return launch_backward_protos_of<BackwardProtosTraits<T, kDim, 32, 1>>(p, stream);
  return kUnknownPlan;
}

template <class T>
const char* launch_backward_protos_type(const BackwardParams& p, const KernelPlan& plan,
                                        void* stream) {
  return plan.dim == 256   ? launch_backward_protos_dim<T, 256>(p, plan, stream)
         : plan.dim == 512 ? launch_backward_protos_dim<T, 512>(p, plan, stream)
                           : kUnknownPlan;
}

#define FP_DECLARE(T)                                                                         \
  extern template const char* launch_proto_stats_of<T>(const ForwardParams&, void*);          \
  extern template const char* launch_forward_type<T>(const ForwardParams&, const KernelPlan&, \
                                                     void*);                                  \
  extern template const char* launch_backward_query_type<T>(const BackwardParams&,            \
                                                            const KernelPlan&, void*);        \
  extern template const char* launch_backward_protos_type<T>(const BackwardParams&,           \
                                                             const KernelPlan&, void*);
FP_DECLARE(float)
FP_DECLARE(bf16)
FP_DECLARE(half)
#undef FP_DECLARE

}  // namespace fastproto::cuda::sm80
