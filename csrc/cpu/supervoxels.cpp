// SPDX-License-Identifier: Apache-2.0
#include "supervoxels.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>

namespace fastproto::cpu {
namespace {

// An edge is its first voxel and its direction in one number, to hold millions of them.
constexpr int64_t kMaxVoxels = int64_t{1} << 28;
constexpr int kKeys = 1 << 16;
constexpr int64_t kRung = 3;
constexpr size_t kAhead = 16;

struct Direction {
  int64_t dz, dy, dx, offset;
  float factor;
};

// A weight's exponent and the first eight bits of its fraction: its order to within 0.4 %. Without
// the sign, which a NaN (0 * infinity) may have.
uint32_t key_of(float weight) { return std::bit_cast<uint32_t>(weight) << 1 >> 16; }
float weight_of(uint32_t key) { return std::bit_cast<float>(key << 15); }

std::string text(const auto& values) {
  std::string s = "(";
  for (auto v : values) s += (s.size() > 1 ? ", " : "") + std::to_string(v);
  return s + ")";
}

void require(bool fine, const std::string& sentence) {
  if (!fine) throw std::invalid_argument(sentence + ".");
}

void check(const Supervoxels& o) {
  const auto [z, y, x] = o.shape;
  const std::string most = std::to_string(kMaxVoxels);
  require(z >= 1 && y >= 1 && x >= 1 && z <= kMaxVoxels / y / x,
          "image: found shape " + text(o.shape) + "; allowed: 1 to " + most + " voxels");
  for (double s : o.spacing)
    require(s > 0 && std::isfinite(s),
            "spacing: found " + text(o.spacing) + "; allowed: three finite numbers above 0 (mm)");
  require(o.scale >= 0 && std::isfinite(o.scale),
          "scale: found " + std::to_string(o.scale) + "; allowed: a finite number, at least 0");
  require(o.exponent >= 0 && o.exponent <= 4,
          "exponent: found " + std::to_string(o.exponent) + "; allowed: 0 to 4");
  require(!o.min_sizes.empty() && o.min_sizes[0] >= 1 && o.min_sizes.back() <= kMaxVoxels &&
              std::ranges::is_sorted(o.min_sizes),
          "min_sizes: found " + text(o.min_sizes) + "; allowed: whole numbers from 1 to " + most +
              " in ascending order (voxels)");
}

// One of each pair of opposite neighbours. The factor is the edge's length over what it would be on
// a cubic grid of the finest spacing, to the power of `exponent`: 1 everywhere on cubic grids.
std::vector<Direction> directions(const Supervoxels& o) {
  const auto [sz, sy, sx] = o.spacing;
  const double finest = std::min({sz, sy, sx});
  std::vector<Direction> out;
  for (int dz = 0; dz <= 1; ++dz)
    for (int dy = -1; dy <= 1; ++dy)
      for (int dx = -1; dx <= 1; ++dx) {
        if ((dz * 3 + dy) * 3 + dx <= 0) continue;
        const double length = std::hypot(dz * sz, dy * sy, dx * sx);
        const double cubic = finest * std::sqrt(dz * dz + dy * dy + dx * dx);
        out.push_back({dz, dy, dx, (dz * o.shape[1] + dy) * o.shape[2] + dx,
                       static_cast<float>(std::pow(length / cubic, o.exponent))});
      }
  return out;
}

// Calls visit(voxel, direction, key) for every edge within the mask, always in the same order.
void for_each_edge(const Supervoxels& o, const std::vector<Direction>& directions,
                   const float* image, const bool* mask, auto&& visit) {
  const auto [nz, ny, nx] = o.shape;
  for (int64_t z = 0; z < nz; ++z)
    for (int64_t y = 0; y < ny; ++y)
      for (size_t d = 0; d < directions.size(); ++d) {
        const auto& [dz, dy, dx, offset, factor] = directions[d];
        if (z + dz >= nz || y + dy < 0 || y + dy >= ny) continue;
        const int64_t row = (z * ny + y) * nx;
        const int64_t end = row + nx - std::max<int64_t>(dx, 0);
        for (int64_t i = row + std::max<int64_t>(-dx, 0); i < end; ++i)
          if (mask[i] && mask[i + offset])
            visit(static_cast<uint32_t>(i), static_cast<uint32_t>(d),
                  key_of(std::fabs(image[i] - image[i + offset]) * factor));
      }
}

class Forest {
 public:
  explicit Forest(int64_t n) : parent_(n, -1) {}

