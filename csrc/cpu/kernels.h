// SPDX-License-Identifier: Apache-2.0
// The table of CPU kernels of one instruction set, and the choice among them.
#pragma once

#include <cstdint>

#include "../params.h"
#include "plan.h"

namespace fastproto::cpu {

// What one run over the tasks of the backward computes. Prototypes [begin, end) of `protos` get
// their gradient; begin == end: none does.
struct BackwardPass {
  Tiling tiling;
  bool want_feat;  // writes grad_feat and grad_temperature_parts[task]
  int64_t begin;
  int64_t end;
  void* sums;     // [end - begin, D] of Acc; grad_protos itself where that is of type Acc
  void* along;    // [end - begin] of Acc
  int32_t* done;  // [tasks] zeros: blocks whose gradient a task has added to `sums`
};

// Each entry is one worker's loop: it takes tasks until the queue is empty.
struct KernelTable {
  // Scratch memory of one worker, in bytes.
  int64_t (*forward_scratch)(DType, const ProtoAttnShape&, Tiling);
  int64_t (*backward_scratch)(DType, const ProtoAttnShape&, Tiling);
  // Tasks: ((episode*Q + query)*tiles + tile)*K + class.
  void (*forward)(DType, const ProtoAttnFwdParams&, Tiling, TaskQueue&, void* scratch);
  // Tasks: (episode*Q + query)*tiles + tile.
  void (*backward)(DType, const ProtoAttnBwdParams&, const BackwardPass&, TaskQueue&,
                   void* scratch);
  int64_t (*fma_loop)(int64_t rounds, float* sum);
};

enum class Level : int { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// Best level of this CPU that was compiled in, or the one FASTPROTO_CPU_LEVEL asks for.
// Throws std::runtime_error when that level is unknown, not compiled in, or not supported here.
Level current_level();
const char* level_name(Level level);
const KernelTable& kernels(Level level);

}  // namespace fastproto::cpu
