// SPDX-License-Identifier: Apache-2.0
// The kernels for all types, compiled with the flags of the including file.
#pragma once

#include "fma_loop.h"
#include "proto_attention_bwd.h"

namespace fastproto::cpu {
namespace {

constexpr KernelTable make_table() {
  return {
      [](DType dtype, const ProtoAttnShape& s, Tiling tiling) {
        return with_type(dtype, [&](auto* type) {
          return FwdScratch<AccOf<std::remove_pointer_t<decltype(type)>>>(nullptr, s.dim, tiling)
              .bytes;
        });
      },
      [](DType dtype, const ProtoAttnShape& s, Tiling tiling) {
        return with_type(dtype, [&](auto* type) {
          return BwdScratch<AccOf<std::remove_pointer_t<decltype(type)>>>(nullptr, s.dim, tiling)
              .bytes;
        });
      },
      [](DType dtype, const ProtoAttnFwdParams& p, Tiling tiling, TaskQueue& queue, void* scratch) {
        with_type(dtype, [&](auto* type) {
          forward<std::remove_pointer_t<decltype(type)>>(p, tiling, queue, scratch);
        });
      },
      [](DType dtype, const ProtoAttnBwdParams& p, const BackwardPass& pass, TaskQueue& queue,
         void* scratch) {
        with_type(dtype, [&](auto* type) {
          backward<std::remove_pointer_t<decltype(type)>>(p, pass, queue, scratch);
        });
      },
      fma_loop,
  };
}

}  // namespace
}  // namespace fastproto::cpu
