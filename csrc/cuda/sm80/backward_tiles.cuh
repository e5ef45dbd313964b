// SPDX-License-Identifier: Apache-2.0
// The tile of pixels that both kernels of the backward begin with.
#pragma once

#include "products.cuh"

namespace fastproto::cuda::sm80 {

// kPixels pixels of one image and class: F and dO in shared memory, five numbers of each pixel.
template <class T, int kPixels, int kDim>
struct PixelTile {
  static constexpr bool kCentred = sizeof(T) == 4;
  static constexpr int kMapBytes = kPixels * kDim * int(sizeof(T));
  static constexpr int kFloats = 5 * kPixels;
  const BackwardParams& p;
  uint8_t* memory;  // 2 kMapBytes
  float* mean;      // kFloats
  float* rnorm = mean + kPixels;
  float* lse = rnorm + kPixels;
  float* delta = lse + kPixels;
  float* sum_grad = delta + kPixels;  // of dO, over the channels
  bool channel_rows = has_channel_rows(p.feat.channel, p.feat.pixel);
  MapTile<T, kPixels, kDim> queries{memory, channel_rows};
  MapTile<T, kPixels, kDim> grads{memory + kMapBytes, channel_rows};
  int pixel = thread_index() % kPixels, part = thread_index() / kPixels;  // of a thread

  // Of pixels of an image from `map` on, of which `pixels` are left.
  template <class Strides>
  FP_DEVICE Matrix<T> matrix(const T* map, const Strides& strides, int pixels) const {
    return queries.matrix(map, strides, p.problem.dim, pixels);
  }
  // Starts loading F, and has its statistics; `stats` are its image's from the first pixel on.
  FP_DEVICE void load(const Matrix<T>& feat, const float* stats, int pixels) const {
    queries.load(feat);
    copy_async_commit();
    if (thread_index() >= kPixels) return;
    mean[pixel] = pixel < pixels ? stats[pixel] : 0;
    rnorm[pixel] = pixel < pixels ? stats[p.problem.pixels + pixel] : 0;
  }
  // Calls each(channel) for those of a pixel's channels that a thread has.
  template <class Each>
  FP_DEVICE void for_channels(const Each& each) const {
    for (int d = part; d < p.problem.dim; d += kThreads / kPixels) each(d);
  }
};

}  // namespace fastproto::cuda::sm80
