// SPDX-License-Identifier: Apache-2.0
// The kernels for all types, compiled with the flags of the including file.
#pragma once

#include "fma_loop.h"
#include "proto_attention_bwd.h"

namespace fastproto::cpu {
namespace {

constexpr KernelTable make_table() {
  return {
      [](DType dtype, const ProtoAttnFwdParams& p, TaskQueue& queue, void* scratch) {
        with_type(dtype, [&](auto* type) {
          forward<std::remove_pointer_t<decltype(type)>>(p, queue, scratch);
        });
      },
      [](DType dtype, const ProtoAttnBwdParams& p, TaskQueue& queue, void* scratch) {
        with_type(dtype, [&](auto* type) {
          backward_feat<std::remove_pointer_t<decltype(type)>>(p, queue, scratch);
        });
      },
      [](DType dtype, const ProtoAttnBwdParams& p, const ProtoBlock* blocks, TaskQueue& queue,
         void* scratch) {
        with_type(dtype, [&](auto* type) {
          backward_protos<std::remove_pointer_t<decltype(type)>>(p, blocks, queue, scratch);
        });
      },
      fma_loop,
  };
}

}  // namespace
}  // namespace fastproto::cpu
