// SPDX-License-Identifier: Apache-2.0
// What csrc/cuda/common/platform.h takes with FASTPROTO_EMULATE instead of instructions and CUDA's
// launch: the same names, run by every thread of a grid on the CPU.
#pragma once

#include "run.h"
#include "wgmma.h"

namespace fastproto::cuda {

using namespace emulator;

template <auto Kernel, class... Params>
const char* launch(const Grid& grid, const Params&... params) {
  return run(grid.blocks, grid.threads, grid.cluster, grid.shared_bytes,
             [&] { Kernel(params...); });
}

}  // namespace fastproto::cuda
