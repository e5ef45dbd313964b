// SPDX-License-Identifier: Apache-2.0
#include "../launch.cuh"

namespace fastproto::cuda::sm80 {
template const char* launch_forward_type<bf16>(const ForwardParams&, const KernelPlan&, void*);
}
