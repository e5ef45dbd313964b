// SPDX-License-Identifier: Apache-2.0
// Every launcher of the CUDA library. `stream` is a cudaStream_t; the device is the current one.
// Each returns an error text, or null.
//
// What they may count on: all maps of one call have one layout, either NCHW (the pixel stride is 1)
// or channels_last (the channel stride is 1); D <= kMaxDim; one image lies within 32-bit offsets;
// there is at least one image, class and pixel. `protos` may have no rows, and then be null.
// Nothing is aligned to more than an element but where Request::tma_ok says so, which sm90 asks
// for.
#pragma once

#include "../params.h"
#include "params.h"
#include "plan.h"

namespace fastproto::cuda {

namespace sm80 {
// Fills statistics.protos.
const char* launch_proto_stats(const ForwardParams& params, DType dtype, void* stream);
const char* launch_forward(const ForwardParams& params, DType dtype, const KernelPlan& plan,
                           void* stream);
const char* launch_backward_query(const BackwardParams& params, DType dtype, const KernelPlan& plan,
                                  void* stream);
const char* launch_backward_protos(const BackwardParams& params, DType dtype,
                                   const KernelPlan& plan, void* stream);
}  // namespace sm80

namespace sm90 {
// kSm90Throughput and kSm90Latency.
const char* launch_forward(const ForwardParams& params, DType dtype, const KernelPlan& plan,
                           void* stream);
const char* launch_backward_query(const BackwardParams& params, DType dtype, const KernelPlan& plan,
                                  void* stream);
const char* launch_backward_protos(const BackwardParams& params, DType dtype,
                                   const KernelPlan& plan, void* stream);
}  // namespace sm90

}  // namespace fastproto::cuda
