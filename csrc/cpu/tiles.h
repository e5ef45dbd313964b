// SPDX-License-Identifier: Apache-2.0
// Moving strips of pixels and blocks of prototypes between memory (any type, either layout) and the
// panels the kernels compute on.
//
// A pixel panel is [D][width] of Acc: one row per channel, pixels contiguous; columns past the
// strip's last pixel are zero. A prototype panel is [rows][row_stride(D)] of Acc.
#pragma once

#include <type_traits>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "gemm.h"
#include "kernels.h"

namespace fastproto::cpu {
namespace {

// Rows this long are read down a column: a stride of a power of two would use but a few sets of
// the first-level cache.
template <class Acc>
inline int64_t row_stride(int64_t dim) {
  constexpr int64_t L = kLanes<Acc>, kPad = 64 / int64_t(sizeof(Acc));
  return (dim + L - 1) / L * L + kPad;
}

// One strip of one feature map in memory: channels [0, dim), pixels [0, count).
template <class T>
struct TileView {
  T* data;
  int64_t stride_channel, stride_pixel, count;

  bool pixels_contiguous() const { return stride_pixel == 1; }
};

template <class T>
inline TileView<T> tile_of(const Dense& maps, int64_t image, int64_t channel, int64_t pixel,
                           int64_t count) {
  const int64_t at = image * maps.image + channel * maps.channel + pixel * maps.pixel;
  return {static_cast<T*>(maps.data) + at, maps.channel, maps.pixel, count};
}
template <class T>
inline TileView<const T> tile_of(const Strided& feat, int64_t episode, int64_t query, int64_t pixel,
                                 int64_t count) {
  const int64_t at = episode * feat.episode + query * feat.query + pixel * feat.pixel;
  return {static_cast<const T*>(feat.data) + at, feat.channel, feat.pixel, count};
}

// Calls f(channel, pixel, channels) for each block of one vector of pixels x as many channels;
// `channels` is a compile-time constant for whole blocks.
template <class Acc, class F>
FASTPROTO_INLINE void for_blocks(int64_t dim, int64_t width, F&& f) {
  constexpr int L = kLanes<Acc>;
  int64_t d = 0;
  for (; d + L <= dim; d += L)
    for (int64_t p = 0; p < width; p += L) f(d, p, std::integral_constant<int, L>());
  if (d < dim)
    for (int64_t p = 0; p < width; p += L) f(d, p, int(dim - d));
}

// f(0) ... f(n - 1), unrolled where n is a constant, so that arrays indexed by it stay in
// registers.
template <int N, class F>
FASTPROTO_INLINE void repeat(std::integral_constant<int, N>, F&& f) {
  [&]<std::size_t... I>(std::index_sequence<I...>) __attribute__((always_inline)) {
    (f(int(I)), ...);
  }(std::make_index_sequence<std::size_t(N)>());
}
template <class F>
FASTPROTO_INLINE void repeat(int n, F&& f) {
  for (int i = 0; i < n; ++i) f(i);
}

// Asks for a block that will be read (or written) soon: rows of an image lie a page or so apart,
// where no hardware prefetcher follows.
template <bool Write, class T>
FASTPROTO_INLINE void prefetch_block(TileView<T> view, int64_t dim, int64_t channel,
                                     int64_t pixel) {
  constexpr int L = kLanes<AccOf<std::remove_const_t<T>>>;
  if (channel + L > dim || pixel >= view.count) return;
  const bool rows = view.pixels_contiguous();
  const T* at = view.data + channel * view.stride_channel + pixel * view.stride_pixel;
  const int64_t stride = rows ? view.stride_channel : view.stride_pixel;
  const int64_t count = rows ? L : view.count - pixel;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    if (i < count) __builtin_prefetch(at + i * stride, Write ? 1 : 0, 3);
}

// rows[i] = channel `channel` + i of one vector of pixels.
template <class T, class N>
FASTPROTO_INLINE void load_block(TileView<std::add_const_t<T>> src, int64_t channel, int64_t pixel,
                                 N channels, Vec<AccOf<T>>* rows) {
  constexpr int L = kLanes<AccOf<T>>;
  const int64_t count = src.count - pixel;
  if (src.pixels_contiguous()) {
    const T* at = src.data + channel * src.stride_channel + pixel;
    if (count >= L) {
      repeat(channels, [&](int i) { rows[i] = load_as(at + i * src.stride_channel); });
    } else {
      repeat(channels, [&](int i) { rows[i] = load_as(at + i * src.stride_channel, count); });
    }
    return;
  }
  const T* at = src.data + pixel * src.stride_pixel + channel;
  if (count >= L && channels == L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = load_as(at + i * src.stride_pixel);
  } else {
    for (int i = 0; i < L; ++i)
      rows[i] = i < count ? load_as(at + i * src.stride_pixel, int64_t(channels)) : Vec<AccOf<T>>{};
  }
  transpose(rows);
}

// The same back; `rows` is overwritten.
template <class T, class N>
FASTPROTO_INLINE void store_block(Vec<AccOf<T>>* rows, int64_t channel, int64_t pixel, N channels,
                                  TileView<T> dst) {
  constexpr int L = kLanes<AccOf<T>>;
  const int64_t count = dst.count - pixel;
  if (dst.pixels_contiguous()) {
    T* at = dst.data + channel * dst.stride_channel + pixel;
    if (count >= L) {
      repeat(channels, [&](int i) { store_as(rows[i], at + i * dst.stride_channel); });
    } else {
      repeat(channels, [&](int i) { store_as(rows[i], at + i * dst.stride_channel, count); });
    }
    return;
  }
  for (int i = channels; i < L; ++i) rows[i] = Vec<AccOf<T>>{};
  transpose(rows);
  T* at = dst.data + pixel * dst.stride_pixel + channel;
  if (count >= L && channels == L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store_as(rows[i], at + i * dst.stride_pixel);
  } else {
    for (int i = 0; i < L && i < count; ++i)
      store_as(rows[i], at + i * dst.stride_pixel, int64_t(channels));
  }
}

inline void copy_bytes(const void* src, void* dst, int64_t bytes) {
  const char* from = static_cast<const char*>(src);
  char* to = static_cast<char*>(dst);
  if (bytes % 64 != 0) {
    std::memcpy(to, from, size_t(bytes));
    return;
  }
  for (; bytes > 0; bytes -= 64, from += 64, to += 64) __builtin_memcpy(to, from, 64);
}

template <class T>
void copy_tile(TileView<const T> src, int64_t dim, TileView<T> dst) {
  // The layout is that of dst, which is dense; both strides of an overlapping src may be 1.
  if (dst.pixels_contiguous()) {
    constexpr int64_t kAhead = 16;
    for (int64_t d = 0; d < dim; ++d) {
      T* to = dst.data + d * dst.stride_channel;
      if (d + kAhead < dim)
        for (int64_t i = 0; i < src.count; i += 64 / int64_t(sizeof(T)))
          __builtin_prefetch(to + kAhead * dst.stride_channel + i, 1, 3);
      copy_bytes(src.data + d * src.stride_channel, to, src.count * int64_t(sizeof(T)));
    }
  } else {
    for (int64_t p = 0; p < src.count; ++p)
      copy_bytes(src.data + p * src.stride_pixel, dst.data + p * dst.stride_pixel,
                 dim * int64_t(sizeof(T)));
  }
}

// panel [D][width] -> transposed [width][row_stride(D)], zeros up to the next whole vector.
template <class Acc>
void transpose_panel(const Acc* panel, int64_t dim, int64_t width, Acc* transposed) {
  constexpr int L = kLanes<Acc>;
  const int64_t stride = row_stride<Acc>(dim);
  for_blocks<Acc>(dim, width, [&](int64_t d, int64_t p, auto channels) {
    Vec<Acc> rows[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i)
      rows[i] = i < channels ? load(panel + (d + i) * width + p) : Vec<Acc>{};
    transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store(transposed + (p + i) * stride + d, rows[i]);
  });
}

// max(norm, eps) that lets NaN through; `free` is 1 where the norm itself counts, 0 where eps does.
// In double: one rounding instead of two, in what every cosine is multiplied by.
template <class Acc>
inline Acc reciprocal_norm(Acc square_sum, Acc eps, Acc* free) {
  const double norm = __builtin_sqrt(double(square_sum));
  *free = norm < double(eps) ? Acc(0) : Acc(1);
  return Acc(1.0 / (norm < double(eps) ? double(eps) : norm));
}

// Sums over channels for every pixel of a strip, in two levels, so that rounding errors stay small.
template <class Acc>
class PixelSums {
 public:
  // Adds what the channels from `channel` on contribute to one vector of pixels; channels ascend.
  void add(int64_t channel, int64_t pixel, Vec<Acc> v) {
    constexpr int64_t kLevel = 64;
    if (channel % kLevel == 0) {
      store(total_ + pixel, channel == 0 ? Vec<Acc>{} : get(pixel));
      store(part_ + pixel, v);
    } else {
      store(part_ + pixel, load(part_ + pixel) + v);
    }
  }
  Vec<Acc> get(int64_t pixel) const { return load(total_ + pixel) + load(part_ + pixel); }