  void prefetch(int64_t i) const { __builtin_prefetch(&parent_[i]); }
  int32_t root(int32_t i) {
    while (parent_[i] >= 0) {
      const int32_t up = parent_[i];
      if (parent_[up] < 0) return up;
      i = parent_[i] = parent_[up];
    }
    return i;
  }
  int32_t size(int32_t root) const { return -parent_[root]; }
  // Joins two roots and returns the new one.
  int32_t join(int32_t a, int32_t b) {
    if (size(a) < size(b)) std::swap(a, b);
    parent_[a] += parent_[b];
    parent_[b] = a;
    return a;
  }

 private:
  std::vector<int32_t> parent_;  // of a root: its size, negative
};

}  // namespace

void supervoxels(const Supervoxels& o, const float* image, const bool* mask, int32_t* labels) {
  check(o);
  const int64_t voxels = o.shape[0] * o.shape[1] * o.shape[2];
  for (int64_t i = 0; i < voxels; ++i)
    if (mask[i] && !std::isfinite(image[i]))
      throw std::invalid_argument(
          "image: found a NaN or infinite voxel within the mask; allowed: finite numbers.");
  const auto dirs = directions(o);

  // Counting sort. `ends` holds where each key begins, and after filling, where it ends.
  std::vector<size_t> ends(kKeys + 1);
  for_each_edge(o, dirs, image, mask, [&](uint32_t, uint32_t, uint32_t key) { ++ends[key + 1]; });
  for (int key = 0; key < kKeys; ++key) ends[key + 1] += ends[key];
  size_t edges = ends[kKeys];
  const auto sorted = std::make_unique_for_overwrite<uint32_t[]>(edges);
  for_each_edge(o, dirs, image, mask, [&](uint32_t voxel, uint32_t d, uint32_t key) {
    sorted[ends[key]++] = voxel << 4 | d;
  });

  // First pass: join where the edge is no heavier than either side allows, which is at most
  // `scale` above the heaviest that joined. Only edges between components are kept for the passes
  // that follow, in place and in order.
  Forest forest(voxels);
  const auto scale = static_cast<float>(o.scale);
  std::vector<float> allowed(voxels, scale);
  const auto ends_of = [&](size_t at) {
    if (at + kAhead < edges) {
      const uint32_t soon = sorted[at + kAhead];
      forest.prefetch(soon >> 4);
      forest.prefetch((soon >> 4) + dirs[soon & 15].offset);
    }
    const auto i = static_cast<int32_t>(sorted[at] >> 4);
    const auto j = static_cast<int32_t>(i + dirs[sorted[at] & 15].offset);
    return std::pair{forest.root(i), forest.root(j)};
  };
  size_t kept = 0, edge = 0;
  float heaviest = 0;
  for (int key = 0; key < kKeys && weight_of(key) <= heaviest + scale; ++key) {
    const float weight = weight_of(key);
    for (; edge < ends[key]; ++edge) {
      const auto [a, b] = ends_of(edge);
      if (a == b) continue;
      if (weight <= allowed[a] && weight <= allowed[b]) {
        const int32_t joined = forest.join(a, b);
        allowed[joined] = weight + scale / static_cast<float>(forest.size(joined));
        heaviest = weight;
      } else {
        sorted[kept++] = sorted[edge];
      }
    }
  }
  edges = std::copy(sorted.get() + edge, sorted.get() + edges, sorted.get() + kept) - sorted.get();

  // Second pass, from tiny minimum sizes up, each joining what is below it across the lightest
  // edges. In one go, whatever first grew beyond the size would swallow its small neighbours.
  std::vector<int32_t> numbers(voxels);
  int64_t rung = 1;
  for (int64_t min_size : o.min_sizes) {
    do {
      rung = std::min(rung * kRung, min_size);
      kept = 0;
      for (edge = 0; edge < edges; ++edge) {
        const auto [a, b] = ends_of(edge);
        if (a == b) continue;
        if (forest.size(a) < rung || forest.size(b) < rung)
          forest.join(a, b);
        else
          sorted[kept++] = sorted[edge];
      }
      edges = kept;
    } while (rung < min_size);

    std::ranges::fill(numbers, 0);
    int32_t count = 0;
    for (int64_t i = 0; i < voxels; ++i, ++labels) {
      *labels = 0;
      if (!mask[i]) continue;
      int32_t& number = numbers[forest.root(static_cast<int32_t>(i))];
      if (number == 0) number = ++count;
      *labels = number;
    }
  }
}

}  // namespace fastproto::cpu
