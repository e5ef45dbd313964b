// SPDX-License-Identifier: Apache-2.0
#include "../launch.cuh"

namespace fastproto::cuda::sm80 {
template const char* launch_backward_protos_type<float>(const BackwardParams&, const KernelPlan&,
                                                        void*);
}
