// SPDX-License-Identifier: Apache-2.0
// Packing of the prototypes that a mask selects, and its backward; layout of the result: ../pack.h.
// The twin of fastproto/triton/pack.py. Plain memory traffic: every feature that is kept is read
// once per class, every row of the result written once.
//
//   select     a block per bag ranks its candidates
//   rows       kTile cells x kChunk channels a block, turned in shared memory where the features
//   are
//              NCHW; a bag's average takes longest, so these blocks come first
//   backward   the same tiles of the features' gradient, summed over the classes in their order
//
// Budget: 8 warps, 8 KiB of shared memory, below 64 registers: four blocks and more to a
// multiprocessor, which hide each other's latency.
#pragma once

#include "../pack.h"
#include "launch.h"

namespace fastproto::cuda {

constexpr float kTiny = 1.17549435e-38f;  // the smallest normal float32 number

template <class T_>
struct PackTraits {
  using T = T_;
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kTile = 32;          // cells
  static constexpr int kChunk = 64;         // channels
  static constexpr int kAverageChunk = 32;  // channels of a block that averages
  // An odd number of banks: a warp reads or writes a column without conflict.
  static constexpr int kRow = kChunk + 4 / int(sizeof(T));
  static constexpr int kPerThread = kTile * kChunk / kThreads;
  static constexpr int kSharedBytes = kTile * kRow * int(sizeof(T)) + 2 * kTile * 4;
  static constexpr int kMaxRegisters = 64;
  static_assert(kSharedBytes <= 48 * 1024 && kThreads * kMaxRegisters * 4 <= 65536);
  static_assert(kSharedBytes >= kWarps * kAverageChunk * 4 && kAverageChunk == 32 && kTile == 32);
};

struct SelectTraits {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kSharedBytes = 2 * kWarps * 4;
  static constexpr int kMaxRegisters = 64;
};

FP_HOST_DEVICE int divide_up(int a, int b) { return (a + b - 1) / b; }

FP_HOST_DEVICE int count_bits(uint32_t x) {
  x -= (x >> 1) & 0x55555555u;
  x = (x & 0x33333333u) + ((x >> 2) & 0x33333333u);
  return int((((x + (x >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24);
}

FP_DEVICE int cells_of(const PackShape& s) { return s.shots * s.pixels; }

// ---------------------------------------------------------------- select

// Which candidates of one bag are kept, and where.
template <class Traits>
FP_KERNEL pack_select_kernel(FP_GRID_CONSTANT PackParams p) {
  constexpr int kThreads = Traits::kThreads, kWarps = Traits::kWarps;
  int* warp_counts = reinterpret_cast<int*>(shared_memory());
  float* warp_totals = reinterpret_cast<float*>(warp_counts + kWarps);
  const int bag = block_index(), cells = cells_of(p.shape);
  const int warp = warp_index(), lane = lane_index();
  const float* share = p.share + int64_t(bag) * cells;
  int32_t* position = p.position + int64_t(bag) * (cells + 1);

  int picked = 0;
  float total = 0;
  for (int start = 0; start < cells; start += kThreads) {
    const int cell = start + thread_index();
    const float s = cell < cells ? share[cell] : 0;
    const bool kept = cell < cells && s > p.threshold;
    const uint32_t votes = ballot(kept);
    if (lane == 0) warp_counts[warp] = count_bits(votes);
    sync_block();
    int rank = picked + count_bits(votes & ((1u << lane) - 1));
    FP_UNROLL
    for (int other = 0; other < kWarps; ++other) {
      const int count = warp_counts[other];
      picked += count;
      rank += other < warp ? count : 0;
    }
    sync_block();  // before the counts are written again
    if (cell < cells) position[cell] = kept ? rank : -1 - rank;
    total += s;
  }
  FP_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  if (lane == 0) warp_totals[warp] = total;
  sync_block();
  if (thread_index() == 0) {
    float mass = 0;
    for (int other = 0; other < kWarps; ++other) mass += warp_totals[other];
    const bool wanted = mass > 0 && (p.append_global != 0 || picked == 0);
    position[cells] = wanted ? picked : -1 - picked;
    p.counts[bag] = picked + (wanted ? 1 : 0);
    p.mass[bag] = mass;
  }
}

// ---------------------------------------------------------------- rows

struct FirstRow {
  int of_bag;
  int of_spares;  // the kept candidates of all bags
};

// All lanes of a warp.
FP_DEVICE FirstRow first_row(const PackParams& p, int bag) {
  FirstRow row{0, 0};
  for (int other = lane_index(); other < p.shape.bags; other += 32) {
    const int count = p.counts[other];
    row.of_bag += other < bag ? count : 0;
    row.of_spares += count;
  }
  FP_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    row.of_bag += shuffle(row.of_bag, lane_index() ^ mask);
    row.of_spares += shuffle(row.of_spares, lane_index() ^ mask);
  }
  return row;
}

// The row of a candidate.
FP_DEVICE int destination(FirstRow row, int position, int candidate, int bag, int cells) {
  const int rows_before = bag * (cells + 1) + candidate;
  const int kept_before = row.of_bag - 1 - position;  // of one that is not kept
  return position >= 0 ? row.of_bag + position : row.of_spares + rows_before - kept_before;
}

// The row of one bag's average, kAverageChunk channels of it, and the end of the bag.
template <class Traits>
FP_DEVICE void write_average(const PackParams& p, int index) {
  using T = typename Traits::T;
  constexpr int kWarps = Traits::kWarps, kChunk = Traits::kAverageChunk;
  constexpr int kPerWarp = kChunk / kWarps;  // channels of a warp where pixels are contiguous
  float* sums = reinterpret_cast<float*>(shared_memory());  // [kWarps][kChunk], or [kChunk]
  const PackShape& shape = p.shape;
  const int chunks = divide_up(shape.dim, kChunk), cells = cells_of(shape);
  const int bag = index / chunks, part = index % chunks;
  const int warp = warp_index(), lane = lane_index();
  const int place = p.position[int64_t(bag) * (cells + 1) + cells];
  const float* share = p.share + int64_t(bag) * cells;
  const T* features = static_cast<const T*>(p.features) + bag / shape.ways * p.episode;
  const bool by_warp = p.channel == 1;  // a warp sums a part of the cells, else some channels

  if (place >= 0 && by_warp) {
    const int channel = part * kChunk + lane;
    float sum = 0;
    if (channel < shape.dim)
      for (int shot = 0; shot < shape.shots; ++shot)
        for (int pixel = warp; pixel < shape.pixels; pixel += kWarps)
          sum = multiply_add(share[shot * shape.pixels + pixel],
                             to_float(features[shot * p.shot + pixel * p.pixel + channel]), sum);
    sums[warp * kChunk + lane] = sum;
  } else if (place >= 0) {
    const int first = part * kChunk + warp * kPerWarp;
    float sum[kPerWarp] = {};
    for (int shot = 0; shot < shape.shots; ++shot)
      for (int pixel = lane; pixel < shape.pixels; pixel += 32) {
        const float s = share[shot * shape.pixels + pixel];
        FP_UNROLL
        for (int k = 0; k < kPerWarp; ++k)
          if (first + k < shape.dim)
            sum[k] = multiply_add(
                s, to_float(features[shot * p.shot + (first + k) * p.channel + pixel * p.pixel]),
                sum[k]);
      }
    FP_UNROLL
    for (int k = 0; k < kPerWarp; ++k) {
      FP_UNROLL
      for (int mask = 16; mask > 0; mask /= 2) sum[k] += shuffle_xor(sum[k], mask);
      if (lane == 0) sums[warp * kPerWarp + k] = sum[k];
    }
  }
  sync_block();
  if (warp > 0) return;
  const FirstRow first = first_row(p, bag);
  const int row = destination(first, place, cells, bag, cells);
  if (part == 0 && lane == 0) {
    p.offsets[bag + 1] = first.of_bag + p.counts[bag];
    if (bag == 0) p.offsets[0] = 0;
  }
  const int channel = part * kChunk + lane;
  if (channel >= shape.dim) return;
  float average = 0;
  if (place >= 0) {
    for (int other = 0; other < (by_warp ? kWarps : 1); ++other)
      average += sums[other * kChunk + lane];
    const float mass = p.mass[bag];
    average /= mass < kTiny ? kTiny : mass;
  }
  static_cast<T*>(p.protos)[int64_t(row) * shape.dim + channel] = from_float<T>(average);
}

// The rows of kTile cells of one shot and bag, kChunk channels of them.
template <class Traits>
FP_DEVICE void copy_cells(const PackParams& p, int index) {
  using T = typename Traits::T;
  constexpr int kTile = Traits::kTile, kChunk = Traits::kChunk, kRow = Traits::kRow;
  constexpr int kThreads = Traits::kThreads, kPerThread = Traits::kPerThread;
  int* rows = reinterpret_cast<int*>(shared_memory());
  int* kept = rows + kTile;
  T* tile = reinterpret_cast<T*>(kept + kTile);  // [kTile][kRow]
  const PackShape& shape = p.shape;
  const int chunks = divide_up(shape.dim, kChunk), tiles = divide_up(shape.pixels, kTile);
  const int first_channel = index % chunks * kChunk;
  const int first_pixel = index / chunks % tiles * kTile;
  const int shot = index / chunks / tiles % shape.shots;
  const int bag = index / chunks / tiles / shape.shots;
  const int cells = cells_of(shape);

  if (warp_index() == 0) {
    const FirstRow first = first_row(p, bag);
    const int pixel = first_pixel + lane_index(), cell = shot * shape.pixels + pixel;
    const bool ok = pixel < shape.pixels;
    const int place = ok ? p.position[int64_t(bag) * (cells + 1) + cell] : -1;
    rows[lane_index()] = ok ? destination(first, place, cell, bag, cells) : -1;
    kept[lane_index()] = place >= 0;
  }
  sync_block();
  const T* features = static_cast<const T*>(p.features) + bag / shape.ways * p.episode +
                      shot * p.shot + first_pixel * p.pixel + first_channel * p.channel;
  T values[kPerThread];
  FP_UNROLL
  for (int k = 0; k < kPerThread; ++k) {
    const int i = thread_index() + k * kThreads;
    // Neighbouring threads read neighbouring numbers.
    const int pixel = p.channel == 1 ? i / kChunk : i % kTile;
    const int channel = p.channel == 1 ? i % kChunk : i / kTile;
    values[k] = T{};
    if (kept[pixel] && first_channel + channel < shape.dim)
      values[k] = features[pixel * p.pixel + channel * p.channel];
  }
  FP_UNROLL
  for (int k = 0; k < kPerThread; ++k) {
    const int i = thread_index() + k * kThreads;
    const int pixel = p.channel == 1 ? i / kChunk : i % kTile;
    const int channel = p.channel == 1 ? i % kChunk : i / kTile;
    tile[pixel * kRow + channel] = values[k];
  }
  sync_block();
  T* protos = static_cast<T*>(p.protos) + first_channel;
  FP_UNROLL
  for (int k = 0; k < kPerThread; ++k) {
    const int i = thread_index() + k * kThreads;
    const int row = rows[i / kChunk], channel = i % kChunk;
    if (row >= 0 && first_channel + channel < shape.dim)
      protos[int64_t(row) * shape.dim + channel] = tile[i / kChunk * kRow + channel];
  }
}

template <class Traits>
FP_KERNEL pack_rows_kernel(FP_GRID_CONSTANT PackParams p) {
  const int averages = p.shape.bags * divide_up(p.shape.dim, Traits::kAverageChunk);
  if (block_index() < averages)
    write_average<Traits>(p, block_index());
  else
    copy_cells<Traits>(p, block_index() - averages);
}

// ---------------------------------------------------------------- backward

// Gradient of kTile cells of one shot, kChunk channels of it.
template <class Traits>
FP_KERNEL pack_backward_kernel(FP_GRID_CONSTANT PackBackwardParams p) {
  using T = typename Traits::T;
  constexpr int kTile = Traits::kTile, kChunk = Traits::kChunk, kRow = Traits::kRow;
  constexpr int kThreads = Traits::kThreads, kPerThread = Traits::kPerThread;
  constexpr int kPixelStep = kThreads / kChunk;
  T* tile = reinterpret_cast<T*>(shared_memory());  // [kTile][kRow]
  const PackShape& shape = p.shape;
  const int chunks = divide_up(shape.dim, kChunk), tiles = divide_up(shape.pixels, kTile);
  const int first_channel = block_index() % chunks * kChunk;
  const int first_pixel = block_index() / chunks % tiles * kTile;
  const int image = block_index() / chunks / tiles;
  const int shot = image % shape.shots, episode = image / shape.shots;
  const int cells = cells_of(shape);
  const int rows = shape.bags * (cells + 1);
  const int first_cell = shot * shape.pixels + first_pixel;
  const int pixels = shape.pixels - first_pixel;  // left from here

  // A thread has one channel of kPerThread pixels: rows of the gradient are contiguous.
  const int column = thread_index() % kChunk, first = thread_index() / kChunk;
  const bool has_channel = first_channel + column < shape.dim;
  const T* grad = static_cast<const T*>(p.grad_protos) + first_channel + column;
  float sum[kPerThread] = {};
  for (int way = 0; way < shape.ways; ++way) {
    const int bag = episode * shape.ways + way;
    const int32_t* position = p.position + int64_t(bag) * (cells + 1);
    const float* share = p.share + int64_t(bag) * cells + first_cell;
    const int64_t begin = p.offsets[bag];
    const int average = position[cells];
    float of_average = 0;
    // Rows that the forward cannot have named are not touched.
    const int64_t row = begin + average;
    if (average >= 0 && has_channel)
      of_average = row >= 0 && row < rows ? to_float(grad[row * shape.dim]) : not_a_number();
    float mass = p.mass[bag];
    if (mass < kTiny) mass = kTiny;
    FP_UNROLL
    for (int k = 0; k < kPerThread; ++k) {
      const int pixel = first + k * kPixelStep;
      if (pixel < pixels && has_channel) {
        const int place = position[first_cell + pixel];
        const int64_t own = begin + place;
        if (place >= 0)
          sum[k] += own >= 0 && own < rows ? to_float(grad[own * shape.dim]) : not_a_number();
        if (average >= 0) sum[k] = multiply_add(share[pixel] / mass, of_average, sum[k]);
      }
    }
  }
  FP_UNROLL
  for (int k = 0; k < kPerThread; ++k)
    tile[(first + k * kPixelStep) * kRow + column] = from_float<T>(sum[k]);
  sync_block();
  T* target = static_cast<T*>(p.grad_features) + int64_t(image) * shape.dim * shape.pixels;
  FP_UNROLL
  for (int k = 0; k < kPerThread; ++k) {
    const int i = thread_index() + k * kThreads;
    const int pixel = p.channels_last ? i / kChunk : i % kTile;
    const int channel = p.channels_last ? i % kChunk : i / kTile;
    if (pixel < pixels && first_channel + channel < shape.dim) {
      const int64_t at =
          p.channels_last ? int64_t(first_pixel + pixel) * shape.dim + first_channel + channel
                          : int64_t(first_channel + channel) * shape.pixels + first_pixel + pixel;
      target[at] = tile[pixel * kRow + channel];
    }
  }
}

// ---------------------------------------------------------------- launching

template <class T>
const char* launch_pack_of(const PackParams& p, void* stream) {
  using Traits = PackTraits<T>;
  const PackShape& s = p.shape;
  const char* error = launch<pack_select_kernel<SelectTraits>>(
      Grid{s.bags, SelectTraits::kThreads, SelectTraits::kSharedBytes, 1, stream}, p);
  if (error != nullptr) return error;
  const int averages = s.bags * divide_up(s.dim, Traits::kAverageChunk);
  const int copies =
      s.bags * s.shots * divide_up(s.pixels, Traits::kTile) * divide_up(s.dim, Traits::kChunk);
  return launch<pack_rows_kernel<Traits>>(
      Grid{averages + copies, Traits::kThreads, Traits::kSharedBytes, 1, stream}, p);
}

template <class T>
const char* launch_pack_backward_of(const PackBackwardParams& p, void* stream) {
  using Traits = PackTraits<T>;
  const PackShape& s = p.shape;
  const int blocks = s.bags / s.ways * s.shots * divide_up(s.pixels, Traits::kTile) *
                     divide_up(s.dim, Traits::kChunk);
  return launch<pack_backward_kernel<Traits>>(
      Grid{blocks, Traits::kThreads, Traits::kSharedBytes, 1, stream}, p);
}

}  // namespace fastproto::cuda
