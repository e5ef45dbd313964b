// SPDX-License-Identifier: Apache-2.0
// Supervoxels of a volume: Felzenszwalb and Huttenlocher's graph-based segmentation (2004) in 3-D.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace fastproto::cpu {

struct Supervoxels {
  std::array<int64_t, 3> shape;    // z, y, x
  std::array<double, 3> spacing;   // mm
  double scale;                    // how much contrast a small component forgives: k in the paper
  double exponent;                 // of the distance in an edge's weight, see supervoxels.cpp
  std::vector<int64_t> min_sizes;  // voxels, ascending
};

// `labels` [min_sizes, z, y, x]: components 1..n in the order of their first voxels, for each
// minimum size; 0 where `mask` is false. A component of one minimum size is a union of those of the
// one before. Throws std::invalid_argument.
void supervoxels(const Supervoxels& options, const float* image, const bool* mask, int32_t* labels);

}  // namespace fastproto::cpu
