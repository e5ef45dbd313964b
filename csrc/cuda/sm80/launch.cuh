// SPDX-License-Identifier: Apache-2.0
// From a plan to the template it names, for one type: what instantiations/*.cu are made of.
#pragma once

#include <type_traits>

#include "../kernels.h"
#include "backward_protos.cuh"
#include "backward_query.cuh"
#include "forward.cuh"
#include "proto_stats.cuh"

namespace fastproto::cuda::sm80 {

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// launch(channels, rows, slices) of what is compiled: 16 rows with all slices or one, and of half
// types kMostRows with one.
template <class T, int kMostRows, class Launch>
const char* with_tile(const KernelPlan& plan, int rows, const Launch& launch) {
  const auto with_dim = [&](auto dim) -> const char* {
    constexpr int kSlices = most_slices(decltype(dim)::value);
    if (rows == 16 && plan.slices == kSlices)
      return launch(dim, Constant<16>(), Constant<kSlices>());
    if (rows == 16 && plan.slices == 1) return launch(dim, Constant<16>(), Constant<1>());
    if constexpr (sizeof(T) == 2 && kMostRows > 16)
      if (rows == kMostRows && plan.slices == 1)
        return launch(dim, Constant<kMostRows>(), Constant<1>());
    return "sm80: found a plan whose tile is not compiled";
  };
  return plan.dim == 256 ? with_dim(Constant<256>()) : with_dim(Constant<512>());
}

template <class T>
const char* launch_forward_type(const ForwardParams& p, const KernelPlan& plan, void* stream) {
  return with_tile<T, 64>(plan, plan.tile_m, [&](auto dim, auto rows, auto slices) {
    using Traits = ForwardTraits<T, dim(), rows(), slices()>;
    const Grid grid{plan.blocks, kThreads, Traits::shared_bytes(plan.stages), 1, stream};
    return launch<forward_kernel<Traits>>(grid, p, plan.stages);
  });
}

template <class T>
const char* launch_backward_query_type(const BackwardParams& p, const KernelPlan& plan,
                                       void* stream) {
  return with_tile<T, 16>(plan, plan.tile_m, [&](auto dim, auto, auto slices) {
    using Traits = BackwardQueryTraits<T, dim(), slices()>;
    const Grid grid{plan.blocks, kThreads, Traits::shared_bytes(plan.stages), 1, stream};
    return launch<backward_query_kernel<Traits>>(grid, p, plan.stages);
  });
}

template <class T>
const char* launch_backward_protos_type(const BackwardParams& p, const KernelPlan& plan,
                                        void* stream) {
  return with_tile<T, 32>(plan, plan.tile_n, [&](auto dim, auto rows, auto slices) {
    using Traits = BackwardProtosTraits<T, dim(), rows(), slices()>;
    const Grid grid{plan.blocks, kThreads, Traits::kSharedBytes, 1, stream};
    return launch<backward_protos_kernel<Traits>>(grid, p);
  });
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
