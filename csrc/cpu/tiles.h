// SPDX-License-Identifier: Apache-2.0
// Moving tiles between memory (any type, either layout) and the panels the kernels compute on.
//
// A pixel panel is [D][kTilePixels] of Acc: one row per channel, pixels contiguous; columns past
// the image's last pixel are zero. A prototype panel is [rows][D] of Acc.
#pragma once

#include <type_traits>

#include "gemm.h"
#include "kernels.h"

namespace fastproto::cpu {
namespace {

constexpr int64_t kT = kTilePixels;

template <class T>
using AccOf = typename Storage<T>::Acc;

template <class T>
inline void load_run(const T* src, AccOf<T>* dst, int64_t count) {
  for (int64_t i = 0; i < count; ++i) dst[i] = to_acc(src[i]);
}
template <class T>
inline void store_run(const AccOf<T>* src, T* dst, int64_t count) {
  for (int64_t i = 0; i < count; ++i) from_acc(src[i], dst + i);
}
#if defined(__F16C__)
inline void load_run(const Float16* src, float* dst, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(dst + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
  for (; i < count; ++i) dst[i] = to_acc(src[i]);
}
inline void store_run(const float* src, Float16* dst, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < count; ++i) from_acc(src[i], dst + i);
}
#endif

// One tile of one feature map in memory: channels [0, dim), pixels [0, count).
template <class T>
struct TileView {
  T* data;
  int64_t stride_channel;
  int64_t stride_pixel;
  int64_t count;

