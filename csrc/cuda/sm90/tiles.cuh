// SPDX-License-Identifier: Apache-2.0
// What the WGMMA kernels share: boxes of shared memory, rings of them, launch bounds.
#pragma once

#include "../common/math.cuh"
#include "../dispatch.h"
#include "forward.h"

namespace fastproto::cuda::sm90 {

// A box: 64 rows of 64 two-byte numbers, 128-byte swizzle, at a multiple of 1024 bytes. What TMA
// moves at a time and WGMMA reads.
constexpr int kBox = 64;
constexpr int kBoxRowBytes = 2 * kBox;
constexpr int kBoxBytes = kBox * kBoxRowBytes;

// Where the 16-byte piece `piece` (0..7) of row `row` of a box lies.
FP_HOST_DEVICE constexpr int box_offset(int row, int piece) {
  return row * kBoxRowBytes + ((piece ^ (row & 7)) << 4);
}

// Descriptors of step `step` of 16 numbers of K. K contiguous: one box has 4 steps. M or N
// contiguous: rows of the box are K, and boxes of the next 64 numbers of M or N follow each other.
FP_DEVICE uint64_t descriptor_k_major(const uint8_t* box, int step) {
  return matrix_descriptor(box + 32 * step, 0, 1024);
}
FP_DEVICE uint64_t descriptor_mn_major(const uint8_t* boxes, int step) {
  return matrix_descriptor(boxes + 2048 * step, kBoxBytes, 1024);
}
template <bool MnMajor>
FP_DEVICE uint64_t box_descriptor(const uint8_t* box, int step) {
  return MnMajor ? descriptor_mn_major(box, step) : descriptor_k_major(box, step);
}

// The place in a ring of `Stages` boxes or tiles that number `count` takes, and its phase there.
template <int Stages>
struct Places {
  static FP_HOST_DEVICE constexpr int slot(uint32_t count) { return int(count % Stages); }
  static FP_HOST_DEVICE constexpr int parity(uint32_t count) { return int(count / Stages & 1); }
};

// launch(TypeTag<Traits<T, Dim, ChannelsLast>>()) of the Dim that holds the channels.
template <class T, template <class, int, bool> class Traits, class Launch>
const char* with_traits(int dim, bool channels_last, const Launch& launch) {
  if (padded_dim(dim) == 256)
    return channels_last ? launch(TypeTag<Traits<T, 256, true>>())
                         : launch(TypeTag<Traits<T, 256, false>>());
  return channels_last ? launch(TypeTag<Traits<T, 512, true>>())
                       : launch(TypeTag<Traits<T, 512, false>>());
}

template <class T>
constexpr MapType map_type();
template <>
constexpr MapType map_type<bf16>() {
  return MapType::kBFloat16;
}
template <>
constexpr MapType map_type<half>() {
  return MapType::kFloat16;
}

// A dense or strided stack of maps [..][channels][pixels], in boxes of 64 x 64. `stack` are the
// outer dimensions, innermost first, strides in elements; a dimension of one element may have any
// stride. The map's coordinates are (pixel, channel, ..) for NCHW, (channel, pixel, ..) else.
struct StackDim {
  int64_t size;
  int64_t stride;
};
// 0 where all maps along a dimension are the same one, which a tensor map has once: what a stride
// of 0 means to TMA is nowhere written.
struct MapSteps {
  int32_t way, query, episode;
  explicit MapSteps(const Strided& maps)
      : way(maps.way != 0), query(maps.query != 0), episode(maps.episode != 0) {}
};
inline StackDim stack_dim(int size, int64_t stride) { return {stride != 0 ? size : 1, stride}; }

template <int Outer>
const char* make_stack_map(TensorMap* map, MapType type, const void* data, int channels, int pixels,
                           int64_t channel_stride, int64_t pixel_stride, bool channels_last,
                           const StackDim (&stack)[Outer]) {
  uint64_t sizes[2 + Outer], strides[1 + Outer];
  uint32_t box[2 + Outer];
  sizes[0] = uint64_t(channels_last ? channels : pixels);
  sizes[1] = uint64_t(channels_last ? pixels : channels);
  const int64_t row = channels_last ? pixel_stride : channel_stride;
  // Of a single row the stride may be anything; TMA wants a multiple of 16 bytes.
  strides[0] = sizes[1] > 1 ? uint64_t(row) * 2 : (sizes[0] * 2 + 15) / 16 * 16;
  box[0] = box[1] = kBox;
  for (int i = 0; i < Outer; ++i) {
    sizes[2 + i] = uint64_t(stack[i].size);
    strides[1 + i] = stack[i].size > 1 ? uint64_t(stack[i].stride) * 2 : strides[i] * sizes[1 + i];
    box[2 + i] = 1;
  }
  return make_tensor_map(map, type, 2 + Outer, data, sizes, strides, box);
}

// The tensor maps of a call, in the host's hands, and its launch; `error` is of the first that
// fails.
template <class Traits, class Params>
struct MapMaker {
  using T = typename Traits::T;
  const Params& p;
  const char* error = nullptr;

  template <class Strides, int Outer>
  void stack(TensorMap* map, const void* data, const Strides& strides,
             const StackDim (&dims)[Outer]) {
    if (error == nullptr)
      error = make_stack_map(map, map_type<T>(), data, p.problem.dim, p.problem.pixels,
                             strides.channel, strides.pixel, Traits::kChannelsLast, dims);
  }
  // One map for each of `images`, from a channel on.
  void dense(TensorMap* map, const Dense& maps, int64_t images, int channel = 0) {
    const StackDim dims[1] = {{images, maps.image}};
    stack(map, static_cast<const T*>(maps.data) + channel * maps.channel, maps, dims);
  }
  void features(TensorMap* map) {
    const StackDim dims[2] = {stack_dim(p.problem.queries, p.feat.query),
                              stack_dim(p.problem.episodes, p.feat.episode)};
    stack(map, p.feat.data, p.feat, dims);
  }
  // From a channel of the gradient on.
  void gradients(TensorMap* map, int channel) {
    const Strided& grad = p.grad_out;
    const StackDim dims[3] = {stack_dim(p.problem.ways, grad.way),
                              stack_dim(p.problem.queries, grad.query),
                              stack_dim(p.problem.episodes, grad.episode)};
    stack(map, static_cast<const T*>(grad.data) + channel * grad.channel, grad, dims);
  }
  // Coordinates (channel, row). Without rows, a map of the features that is never used.
  void protos(TensorMap* map) {
    const int rows = p.problem.total, channels = p.problem.dim;
    const uint64_t sizes[2] = {uint64_t(channels), uint64_t(rows > 0 ? rows : 1)};
    const uint64_t strides[1] = {uint64_t(channels) * 2};
    const uint32_t box[2] = {kBox, kBox};
    if (error == nullptr)
      error = make_tensor_map(map, map_type<T>(), 2, rows > 0 ? p.protos : p.feat.data, sizes,
                              strides, box);
  }
  template <auto Kernel, class Maps>
  const char* launch(const Maps& maps, int blocks, int cluster, void* stream) const {
    if (error != nullptr) return error;
    const Grid grid{blocks, Traits::kThreads, Traits::kSharedBytes, cluster, stream};
    return cuda::launch<Kernel>(grid, p, maps);
  }
};

}  // namespace fastproto::cuda::sm90
