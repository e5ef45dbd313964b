// SPDX-License-Identifier: Apache-2.0
#include "../forward.cuh"

namespace fastproto::cuda::sm90 {
template const char* launch_forward<half>(const ForwardParams&, int, void*);
}  // namespace fastproto::cuda::sm90
