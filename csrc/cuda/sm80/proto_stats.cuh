// SPDX-License-Identifier: Apache-2.0
// Mean and reciprocal norm of every prototype, a warp each: one read of P at memory speed.
// Budget: 8 warps, no shared memory, few registers; bytes = N_total D.
#pragma once

#include "tiles.cuh"

namespace fastproto::cuda::sm80 {

template <class T>
FP_KERNEL proto_stats_kernel(FP_GRID_CONSTANT ForwardParams p) {
  const int row = block_index() * kWarps + warp_index();
  const Problem& problem = p.problem;
  if (row >= problem.total) return;
  const T* proto = static_cast<const T*>(p.protos) + int64_t(row) * problem.dim;
  const float first = to_float(proto[0]);
  RowSums sums;
  for (int d = lane_index(); d < problem.dim; d += 32) sums.add(to_float(proto[d]) - first);
  FP_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    sums.total += shuffle_xor(sums.total, mask);
    sums.squares += shuffle_xor(sums.squares, mask);
  }
  const RowStatistics found = row_statistics(first, sums, problem.dim, problem.eps);
  if (lane_index() == 0) {
    p.statistics.protos[row] = found.mean;
    p.statistics.protos[problem.total + row] = found.rnorm;
  }
}

template <class T>
const char* launch_proto_stats_of(const ForwardParams& p, void* stream) {
  const int blocks = (p.problem.total + kWarps - 1) / kWarps;
  return launch<proto_stats_kernel<T>>(Grid{blocks, kThreads, 0, 1, stream}, p);
}

}  // namespace fastproto::cuda::sm80
