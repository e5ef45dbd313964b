// SPDX-License-Identifier: Apache-2.0
#include "../launch.cuh"

namespace fastproto::cuda::sm80 {
template const char* launch_backward_query_type<half>(const BackwardParams&, const KernelPlan&,
                                                      void*);
}
