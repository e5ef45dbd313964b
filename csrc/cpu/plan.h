// SPDX-License-Identifier: Apache-2.0
// How a problem is cut into tasks: pure functions of its sizes and the number of threads. The
// number of threads never changes a bit of the result.
#pragma once

#include "../params.h"

namespace fastproto::cpu {

using Problem = ProblemOf<int64_t, double>;

// Rows of a block of prototypes.
constexpr int64_t kBlockProtos = 64;
// Pixels of the widest strip.
constexpr int64_t kMostPixels = 64;

// A task's pixels: `strips` runs of `width` pixels of one image.
struct Tiling {
  int64_t width;
  int64_t strips;

  int64_t pixels() const { return width * strips; }
  int64_t tiles(const Problem& s) const { return (s.pixels + pixels() - 1) / pixels(); }
};

// Pixels of a strip whose panels fit in the second-level cache and in the promised MiB: 64 for
// D = 512 in float32. `item` is the bytes of a number in the panels.
static inline int64_t most_pixels(const Problem& s, int64_t item) {
  int64_t width = kMostPixels;
  while (width > 16 && width * s.dim * item > kMostPixels * 512 * 4) width /= 2;
  return width;
}

// Forward: the cut whose slowest thread has least to do. A task is a tile and one bag.
static inline Tiling plan_forward(const Problem& s, int64_t threads, int64_t item) {
  // Narrow strips do fewer multiply-adds per load; every task prepares the prototypes again, which
  // takes as long as some pixels more.
  struct Candidate {
    Tiling tiling;
    double cost_per_pixel;
  };
  constexpr Candidate kAll[] = {{{64, 2}, 1.0}, {{64, 1}, 1.0}, {{32, 1}, 1.2}, {{16, 1}, 1.5}};
  constexpr double kPrepare = 8;
  Tiling best{16, 1};
  double best_cost = -1;
  for (const Candidate& c : kAll) {
    if (c.tiling.width > most_pixels(s, item)) continue;
    const int64_t tasks = s.episodes * s.queries * c.tiling.tiles(s) * s.ways;
    const int64_t pixels = s.pixels < c.tiling.pixels() ? s.pixels : c.tiling.pixels();
    const double cost =
        double((tasks + threads - 1) / threads) * (double(pixels) * c.cost_per_pixel + kPrepare);
    if (best_cost < 0 || cost < best_cost) {
      best = c.tiling;
      best_cost = cost;
    }
  }
  return best;
}

// Backward: the order of its sums hangs on the cut, so the threads have no say in it.
static inline Tiling plan_backward(const Problem& s, int64_t item) {
  return {most_pixels(s, item), 1};
}

// Rows of a block in the backward: few enough blocks to be efficient, enough for the threads to
// take turns at (proto_attention_bwd.h).
static inline int64_t backward_block_rows(const Problem& s) {
  const int64_t rows = s.total / s.episodes;
  return rows >= 256 ? 64 : rows >= 64 ? 32 : 16;
}

}  // namespace fastproto::cpu
