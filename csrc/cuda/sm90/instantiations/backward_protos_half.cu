// SPDX-License-Identifier: Apache-2.0
#include "../backward_protos.cuh"

namespace fastproto::cuda::sm90 {
template const char* launch_backward_protos_of<half>(const BackwardParams&, const KernelPlan&,
                                                     void*);
}
