// SPDX-License-Identifier: Apache-2.0
// What the two WGMMA backward kernels share: the layout of fragments in boxes, the exchange between
// two warpgroups, places in rings of any length, the sum over a cluster.
//
// Both kernels have two consuming warpgroups. For a tile of 64 rows (of the accumulator) by 64
// columns, group 0 computes S and group 1 dA, each 64 x 64; then each has both for its half of the
// columns, forms the coefficients of the last product there, and sends them to the other. Thread t
// of one group holds the same places of the tile as thread t of the other, so that all exchange is
// between two threads, and only pairs of warps wait for each other.
#pragma once

#include "../plan.h"
#include "backward.h"
#include "tiles.cuh"

namespace fastproto::cuda::sm90 {

constexpr int kConsumers = 256;
static_assert(backward_threads() == kConsumers + 128);
// Of every thread at first: 65536 / 384, in eights. setmaxnreg deals out what all of them have
// together, and waits for ever for more.
constexpr int kLaunchRegisters = 168;
template <int Threads>
constexpr bool fits_launch(int consumer, int producer) {
  return kConsumers * consumer + (Threads - kConsumers) * producer <= Threads * kLaunchRegisters;
}

// What both kernels' Traits have.
template <class T_, int Dim, bool ChannelsLast, int ConsumerRegisters, int ProducerRegisters>
struct BackwardTraits {
  using T = T_;
  static constexpr int kThreads = backward_threads();
  static constexpr int kMaxRegisters = kLaunchRegisters;
  static constexpr int kConsumerRegisters = ConsumerRegisters;
  static constexpr int kProducerRegisters = ProducerRegisters;
  static_assert(fits_launch<kThreads>(kConsumerRegisters, kProducerRegisters));
  static constexpr bool kChannelsLast = ChannelsLast;
  static constexpr int kBoxes = Dim / kBox;
  static constexpr int kOwned = kBoxes / 2;  // boxes of channels of one group
  static_assert(Dim % (2 * kBox) == 0);
  static_assert(kOwned * 32 <= 128, "registers of the accumulator");
};

// Named barriers; 0 is the block's.
constexpr int kPairBarrier = 1;       // + warp of the group: 64 threads
constexpr int kConsumersBarrier = 5;  // 256 threads
constexpr int kGroupBarrier = 6;      // + group: 128 threads

// Boxes of channels come in turns for the two groups, which own one half of the channels each.
template <int Boxes>
FP_HOST_DEVICE constexpr int box_at(int position) {
  return position % 2 * (Boxes / 2) + position / 2;
}

// The descriptor of what lies `bytes` further.
FP_DEVICE uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }
// Bytes from one step of 16 numbers of K to the next, in boxes whose rows are K or not.
template <bool RowsAreK>
constexpr int kStepBytes = RowsAreK ? 16 * kBoxRowBytes : 32;

// c = a b over the 64 numbers of K of a box each, or c += a b.
template <class T, bool TransposeA, bool TransposeB>
FP_DEVICE void multiply_boxes(float (&c)[32], uint64_t a, uint64_t b, bool first) {
  wgmma_begin();
  FP_UNROLL
  for (int step = 0; step < 4; ++step)
    Wgmma<T, 64, TransposeA, TransposeB>::run(c, advance(a, step * kStepBytes<TransposeA>),
                                              advance(b, step * kStepBytes<TransposeB>),
                                              !first || step > 0);
}

// Where this lane's row of step 0 lies for load_matrix<!ChannelsLast> (store_matrix), and that of
// `step`: matrices 2 h + 0, 1 are channels
// 16 step + 8 h.., of the rows 16 warp + g and + 8, so that registers 2 h + 0, 1 are the pairs
// c[8 step + 4 h + 0..1], c[.. + 2..3] of an accumulator whose columns are the box's channels.
template <bool ChannelsLast>
FP_HOST_DEVICE constexpr int fragment_base(int warp, int lane) {
  const int matrix = lane / 8, row = lane % 8;
  return ChannelsLast ? box_offset(16 * warp + 8 * (matrix & 1) + row, matrix / 2)
                      : box_offset(8 * (matrix / 2) + row, 2 * warp + (matrix & 1));
}
template <bool ChannelsLast>
FP_HOST_DEVICE constexpr int fragment_offset(int base, int step) {
  return ChannelsLast ? base ^ (2 * step << 4) : base + 16 * step * kBoxRowBytes;
}

