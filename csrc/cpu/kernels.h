// SPDX-License-Identifier: Apache-2.0
// The table of CPU kernels of one instruction set, and the choice among them.
#pragma once

#include <cstdint>

#include "../params.h"

namespace fastproto::cpu {

// Pixels per task. Backward prototype tasks hold at most as many prototypes.
constexpr int64_t kTilePixels = 64;
constexpr int64_t kBlockProtos = 64;

static inline int64_t pixel_tiles(const ProtoAttnShape& s) {
  return (s.pixels + kTilePixels - 1) / kTilePixels;
}

// Rows [begin, end) of `protos`, all of bag `bag`.
struct ProtoBlock {
  int64_t bag;
  int64_t begin;
  int64_t end;
};

// Scratch memory of one worker, in bytes; `backward` needs more panels than forward.
static inline int64_t scratch_bytes(DType dtype, int64_t dim, bool backward) {
  const int64_t item = dtype == DType::kFloat64 ? 8 : 4;
  const int64_t panel = dim * kTilePixels * item, square = kBlockProtos * kTilePixels * item;
  const int64_t stats = 8 * kTilePixels * item;
  // Every piece is rounded up to a cache line.
  return (backward ? 7 * panel + 4 * square : 4 * panel + square) + stats + 16 * 64;
}

// Each entry is one worker's loop: it takes tasks until the queue is empty.
struct KernelTable {
  // Tasks: ((episode*Q + query)*tiles + tile)*K + class.
  void (*forward)(DType, const ProtoAttnFwdParams&, TaskQueue&, void* scratch);
  // Tasks: (episode*Q + query)*tiles + tile; writes grad_feat and grad_temperature_parts[task].
  void (*backward_feat)(DType, const ProtoAttnBwdParams&, TaskQueue&, void* scratch);
  // Tasks: entries of `blocks`; writes grad_protos rows [begin, end) of one bag each.
  void (*backward_protos)(DType, const ProtoAttnBwdParams&, const ProtoBlock*, TaskQueue&,
                          void* scratch);
  int64_t (*fma_loop)(int64_t rounds, float* sum);
};

enum class Level : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// Best level of this CPU that was compiled in, or the one FASTPROTO_CPU_LEVEL asks for.
// Throws std::runtime_error when that level is unknown, not compiled in, or not supported here.
Level current_level();
const char* level_name(Level level);
const KernelTable& kernels(Level level);

}  // namespace fastproto::cpu