 private:
  Acc total_[kMostPixels] = {};
  Acc part_[kMostPixels] = {};
};

// Per-pixel statistics of a strip. Aligned as panels are: vectors are loaded from it.
template <class Acc>
struct alignas(64) PixelStats {
  Acc mean[kMostPixels];
  Acc rnorm[kMostPixels];  // 1 / max(|F - mean|, eps)
  Acc free[kMostPixels];
};

// centred = src - mean over channels, and the statistics. Sums are taken relative to the first
// channel, so a constant vector is centred to exact zeros.
template <class T>
void centre_pixels(TileView<const T> src, int64_t dim, int64_t width, AccOf<T> eps,
                   AccOf<T>* centred, PixelStats<AccOf<T>>* stats) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  // Transposed once, to the panel; what is contiguous is read again.
  const bool stage = !src.pixels_contiguous();
  const TileView<const Acc> staged{centred, width, 1, width};
  Acc first[kMostPixels] = {};
  PixelSums<Acc> sum, squares;
  for_blocks<Acc>(dim, width, [&](int64_t d, int64_t p, auto channels) {
    Vec<Acc> rows[L] = {};
    prefetch_block<false>(src, dim, d + L, p);
    load_block<T>(src, d, p, channels, rows);
    if (d == 0) store(first + p, rows[0]);
    const Vec<Acc> origin = load(first + p);
    Vec<Acc> part = {};
    repeat(channels, [&](int i) { part += rows[i] - origin; });
    sum.add(d, p, part);
    if (stage) repeat(channels, [&](int i) { store(centred + (d + i) * width + p, rows[i]); });
  });
  for (int64_t p = 0; p < width; p += L)
    store(stats->mean + p, load(first + p) + sum.get(p) / Acc(dim));
  for_blocks<Acc>(dim, width, [&](int64_t d, int64_t p, auto channels) {
    Vec<Acc> rows[L];
    if (stage)
      load_block<Acc>(staged, d, p, channels, rows);
    else
      load_block<T>(src, d, p, channels, rows);
    const Vec<Acc> mean = load(stats->mean + p);
    Vec<Acc> part = {};
    repeat(channels, [&](int i) {
      const Vec<Acc> x = rows[i] - mean;
      store(centred + (d + i) * width + p, x);
      part += x * x;
    });
    squares.add(d, p, part);
  });
  for (int64_t p = 0; p < width; p += L) {
    const Vec<Acc> sums = squares.get(p);
    for (int i = 0; i < L; ++i)
      stats->rnorm[p + i] = reciprocal_norm(sums[i], eps, &stats->free[p + i]);
  }
}

// Per-prototype statistics of a block.
template <class Acc>
struct ProtoStats {
  Acc mean[kBlockProtos];
  Acc rnorm[kBlockProtos];
  Acc free[kBlockProtos];
};

// Mean over channels of one prototype. Four sums: one would wait for itself.
template <class T>
inline AccOf<T> row_mean(const T* row, int64_t dim) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  const Acc first = to_acc(row[0]);
  Vec<Acc> sums[4] = {};
  int64_t d = 0;
  for (; d + 4 * L <= dim; d += 4 * L)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[i] += load_as(row + d + i * L) - first;
  for (; d + L <= dim; d += L) sums[0] += load_as(row + d) - first;
  Acc sum = sum_lanes<Acc>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; d < dim; ++d) sum += to_acc(row[d]) - first;
  return first + sum / Acc(dim);
}

