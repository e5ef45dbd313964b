// SPDX-License-Identifier: Apache-2.0
#include "../forward.cuh"
#include "../forward_latency.cuh"

namespace fastproto::cuda::sm90 {
template const char* launch_forward_of<half>(const ForwardParams&, int, void*);
template const char* launch_forward_latency_of<half>(const ForwardParams&, int, void*);
}  // namespace fastproto::cuda::sm90
