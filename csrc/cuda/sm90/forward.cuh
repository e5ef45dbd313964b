// SPDX-License-Identifier: Apache-2.0
// Forward for Hopper at throughput: WGMMA, TMA, warp specialisation; bf16 and half, D <= 512.
// docs/kernels/sm90.md has the schedule and what was tried.
//
// Budget, D = 512 (D <= 256 in brackets):
//   tile               64 queries of one image and class, all channels; 64 prototypes a tile, two
//                      tiles a step, one for each consumer warpgroup
//   threads            3 warpgroups: 2 consumers of 240 registers, 1 producer of 24
//   registers          G half 64 x 256 = 128 (64), S 64 x 64 = 32, W 16
//   shared memory      Q 64 KiB (32), prototypes 2 x 64 KiB (4 x 32), W and staging 4 x 8 KiB,
//                      statistics 3 KiB; 227 KiB (195), one block a multiprocessor
//   roofline           up to N = 430 the bandwidth: features in, Y (and G) out, each once; above it
//                      the tensor cores, 2 x 2 x 64 x 64 x D operations a tile of 64 x 64
#pragma once

#include "forward_loads.cuh"

namespace fastproto::cuda::sm90 {

namespace forward_detail {

// Zeros in the rows of a tile that belong to the next bag: their weights are 0, but 0 * NaN is not.
template <class Traits>
FP_DEVICE void zero_rows(const Shared<Traits>& shared, int slot, int from, int thread) {
  constexpr int kPieces = Traits::kSlices * 8;  // of a row
  for (int i = from * kPieces + thread; i < Traits::kTile * kPieces; i += 128) {
    const int row = i / kPieces, piece = i % kPieces;
    uint8_t* const to = shared.protos(slot, piece / 8) + box_offset(row, piece % 8);
    *reinterpret_cast<Vector16*>(to) = Vector16{{0, 0, 0, 0}};
  }
}

// An item's results: G * F in the place of F, G (divided by the sums of weights) beside it; both go
// out box by box.
template <class Traits>
FP_DEVICE void store_results(const ForwardParams& p, const ForwardMaps& maps,
                             const Shared<Traits>& shared, const Work& work,
                             const float (&g)[Traits::kHalf / 2], const float (&inverse)[2]) {
  using T = typename Traits::T;
  const int warp = warp_index(), lane = lane_index(), group = warp / 4;
  const bool leader = thread_index() % 128 == 0;
  // Where this lane's rows of the 8 x 8 blocks lie: block m of four is pixels + 8 (m % 2), columns
  // + 8 (m / 2).
  const int block_row = lane % 8, block_pixels = lane / 8 % 2, block_columns = lane / 16;
  const int weight_row = 16 * (warp % 4) + 8 * block_pixels + block_row;
  const bool wants_agg = p.agg.data != nullptr;
  FP_UNROLL
  for (int i = 0; i < Traits::kHalfSlices; ++i) {
    const int slice = group * Traits::kHalfSlices + i, channel = slice * kBox;
    uint8_t* const staging = shared.staging(group, i % 2);
    if (i >= 2 && wants_agg) {
      if (leader) tma_store_wait<1>();
      sync_some(kOneConsumer + group, 128);
    }
    FP_UNROLL
    for (int k = 0; k < 4; ++k) {
      const int at = Traits::kChannelsLast ? box_offset(weight_row, 2 * k + block_columns)
                                           : box_offset(16 * k + 8 * block_columns + block_row,
                                                        2 * (warp % 4) + block_pixels);
      uint32_t f[4], y[4], a[4];
      load_matrix<!Traits::kChannelsLast>(f, shared.query(slice) + at);
      FP_UNROLL
      for (int m = 0; m < 4; ++m) {
        const float* const x = g + 32 * i + 8 * k + 2 * m;
        const float low = x[0] * inverse[m % 2], high = x[1] * inverse[m % 2];
        float f_low, f_high;
        unpack<T>(f[m], &f_low, &f_high);
        y[m] = pack<T>(low * f_low, high * f_high);
        a[m] = pack<T>(low, high);
      }
      store_matrix<!Traits::kChannelsLast>(shared.query(slice) + at, y);
      if (wants_agg) store_matrix<!Traits::kChannelsLast>(staging + at, a);
    }
    fence_async();
    sync_some(kOneConsumer + group, 128);
    if (leader && channel < p.problem.dim) {
      const int x = Traits::kChannelsLast ? channel : work.pixel;
      const int y = Traits::kChannelsLast ? work.pixel : channel;
      tma_store(&maps.out_second, shared.query(slice), x, y, work.map);
      if (wants_agg) tma_store(&maps.agg, staging, x, y, work.map);
    }
    if (leader) tma_store_commit();
  }
  if (leader) {
    tma_store_wait<0>();
    barrier_arrive(shared.query_empty(group));
  }
}

// The warpgroup's half of the channels of G, and the fragments' softmax. Rows of this thread are
// 16 (warp % 4) + lane / 4 and that + 8; docs of Wgmma have the columns.
template <class Traits>
FP_DEVICE void consume(const ForwardParams& p, const ForwardMaps& maps,
                       const Shared<Traits>& shared, int tiles, int items) {
  using T = typename Traits::T;
  using FirstProduct = Wgmma<T, kBox, !Traits::kChannelsLast, false>;
  using SecondProduct = Wgmma<T, Traits::kHalf, false, true>;
  constexpr int kTile = Traits::kTile;
  const Problem& problem = p.problem;
  const int warp = warp_index(), lane = lane_index();
  const int group = warp / 4;
  const int thread = thread_index() % 128;
  const int row = 16 * (warp % 4) + lane / 4;
  const bool leader = thread == 0;

  // Where this lane's rows of the 8 x 8 blocks lie: block m of four is pixels + 8 (m % 2), columns
  // + 8 (m / 2).
  const int block_row = lane % 8, block_pixels = lane / 8 % 2, block_columns = lane / 16;
  const int weight_row = 16 * (warp % 4) + 8 * block_pixels + block_row;

  uint32_t count = 0;
  int parity = 0;
  for (int item = block_index(); item < items; item += grid_size(), parity ^= 1) {
    const Work work = find_work(problem, tiles, item);
    const Bag bag = load_bag(p.offsets, work.bag, problem.total);
    const float scale = exponent_scale(problem, bag.count);
    const int bag_tiles = (bag.count + kTile - 1) / kTile;

    float g[Traits::kHalf / 2] = {};
    float sum[2] = {0, 0};
    float bound[2] = {scale, scale};
    if (problem.running_max) bound[0] = bound[1] = -infinity();
    float mean_q[2] = {0, 0}, rnorm_q[2] = {0, 0};  // times D, times scale

    // At least one step: an empty bag's queries want statistics too.
    for (int tile = 0; tile == 0 || tile < bag_tiles; tile += 2) {
      const uint32_t own = count + uint32_t(tile + group),
                     other = count + uint32_t(tile + 1 - group);
      const int slot = Places<Traits::kStages>::slot(own);
      const int other_slot = Places<Traits::kStages>::slot(other);
      const bool has_own = tile + group < bag_tiles, has_other = tile + 1 - group < bag_tiles;
      float* const proto_stats = shared.floats(Traits::kProtoStats) + group * 2 * kTile;
      const int rows = bag.count - (tile + group) * kTile;  // of the own tile

      float s[kBox / 2];
      if (has_own) {
        FP_UNROLL
        for (int i = 0; i < Traits::kSlices; ++i) {
          const int slice = slice_in_order<Traits>(group, i);
          if (tile == 0) barrier_wait(shared.query_full(slice), parity);
          barrier_wait(shared.full(slot, slice), Places<Traits::kStages>::parity(own));
          wgmma_begin();
          FP_UNROLL
          for (int k = 0; k < 4; ++k)
            FirstProduct::run(s, box_descriptor<!Traits::kChannelsLast>(shared.query(slice), k),
                              descriptor_k_major(shared.protos(slot, slice), k), i + k > 0);
        }
        wgmma_commit();
        // Under way; meanwhile the statistics.
        const int j = thread % kTile;
        proto_stats[thread] =
            j < rows ? p.statistics.protos[(thread < kTile ? 0 : int64_t(problem.total)) +
                                           bag.begin + (tile + group) * kTile + j]
                     : 0.0f;
      }
      if (tile == 0) {
        query_statistics(problem, shared, parity, work.pixel,
                         p.statistics.query == nullptr || work.way > 0
                             ? nullptr
                             : p.statistics.query + int64_t(work.image) * 2 * problem.pixels);
        const float* const stats = shared.floats(Traits::kQueryStats);
        FP_UNROLL
        for (int h = 0; h < 2; ++h) {
          mean_q[h] = float(problem.dim) * stats[row + 8 * h];
          rnorm_q[h] = scale * stats[kTile + row + 8 * h];
        }
        if (problem.concat && leader) {
          FP_UNROLL
          for (int i = 0; i < Traits::kHalfSlices; ++i) {
            const int channel = (group * Traits::kHalfSlices + i) * kBox;
            if (channel < problem.dim)
              tma_store(&maps.out_feat, shared.query(channel / kBox),
                        Traits::kChannelsLast ? channel : work.pixel,
                        Traits::kChannelsLast ? work.pixel : channel, work.map);
          }
          tma_store_commit();
        }
      }

      // In no branch: ptxas must see that no product is under way.
      wgmma_wait<0>();
      wgmma_hold(s);
      float top[2] = {-infinity(), -infinity()};
      if (has_own) {
        sync_some(kOneConsumer + group, 128);  // proto_stats
        FP_UNROLL
        for (int k = 0; k < kBox / 8; ++k) {
          FP_UNROLL
          for (int j = 0; j < 2; ++j) {
            const int column = 8 * k + 2 * (lane % 4) + j;
            const float mean = proto_stats[column], rnorm = proto_stats[kTile + column];
            FP_UNROLL
            for (int h = 0; h < 2; ++h) {
              float& x = s[4 * k + 2 * h + j];
              x = (x - mean_q[h] * mean) * (rnorm_q[h] * rnorm);
              x = column < rows ? x : -infinity();
              top[h] = fmaxf(top[h], x);
            }
          }
        }
      }

      if (problem.running_max && bag_tiles > 0) {
        float* const maxima = shared.floats(Traits::kRowMaxima);
        FP_UNROLL
        for (int h = 0; h < 2; ++h) {
          top[h] = max_of_quad(top[h]);
          if (lane % 4 == 0) maxima[group * kTile + row + 8 * h] = top[h];
        }
        sync_some(kAllConsumers, Traits::kConsumers);
        float rescale[2];
        FP_UNROLL
        for (int h = 0; h < 2; ++h) {
          const float both = fmaxf(maxima[row + 8 * h], maxima[kTile + row + 8 * h]);
          const float old = bound[h];
          bound[h] = fmaxf(old, both);
          rescale[h] = exp2_fast(old - bound[h]);
          sum[h] *= rescale[h];
        }
        if (ballot(rescale[0] != 1 || rescale[1] != 1) != 0) {
          FP_UNROLL
          for (int i = 0; i < Traits::kHalf / 2; ++i) g[i] *= rescale[i / 2 % 2];
        }
      }

      uint32_t w[4][4];
      if (has_own) {
        FP_UNROLL
        for (int k = 0; k < 4; ++k) {
          FP_UNROLL
          for (int m = 0; m < 4; ++m) {
            // Fragments of a product's result are those of the next one's first operand.
            const float low = exp2_fast(s[8 * k + 2 * m] - bound[m % 2]);
            const float high = exp2_fast(s[8 * k + 2 * m + 1] - bound[m % 2]);
            sum[m % 2] += low + high;
            w[k][m] = pack<T>(low, high);
          }
          store_matrix<false>(shared.weights(slot) + box_offset(weight_row, 2 * k + block_columns),
                              w[k]);
        }
        if (rows < kTile) zero_rows(shared, slot, rows, thread);
        fence_async();
        if (rows < kTile) sync_some(kOneConsumer + group, 128);
        wgmma_begin();
        FP_UNROLL
        for (int k = 0; k < 4; ++k)
          SecondProduct::run(
              g, w[k], descriptor_mn_major(shared.protos(slot, group * Traits::kHalfSlices), k), 1);
        wgmma_commit();
      }
      sync_some(kAllConsumers, Traits::kConsumers);  // the other's weights
      if (has_other) {
        wgmma_begin();
        FP_UNROLL
        for (int k = 0; k < 4; ++k)
          SecondProduct::run(
              g, descriptor_k_major(shared.weights(other_slot), k),
              descriptor_mn_major(shared.protos(other_slot, group * Traits::kHalfSlices), k), 1);
        wgmma_commit();
      }
      // The own tile is given back while the other is under way.
      wgmma_wait<1>();
      if (has_own && has_other && lane == 0) barrier_arrive(shared.empty(slot, group));
      wgmma_wait<0>();
      wgmma_hold(g);
      if (has_own && !has_other && lane == 0) barrier_arrive(shared.empty(slot, group));
      if (has_other && lane == 0) barrier_arrive(shared.empty(other_slot, group));
    }
    count += uint32_t(bag_tiles);

    // Sums of both warpgroups' prototypes.
    float* const sums = shared.floats(Traits::kRowSums);
    FP_UNROLL
    for (int h = 0; h < 2; ++h) {
      sum[h] = sum_of_quad(sum[h]);
      if (lane % 4 == 0) sums[group * kTile + row + 8 * h] = sum[h];
    }
    if (leader) tma_store_wait<0>();  // of F, which G*F replaces
    sync_some(kAllConsumers, Traits::kConsumers);
    float inverse[2];
    FP_UNROLL
    for (int h = 0; h < 2; ++h) {
      const float all = sums[row + 8 * h] + sums[kTile + row + 8 * h];
      inverse[h] = all == 0 ? 0.0f : 1 / all;  // an empty bag
      if (!bag.valid) inverse[h] = not_a_number();
      const int pixel = work.pixel + row + 8 * h;
      if (p.statistics.lse != nullptr && group == 0 && lane % 4 == 0 && pixel < problem.pixels)
        p.statistics.lse[int64_t(work.map) * problem.pixels + pixel] =
            (problem.running_max ? bound[h] : scale) + log2_fast(all);
    }

    store_results(p, maps, shared, work, g, inverse);
  }
}

}  // namespace forward_detail

template <class Traits>
FP_KERNEL FP_LAUNCH_BOUNDS(Traits::kThreads, 1)
    forward_kernel(FP_GRID_CONSTANT ForwardParams p, FP_GRID_CONSTANT ForwardMaps maps) {
  const forward_detail::Shared<Traits> shared;
  if (thread_index() == 0) {
    for (int slot = 0; slot < Traits::kStages; ++slot) {
      for (int i = 0; i < Traits::kSlices; ++i) barrier_init(shared.full(slot, i), 1);
      for (int i = 0; i < 2; ++i) barrier_init(shared.empty(slot, i), 4);  // a consumer's warps
    }
    for (int i = 0; i < Traits::kSlices; ++i) barrier_init(shared.query_full(i), 1);
    for (int i = 0; i < 2; ++i) barrier_init(shared.query_empty(i), 1);
    barrier_init_fence();
  }
  sync_block();
  const int tiles = (p.problem.pixels + Traits::kTile - 1) / Traits::kTile;
  const int items = tiles * p.problem.episodes * p.problem.queries * p.problem.ways;
  if (warp_index() >= Traits::kConsumers / 32) {
    registers_fewer<24>();
    if (thread_index() == Traits::kConsumers) {
      prefetch_map(&maps.feat);
      prefetch_map(&maps.protos);
      prefetch_map(&maps.out_feat);
      prefetch_map(&maps.out_second);
      forward_detail::produce<Traits>(p, maps, shared, tiles, items);
    }
  } else {
    registers_more<240>();
    forward_detail::consume<Traits>(p, maps, shared, tiles, items);
  }
}

template <class T>
const char* launch_forward_of(const ForwardParams& p, int blocks, void* stream) {
  return with_traits<T, ForwardTraits>(p.problem.dim, is_channels_last(p), [&](auto tag) {
    using Traits = typename decltype(tag)::type;
    const Problem& s = p.problem;
    const int64_t images = int64_t(s.episodes) * s.queries * s.ways;
    ForwardMaps maps = {{}, {}, {}, {}, {}, MapSteps(p.feat)};
    MapMaker<Traits, ForwardParams> make{p};
    make.features(&maps.feat);
    make.protos(&maps.protos);
    make.dense(&maps.out_feat, p.out, images);
    make.dense(&maps.out_second, p.out, images, s.concat ? s.dim : 0);
    if (p.agg.data != nullptr) make.dense(&maps.agg, p.agg, images);
    return make.template launch<forward_kernel<Traits>>(maps, blocks, 1, stream);
  });
}

}  // namespace fastproto::cuda::sm90
