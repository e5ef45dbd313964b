// SPDX-License-Identifier: Apache-2.0
// Memory layouts of maps [..., C, H, W]: NCHW and channels_last. Twin of fastproto/op/layout.py.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../params.h"

namespace fastproto {

// channels_last when channels are contiguous and that says something, else NCHW; must agree with
// is_channels_last in fastproto/op/layout.py.
inline bool is_channels_last(const torch::stable::Tensor& maps) {
  const int64_t n = maps.dim();
  return maps.stride(n - 3) == 1 && maps.size(n - 3) > 1 && maps.size(n - 2) * maps.size(n - 1) > 1;
}

// Distance of neighbouring pixels where height and width run as one dimension; `alone` where there
// is one pixel.
inline int64_t pixel_stride(const torch::stable::Tensor& maps, int64_t alone) {
  const int64_t n = maps.dim();
  return maps.size(n - 1) > 1   ? maps.stride(n - 1)
         : maps.size(n - 2) > 1 ? maps.stride(n - 2)
                                : alone;
}

// Height and width run as one dimension of `stride` (sizes of 1 have no say).
inline bool pixels_are_one_dim(const torch::stable::Tensor& maps, int64_t stride) {
  const int64_t n = maps.dim(), height = maps.size(n - 2), width = maps.size(n - 1);
  return (width == 1 || maps.stride(n - 1) == stride) &&
         (height == 1 || maps.stride(n - 2) == stride * width);
}

// Whether kernels can walk the maps in that layout: its inner stride is 1 and pixels are one
// dimension.
inline bool is_walkable(const torch::stable::Tensor& maps, bool channels_last) {
  if (!channels_last) return pixels_are_one_dim(maps, 1);
  const int64_t n = maps.dim();
  return (maps.size(n - 3) == 1 || maps.stride(n - 3) == 1) &&
         pixels_are_one_dim(maps, pixel_stride(maps, 1));
}

// [..., C, H, W] of the given layout: a new tensor.
inline torch::stable::Tensor new_maps(
    const torch::stable::Tensor& like, std::vector<int64_t> sizes, bool channels_last,
    std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  if (!channels_last) return torch::stable::new_empty(like, sizes, dtype);
  const int64_t n = int64_t(sizes.size());
  std::rotate(sizes.end() - 3, sizes.end() - 2, sizes.end());  // C, H, W -> H, W, C
  const torch::stable::Tensor rows = torch::stable::new_empty(like, sizes, dtype);
  const torch::stable::Tensor swapped = torch::stable::transpose(rows, n - 3, n - 1);  // C, W, H
  return torch::stable::transpose(swapped, n - 2, n - 1);
}

// The same values in memory the kernels can walk: dense, in the given layout.
inline torch::stable::Tensor dense(const torch::stable::Tensor& t, bool channels_last) {
  using torch::stable::transpose;
  if (!channels_last) return t.is_contiguous() ? t : torch::stable::contiguous(t);
  const int64_t n = t.dim();
  const torch::stable::Tensor rows = transpose(transpose(t, n - 2, n - 1), n - 3, n - 1);
  if (rows.is_contiguous()) return t;
  const torch::stable::Tensor packed = torch::stable::contiguous(rows);
  return transpose(transpose(packed, n - 3, n - 1), n - 2, n - 1);
}

// Strides of walkable maps [E, Q, (K,) C, H, W]; those of sizes of 1 say what a dense tensor's
// would.
inline Strided strided(const torch::stable::Tensor& maps, bool channels_last) {
  const int64_t n = maps.dim(), channels = maps.size(n - 3);
  const int64_t pixels = maps.size(n - 2) * maps.size(n - 1);
  Strided s;
  s.data = maps.data_ptr();
  s.channel = channels_last ? 1 : channels > 1 ? maps.stride(n - 3) : pixels;
  s.pixel = channels_last ? pixel_stride(maps, channels) : 1;
  const auto outer = [&maps](int64_t at, int64_t alone) {
    return maps.size(at) > 1 ? maps.stride(at) : alone;
  };
  const int64_t map = channels * pixels;
  s.way = n == 6 ? outer(2, map) : 0;
  const int64_t image = n == 6 ? maps.size(2) * map : map;
  s.query = outer(1, image);
  s.episode = outer(0, maps.size(1) * image);
  return s;
}

// A new or dense tensor [..., C, H, W].
inline Dense dense_maps(const torch::stable::Tensor& maps, bool channels_last) {
  const int64_t n = maps.dim(), channels = maps.size(n - 3);
  const int64_t pixels = maps.size(n - 2) * maps.size(n - 1);
  return {maps.data_ptr(), channels * pixels, channels_last ? 1 : pixels,
          channels_last ? channels : 1};
}

}  // namespace fastproto