// The blocks of a cluster take turns at the tiles that one accumulator sums over. Everything behind
// the last product is linear in the accumulator and its sums, so those are added, in the order of
// the blocks; then box q of each group is finished by the block of rank q % size().
struct Turns {  // a kernel's parameter
  int shift;
  explicit Turns(int cluster) : shift(0) {
    while (1 << shift < cluster) ++shift;
  }
  FP_DEVICE int size() const { return 1 << shift; }
  FP_DEVICE int rank() const { return block_index() & (size() - 1); }
  FP_DEVICE int cluster_index() const { return block_index() >> shift; }
};
template <int Owned>
FP_DEVICE void publish_products(uint8_t* area, int group, int thread,
                                const float (&acc)[Owned][32]) {
  Vector16* to = reinterpret_cast<Vector16*>(area) + group * Owned * 1024 + thread;
  FP_UNROLL
  for (int q = 0; q < Owned; ++q) {
    FP_UNROLL
    for (int v = 0; v < 8; ++v) {
      const float* c = acc[q] + 4 * v;
      to[(8 * q + v) * 128] = {float_to_bits(c[0]), float_to_bits(c[1]), float_to_bits(c[2]),
                               float_to_bits(c[3])};
    }
  }
}
// Calls finish(box of both groups' count, sum) for the boxes of this block. Nobody reads its memory
// afterwards.
template <int Owned, class Finish>
FP_DEVICE void gather_products(const Turns& turns, const uint8_t* area, int group, int thread,
                               const Finish& finish) {
  FP_NO_UNROLL
  for (int q = turns.rank(); q < Owned; q += turns.size()) {
    const int box = group * Owned + q;
    float sum[32];
    FP_UNROLL
    for (int i = 0; i < 32; ++i) sum[i] = 0;
    FP_NO_UNROLL
    for (int rank = 0; rank < turns.size(); ++rank) {
      const uint32_t from = peer_address(area + (1024 * box + thread) * 16, rank);
      FP_UNROLL
      for (int v = 0; v < 8; ++v) {
        const Vector16 part = load_peer_16(from + v * 128 * 16);
        FP_UNROLL
        for (int i = 0; i < 4; ++i) sum[4 * v + i] += bits_to_float(part.x[i]);
      }
    }
    finish(box, sum);
  }
  sync_cluster();
}
// Calls finish(for_boxes), of which for_boxes(each) calls each(box, sum) for the boxes of this
// block: of all it has where a block is alone, else of the cluster's sums, published in `area`.
template <int Owned, class Finish>
FP_DEVICE void finish_products(const Turns& turns, uint8_t* area, int group, int thread,
                               const float (&acc)[Owned][32], const Finish& finish) {
  if (turns.size() == 1) {
    finish([&](const auto& each) {
      FP_UNROLL
      for (int q = 0; q < Owned; ++q) each(group * Owned + q, acc[q]);
    });
  } else {
    publish_products(area, group, thread, acc);
    sync_cluster();
    finish([&](const auto& each) { gather_products<Owned>(turns, area, group, thread, each); });
  }
}
// The producing warps, at their end: barriers of a cluster are for all of its threads.
FP_DEVICE void attend_sums(const Turns& turns) {
  if (turns.size() == 1) return;
  sync_warp();
  sync_cluster();  // after publish_products
  sync_cluster();  // after gather_products
}

// One area for each group: where it sends numbers, and where the other answers.
constexpr int kExchangeBytes = 8 * 1024;
template <int Count>
FP_DEVICE void exchange_write(uint8_t* area, int thread, const uint32_t (&x)[Count]) {
  static_assert(Count * 128 * 4 <= kExchangeBytes);
  FP_UNROLL
  for (int v = 0; v < Count / 4; ++v)
    reinterpret_cast<Vector16*>(area)[128 * v + thread] = {x[4 * v], x[4 * v + 1], x[4 * v + 2],
                                                           x[4 * v + 3]};
}
template <int Count>
FP_DEVICE void exchange_read(const uint8_t* area, int thread, uint32_t (&x)[Count]) {
  FP_UNROLL
  for (int v = 0; v < Count / 4; ++v) {
    const Vector16 y = reinterpret_cast<const Vector16*>(area)[128 * v + thread];
    FP_UNROLL
    for (int i = 0; i < 4; ++i) x[4 * v + i] = y.x[i];
  }
}

// Splits the 64 x 64 products `frag` of this group by columns: keeps its own half and sends the
// other to the other group.
FP_DEVICE void send_products(uint8_t* areas, int group, int warp, int thread,
                             const float (&frag)[32], float (&own)[16]) {
  uint32_t bits[16];
  FP_UNROLL
  for (int i = 0; i < 16; ++i) {
    own[i] = group == 0 ? frag[i] : frag[16 + i];
    bits[i] = float_to_bits(group == 0 ? frag[16 + i] : frag[i]);
  }
  exchange_write(areas + group * kExchangeBytes, thread, bits);
  sync_some(kPairBarrier + warp, 64);
}
// What came back: the other product at own[4 k..], where the group needs it.
FP_DEVICE Vector16 received_products(const uint8_t* areas, int group, int thread, int k) {
  return reinterpret_cast<const Vector16*>(areas + (1 - group) * kExchangeBytes)[128 * k + thread];
}
// The answer: into the area just read, from the one just written.
template <int Count>
FP_DEVICE void exchange_coefficients(uint8_t* areas, int group, int warp, int thread,
                                     const uint32_t (&own)[Count], uint32_t (&other)[Count]) {
  exchange_write(areas + (1 - group) * kExchangeBytes, thread, own);
  sync_some(kPairBarrier + warp, 64);
  exchange_read(areas + group * kExchangeBytes, thread, other);
}

