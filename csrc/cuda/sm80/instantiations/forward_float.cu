// SPDX-License-Identifier: Apache-2.0
#include "../launch.cuh"

namespace fastproto::cuda::sm80 {
template const char* launch_forward_type<float>(const ForwardParams&, const KernelPlan&, void*);
}
