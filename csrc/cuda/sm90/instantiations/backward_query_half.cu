// SPDX-License-Identifier: Apache-2.0
#include "../backward_query.cuh"

namespace fastproto::cuda::sm90 {
template const char* launch_backward_query_of<half>(const BackwardParams&, const KernelPlan&,
                                                    void*);
}