// After `Count` committed groups of products: `release` of each as it ends, so that what comes next
// into its box is on its way during the rest.
template <int Count, class Release>
FP_DEVICE void release_in_turn(const Release& release) {
  static_assert(Count == 2 || Count == 4);
  if constexpr (Count == 4) {
    wgmma_wait<3>();
    release(0);
    wgmma_wait<2>();
    release(1);
  }
  wgmma_wait<1>();
  release(Count - 2);
  wgmma_wait<0>();
  release(Count - 1);
}

// Sums over the two groups (and then over the cluster), through `parts` [2][2][64]: of dS c and dS
// times the other side's mean.
FP_DEVICE void share_sums(float* parts, int group, int row, int lane, const float (&cos)[2],
                          const float (&mean)[2]) {
  FP_UNROLL
  for (int h = 0; h < 2; ++h) {
    const float row_cos = sum_of_quad(cos[h]), row_mean = sum_of_quad(mean[h]);
    if (lane % 4 == 0) {
      parts[group * kBox + row + 8 * h] = row_cos;
      parts[(2 + group) * kBox + row + 8 * h] = row_mean;
    }
  }
  sync_some(kConsumersBarrier, kConsumers);
}
FP_DEVICE void shared_sums(const Turns& turns, const float* parts, int row, float (&cos)[2],
                           float (&mean)[2]) {
  FP_UNROLL
  for (int h = 0; h < 2; ++h) cos[h] = mean[h] = 0;
  FP_NO_UNROLL
  for (int rank = 0; rank < turns.size(); ++rank) {
    FP_UNROLL
    for (int h = 0; h < 2; ++h) {
      const uint32_t from = peer_address(parts + row + 8 * h, rank);
      const auto part = [&](int i) { return bits_to_float(load_peer(from + i * kBox * 4)); };
      cos[h] += part(0) + part(1);
      mean[h] += part(2) + part(3);
    }
  }
}

// The gradient of this thread's two rows of pixels or prototypes x, from their accumulator: less
// the means that the other side's vectors had, and less the projection on x.
struct RowEnd {
  float mean[2], inverse_power[2], projection[2], sum_mean[2];

  // `rows` are means and reciprocal norms; power_of(row) is what the accumulator is scaled with.
  template <class PowerOf>
  FP_DEVICE RowEnd(const float* rows, int row, float eps, const float (&sum_cos)[2],
                   const float (&sum_mean_)[2], const PowerOf& power_of) {
    FP_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int r = row + 8 * h;
      mean[h] = rows[r];
      projection[h] = projection_factor(rows[kBox + r], eps) * sum_cos[h];
      inverse_power[h] = 1 / power_of(r);
      sum_mean[h] = sum_mean_[h];
    }
  }
  // In a box of x.
  template <class T, bool ChannelsLast>
  FP_DEVICE void finish_box(uint8_t* box, int base, const float (&sum)[32]) const {
    FP_UNROLL
    for (int step = 0; step < 4; ++step) {
      uint8_t* at = box + fragment_offset<ChannelsLast>(base, step);
      uint32_t x[4];
      load_matrix<!ChannelsLast>(x, at);
      FP_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int h = i & 1;
        const int c = 8 * step + 4 * (i / 2) + 2 * h;
        float x0, x1;
        unpack<T>(x[i], &x0, &x1);
        x[i] =
            pack<T>((sum[c] - sum_mean[h]) * inverse_power[h] - (x0 - mean[h]) * projection[h],
                    (sum[c + 1] - sum_mean[h]) * inverse_power[h] - (x1 - mean[h]) * projection[h]);
      }
      sync_warp();
      store_matrix<!ChannelsLast>(at, x);
    }
  }
};

// Barriers of a ring, whose places a group's warps give back, and of two stages of statistics,
// which a producing warp writes and all consuming warps read.
template <int Stages>
FP_DEVICE void init_ring(Barrier* full, Barrier* empty, Barrier* stats_full, Barrier* stats_empty) {
  for (int i = 0; i < Stages; ++i) {
    barrier_init(full + i, 1);
    barrier_init(empty + i, 4);
  }
  for (int i = 0; i < 2; ++i) {
    barrier_init(stats_full + i, 32);
    barrier_init(stats_empty + i, 8);
  }
}

}  // namespace fastproto::cuda::sm90