// Loads rows of packed prototypes, centred over channels.
template <class T>
void load_protos(const T* protos, int64_t rows, int64_t dim, AccOf<T> eps, AccOf<T>* centred,
                 ProtoStats<AccOf<T>>* stats) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  const int64_t stride = row_stride<Acc>(dim);
  Acc squares[kBlockProtos];
  for (int64_t n = 0; n < rows; ++n) {
    const T* src = protos + n * dim;
    Acc* row = centred + n * stride;
    const Acc mean = row_mean(src, dim);
    Vec<Acc> sums[4] = {};
    const auto centre = [&](int64_t at, int lane_sum) {
      const Vec<Acc> x = load_as(src + at) - mean;
      store(row + at, x);
      sums[lane_sum] += x * x;
    };
    int64_t d = 0;
    for (; d + 4 * L <= dim; d += 4 * L)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) centre(d + i * L, i);
    for (; d + L <= dim; d += L) centre(d, 0);
    Acc square = sum_lanes<Acc>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; d < dim; ++d) {
      row[d] = to_acc(src[d]) - mean;
      square += row[d] * row[d];
    }
    stats->mean[n] = mean;
    squares[n] = square;
  }
  for (int64_t n = 0; n < rows; ++n)
    stats->rnorm[n] = reciprocal_norm(squares[n], eps, &stats->free[n]);
}

// The memory of the next block of prototypes, of which `left` follow in all, for Ahead.
template <class T>
inline Ahead rows_ahead(const T* protos, int64_t left, int64_t dim) {
  const int64_t rows = left < kBlockProtos ? left : kBlockProtos;
  return {reinterpret_cast<const char*>(protos),
          reinterpret_cast<const char*>(protos + rows * dim)};
}

// Hands out aligned pieces of one worker's scratch memory; without memory, counts them.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}
  int64_t bytes() const { return bytes_; }

 protected:
  template <class Acc>
  Acc* take(int64_t count) {
    Acc* piece = memory_ == nullptr ? nullptr : reinterpret_cast<Acc*>(memory_ + bytes_);
    bytes_ += (count * int64_t(sizeof(Acc)) + 63) / 64 * 64;
#if defined(__SANITIZE_ADDRESS__)
    bytes_ += 64;  // a redzone; the problem before had pieces of its own here
    if (piece != nullptr) {
      char* stop = reinterpret_cast<char*>(piece + count);
      __asan_unpoison_memory_region(piece, size_t(count) * sizeof(Acc));
      __asan_poison_memory_region(stop, size_t(memory_ + bytes_ - stop));
    }
#endif
    return piece;
  }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

}  // namespace
}  // namespace fastproto::cpu
