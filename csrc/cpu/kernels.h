// SPDX-License-Identifier: Apache-2.0
// What a CPU kernel sees, the kernels of one instruction set, and the choice among them.
#pragma once

#include <cstdint>

#include "plan.h"

namespace fastproto::cpu {

struct ForwardParams {
  Problem problem;
  Strided feat;            // [E, Q, D, HW]
  const void* protos;      // [N_total, D] contiguous
  const int32_t* offsets;  // [E*K + 1]
  Dense out;               // [E*Q*K, 2D or D, HW]
  // For the backward, in float (double for float64); null where not wanted.
  Dense agg;    // [E*Q*K, D, HW] Gc = G - mean, centred: <dO, G> would lose digits to the mean
  void* stats;  // [E*Q*K, 3, HW] bound (of c/t) and 1/sum of the softmax, mean taken out of G
};

struct BackwardParams {
  Problem problem;
  Strided feat;
  const void* protos;
  const int32_t* offsets;
  Dense grad_out;                  // [E*Q*K, 2D or D, HW]
  Dense agg;                       // [E*Q*K, D, HW]
  const void* stats;               // [E*Q*K, 3, HW]
  Dense grad_feat;                 // [E*Q, D, HW]
  void* grad_protos;               // [N_total, D] contiguous, or nullptr: not wanted
  double* grad_temperature_parts;  // [tasks of the feature pass], or nullptr: not wanted
};

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

// Hands out task numbers to the workers of one pass; every task writes its own outputs, so the
// result does not depend on who does what.
struct TaskQueue {
  int64_t next = 0;
  int64_t end = 0;
  int64_t grain = 1;

  // The next run of tasks [*begin, *stop); false when none is left.
  __attribute__((always_inline)) bool take(int64_t* begin, int64_t* stop) {
    *begin = __atomic_fetch_add(&next, grain, __ATOMIC_RELAXED);
    *stop = *begin + grain < end ? *begin + grain : end;
    return *begin < end;
  }
};

// Those of one type.
struct Kernels {
  // Scratch memory of one worker, in bytes.
  int64_t (*forward_scratch)(const Problem&, Tiling);
  int64_t (*backward_scratch)(const Problem&, Tiling);
  // One worker's loop: it takes tasks until the queue is empty. Tasks of the forward are
  // ((episode*Q + query)*tiles + tile)*K + class, of the backward (episode*Q + query)*tiles + tile.
  void (*forward)(const ForwardParams&, Tiling, TaskQueue&, void* scratch);
  void (*backward)(const BackwardParams&, const BackwardPass&, TaskQueue&, void* scratch);
};

struct InstructionSet {
  Kernels kernels[4];  // by DType
  int64_t (*fma_loop)(int64_t rounds, float* sum);
};

enum class Level : int { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// Best level of this CPU that was compiled in, or the one FASTPROTO_CPU_LEVEL asks for.
// Throws std::runtime_error when that level is unknown, not compiled in, or not supported here.
Level current_level();
const char* level_name(Level level);
const InstructionSet& instruction_set(Level level);
const Kernels& kernels(Level level, DType dtype);

}  // namespace fastproto::cpu