  bool pixels_contiguous() const { return stride_pixel == 1; }
};

template <class T>
inline TileView<T> tile_of(const Maps& maps, int64_t image, int64_t channel, int64_t pixel,
                           int64_t count) {
  return {static_cast<T*>(maps.data) + image * maps.stride_image + channel * maps.stride_channel +
              pixel * maps.stride_pixel,
          maps.stride_channel, maps.stride_pixel, count};
}
template <class T>
inline TileView<const T> tile_of(const Features& feat, int64_t episode, int64_t query,
                                 int64_t pixel, int64_t count) {
  return {static_cast<const T*>(feat.data) + episode * feat.stride_episode +
              query * feat.stride_query + pixel * feat.stride_pixel,
          feat.stride_channel, feat.stride_pixel, count};
}

template <class T>
void load_tile(TileView<const T> src, int64_t dim, AccOf<T>* panel) {
  using Acc = AccOf<T>;
  if (src.pixels_contiguous()) {
    for (int64_t d = 0; d < dim; ++d) {
      Acc* row = panel + d * kT;
      load_run(src.data + d * src.stride_channel, row, src.count);
      for (int64_t i = src.count; i < kT; ++i) row[i] = 0;
    }
    return;
  }
  constexpr int64_t kChunk = 16;  // channels: one or two cache lines of a pixel at a time
  Acc run[kChunk];
  for (int64_t d = 0; d < dim; d += kChunk) {
    const int64_t width = dim - d < kChunk ? dim - d : kChunk;
    for (int64_t p = 0; p < src.count; ++p) {
      load_run(src.data + p * src.stride_pixel + d, run, width);
      for (int64_t i = 0; i < width; ++i) panel[(d + i) * kT + p] = run[i];
    }
    for (int64_t i = 0; i < width; ++i)
      for (int64_t p = src.count; p < kT; ++p) panel[(d + i) * kT + p] = 0;
  }
}

template <class T>
void store_tile(const AccOf<T>* panel, int64_t dim, TileView<T> dst) {
  using Acc = AccOf<T>;
  if (dst.pixels_contiguous()) {
    for (int64_t d = 0; d < dim; ++d)
      store_run(panel + d * kT, dst.data + d * dst.stride_channel, dst.count);
    return;
  }
  constexpr int64_t kChunk = 16;
  Acc run[kChunk];
  for (int64_t d = 0; d < dim; d += kChunk) {
    const int64_t width = dim - d < kChunk ? dim - d : kChunk;
    for (int64_t p = 0; p < dst.count; ++p) {
      for (int64_t i = 0; i < width; ++i) run[i] = panel[(d + i) * kT + p];
      store_run(run, dst.data + p * dst.stride_pixel + d, width);
    }
  }
}

template <class T>
void copy_tile(TileView<const T> src, int64_t dim, TileView<T> dst) {
  // The layout is that of dst, which is dense; both strides of an overlapping src may be 1.
  if (dst.pixels_contiguous()) {
    for (int64_t d = 0; d < dim; ++d)
      std::memcpy(dst.data + d * dst.stride_channel, src.data + d * src.stride_channel,
                  size_t(src.count) * sizeof(T));
  } else {
    for (int64_t p = 0; p < src.count; ++p)
      std::memcpy(dst.data + p * dst.stride_pixel, src.data + p * src.stride_pixel,
                  size_t(dim) * sizeof(T));
  }
}

// max(norm, eps) that lets NaN through; `free` is 1 where the norm itself counts, 0 where eps does.
template <class Acc>
inline Acc reciprocal_norm(Acc square_sum, Acc eps, Acc* free) {
  const Acc norm = Acc(__builtin_sqrt(square_sum));
  *free = norm < eps ? Acc(0) : Acc(1);
  return Acc(1) / (norm < eps ? eps : norm);
}

// Per-pixel statistics of a feature tile.
template <class Acc>
struct PixelStats {
  Acc mean[kT];
  Acc rnorm[kT];  // 1 / max(|F - mean|, eps)
  Acc free[kT];
};

// centred = raw - mean over channels, and the statistics. Sums are taken relative to the first
// channel, so a constant vector is centred to exact zeros, and in two levels, for accuracy.
template <class Acc>
void centre_pixels(const Acc* raw, int64_t dim, Acc eps, Acc* centred, PixelStats<Acc>* stats) {
  constexpr int L = kLanes<Acc>;
  constexpr int64_t kLevel = 32;
  for (int64_t p = 0; p < kT; p += L) {
    const Vec<Acc> first = load(raw + p);
    Vec<Acc> sum = {};
    for (int64_t d0 = 0; d0 < dim; d0 += kLevel) {
      const int64_t stop = d0 + kLevel < dim ? d0 + kLevel : dim;
      Vec<Acc> part = {};
      for (int64_t d = d0; d < stop; ++d) part += load(raw + d * kT + p) - first;
      sum += part;
    }
    const Vec<Acc> mean = first + sum / Acc(dim);
    Vec<Acc> squares = {};
    for (int64_t d0 = 0; d0 < dim; d0 += kLevel) {
      const int64_t stop = d0 + kLevel < dim ? d0 + kLevel : dim;
      Vec<Acc> part = {};
      for (int64_t d = d0; d < stop; ++d) {
        const Vec<Acc> x = load(raw + d * kT + p) - mean;
        store(centred + d * kT + p, x);
        part += x * x;
      }
      squares += part;
    }
    store(stats->mean + p, mean);
    for (int i = 0; i < L; ++i)
      stats->rnorm[p + i] = reciprocal_norm(squares[i], eps, &stats->free[p + i]);
  }
}

// Per-prototype statistics of a block.
template <class Acc>
struct ProtoStats {
  Acc mean[kBlockProtos];
  Acc rnorm[kBlockProtos];
  Acc free[kBlockProtos];
};

template <class Acc>
inline Acc row_mean(const Acc* row, int64_t dim) {
  constexpr int L = kLanes<Acc>;
  const int64_t whole = dim / L * L;
  const Acc first = row[0];
  Vec<Acc> sums = {};
  for (int64_t d = 0; d < whole; d += L) sums += load(row + d) - first;
  Acc sum = 0;
  for (int i = 0; i < L; ++i) sum += sums[i];
  for (int64_t d = whole; d < dim; ++d) sum += row[d] - first;
  return first + sum / Acc(dim);
}

// Loads rows [begin, begin + rows) of the packed prototypes, centred over channels.
template <class T>
void load_protos(const Bags& bags, int64_t begin, int64_t rows, int64_t dim, AccOf<T> eps,
                 AccOf<T>* centred, ProtoStats<AccOf<T>>* stats) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  const T* src = static_cast<const T*>(bags.protos) + begin * dim;
  const int64_t whole = dim / L * L;
  for (int64_t n = 0; n < rows; ++n) {
    Acc* row = centred + n * dim;
    load_run(src + n * dim, row, dim);
    const Acc mean = row_mean(row, dim);
    Vec<Acc> squares = {};
    for (int64_t d = 0; d < whole; d += L) {
      const Vec<Acc> x = load(row + d) - mean;
      store(row + d, x);
      squares += x * x;
    }
    Acc square = 0;
    for (int i = 0; i < L; ++i) square += squares[i];
    for (int64_t d = whole; d < dim; ++d) {
      row[d] -= mean;
      square += row[d] * row[d];
    }
    stats->mean[n] = mean;
    stats->rnorm[n] = reciprocal_norm(square, eps, &stats->free[n]);
  }
}

// Hands out aligned pieces of one worker's scratch memory.
class Scratch {
 public:
  explicit Scratch(void* memory) : next_(static_cast<char*>(memory)) {}

  template <class Acc>
  Acc* take(int64_t count) {
    Acc* piece = reinterpret_cast<Acc*>(next_);
    next_ += (count * int64_t(sizeof(Acc)) + 63) / 64 * 64;
    return piece;
  }

 private:
  char* next_;
};

// Calls f with a null pointer of the storage type.
template <class F>
inline void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Float16*>(nullptr));
  }
}

}  // namespace
}  // namespace fastproto::cpu
