// SPDX-License-Identifier: Apache-2.0
// dF of 64 pixels of one image, summed over its classes, and delta = <dO, G>. Symbols as in
// docs/math.md; the same algebra as backward_query_kernel of fastproto/op/triton/backward.py.
//
//   S  = F P^T       group 0                    dA = dO P^T      group 1
//   dS = w (dA - delta) / t                     each group for half of the prototypes
//   acc += (dS r(F) 2^k r(P)) P                 each group for half of the channels
//
// Budget (D = 512)
//   tile      64 pixels x 64 prototypes x all channels
//   threads   2 consuming warpgroups, 240 registers each (64 x 256 accumulators: 128), and one of
//             producing warps: boxes of G, dY1 and P; of F and dY2; statistics of P
//   shared    F 64 KiB, dO 64 KiB (dY2 before, dF behind), a ring of 10 boxes 80 KiB,
//             exchange 16 KiB
//   products  3 x 1024 cycles a tile; F and dO are read from shared memory at its full rate
//   traffic   F, dY1, dY2, G, dF once per class: bound by memory up to N = 256 or so
//
// Where that is too few blocks for the chip, those of a cluster take turns at the tiles of
// prototypes and add up their accumulators (backward_tiles.cuh). Each forms dO and delta anew; rank
// 0 adds dY1 + dY2 G.
#pragma once

#include <type_traits>

#include "backward_query_loads.cuh"

namespace fastproto::cuda::sm90 {

// dF from the accumulator and its sums, in the place of F.
template <class Traits>
FP_DEVICE void finish_query_tiles(const BackwardParams& p, const BackwardQueryMaps& maps,
                                  const BackwardQueryShared<Traits>& shared,
                                  const float (&acc)[Traits::kOwned][32], float (&sum_cos)[2],
                                  float (&sum_mean)[2]) {
  using T = typename Traits::T;
  constexpr bool kChannelsLast = Traits::kChannelsLast;
  constexpr int kOwned = Traits::kOwned;
  const Problem& s = p.problem;
  const int index = thread_index_again(), group = index / 128, thread = index % 128;
  const int warp = thread / 32, lane = thread % 32, row = 16 * warp + lane / 4;  // and row + 8
  const int base = fragment_base<kChannelsLast>(warp, lane);

  sync_some(kConsumersBarrier, kConsumers);  // delta's parts were read
  float* parts = shared.sums;
  share_sums(parts, group, row, lane, sum_cos, sum_mean);
  if (p.temperature_terms != nullptr && group == 0 && warp == 0) {
    float sum = (parts[lane] + parts[kBox + lane]) + (parts[lane + 32] + parts[kBox + lane + 32]);
    for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) p.temperature_terms[block_index()] = sum;
  }
  // What the sums of a cluster take lies where dO was, and in the ring behind it.
  finish_products(maps.turns, shared.grad, group, thread, acc, [&](const auto& for_boxes) {
    shared_sums(maps.turns, parts, row, sum_cos, sum_mean);
    const RowEnd end(shared.rows, row, s.eps, sum_cos, sum_mean,
                     [&](int r) { return shared.power_of(r, s.eps); });
    for_boxes([&](int box, const float (&sum)[32]) {
      end.finish_box<T, kChannelsLast>(shared.feat + box * kBoxBytes, base, sum);
    });
  });
  fence_async();
  sync_some(kGroupBarrier + group, 128);
  if (thread == 0) {
    const int first = shared.place[0];
    for (int q = 0; q < kOwned; ++q) {
      const int box = group * kOwned + q;
      if (box * kBox < s.dim && q % maps.turns.size() == maps.turns.rank())
        tma_store(&maps.grad_feat, shared.feat + box * kBoxBytes,
                  kChannelsLast ? box * kBox : first, kChannelsLast ? first : box * kBox,
                  shared.place[1]);
    }
    tma_store_commit();
    tma_store_wait<0>();
  }
}

// Of a class: dO in the place of dY2; delta; dY1 + dY2 G into the accumulator. A loop: unrolled,
// the compiler mixes the boxes and runs out of registers.
template <class Traits>
FP_DEVICE void form_grads(const BackwardQueryMaps& maps, const BackwardQueryShared<Traits>& shared,
                          bool concat, int way, uint32_t count, int group, int base,
                          const float (&power)[2], float (&acc)[Traits::kOwned][32],
                          float (&delta)[2]) {
  using T = typename Traits::T;
  using Place = Places<Traits::kRing>;
  constexpr bool kChannelsLast = Traits::kChannelsLast;
  constexpr int kOwned = Traits::kOwned;
  const int lane = lane_index();
  FP_NO_UNROLL
  for (int q = 0; q < kOwned; ++q) {
    // Boxes of this class take the places of some that the other group had: it has seen them
    // come, or the parity of their places would say nothing.
    if (Traits::kRing < 2 * Traits::kBoxes && concat && q == kOwned / 2)
      sync_some(kConsumersBarrier, kConsumers);
    float direct[32];
    const int box = group * kOwned + q;
    const uint32_t item = count + (2 * q + group) * (concat ? 2 : 1);
    barrier_wait(shared.grad_full + box, way & 1);
    barrier_wait(shared.ring_full + Place::slot(item), Place::parity(item));
    if (concat) barrier_wait(shared.ring_full + Place::slot(item + 1), Place::parity(item + 1));
    const uint8_t* feat = shared.feat + box * kBoxBytes;
    uint8_t* grad = shared.grad + box * kBoxBytes;
    const uint8_t* agg = shared.ring + Place::slot(item) * kBoxBytes;
    // Without dY1 something that may be read.
    const uint8_t* copy = concat ? shared.ring + Place::slot(item + 1) * kBoxBytes : agg;
    FP_UNROLL
    for (int step = 0; step < 4; ++step) {
      const int offset = fragment_offset<kChannelsLast>(base, step);
      uint32_t f[4], dy[4], g[4], dy1[4];
      load_matrix<!kChannelsLast>(f, feat + offset);
      load_matrix<!kChannelsLast>(dy, grad + offset);
      load_matrix<!kChannelsLast>(g, agg + offset);
      load_matrix<!kChannelsLast>(dy1, copy + offset);
      FP_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int h = i & 1;
        const int c = 8 * step + 4 * (i / 2) + 2 * h;
        f[i] = multiply_pairs<T>(dy[i], f[i]);
        float do0, do1, dy0, dy1_, g0, g1, y0, y1;
        unpack<T>(f[i], &do0, &do1);
        unpack<T>(dy[i], &dy0, &dy1_);
        unpack<T>(g[i], &g0, &g1);
        unpack<T>(concat ? dy1[i] : 0u, &y0, &y1);
        // One addition: in a longer chain the products would wait in registers.
        delta[h] += multiply_add(do1, g1, do0 * g0);
        direct[c] = multiply_add(dy0, g0, y0) * power[h];
        direct[c + 1] = multiply_add(dy1_, g1, y1) * power[h];
      }
      store_matrix<!kChannelsLast>(grad + offset, f);
    }
    FP_UNROLL
    for (int each = 0; each < kOwned; ++each)
      if (each == q && maps.turns.rank() == 0) {
        FP_UNROLL
        for (int i = 0; i < 32; ++i) acc[each][i] += direct[i];
      }
    sync_warp();
    if (lane == 0) {
      barrier_arrive(shared.ring_empty + Place::slot(item));
      if (concat) barrier_arrive(shared.ring_empty + Place::slot(item + 1));
    }
  }
}

template <class Traits>
FP_DEVICE void consume_query_tiles(const BackwardParams& p, const BackwardQueryMaps& maps,
                                   const BackwardQueryShared<Traits>& shared) {
  using T = typename Traits::T;
  using Place = Places<Traits::kRing>;
  constexpr bool kChannelsLast = Traits::kChannelsLast;
  constexpr int kOwned = Traits::kOwned;
  constexpr int kAhead = Traits::kAhead;
  const Problem& s = p.problem;
  const int warp = warp_index() % 4, group = warp_index() / 4, lane = lane_index();
  const int thread = thread_index() % 128;
  const int row = 16 * warp + lane / 4;  // and row + 8
  const int base = fragment_base<kChannelsLast>(warp, lane);

  // Descriptors of the operands: with 64 numbers of M or N, `leading` says nothing.
  const uint64_t rows = matrix_descriptor(group == 0 ? shared.feat : shared.grad, 0, 1024);
  const uint64_t ring = matrix_descriptor(shared.ring, 0, 1024);

  float acc[kOwned][32] = {};
  float sum_cos[2] = {0, 0};   // sum_j dS c
  float sum_mean[2] = {0, 0};  // sum_j dS r(P) mean(P), scaled as the accumulator
  uint32_t count = 0;          // boxes that went through the ring
  uint32_t tile = 0;

  for (int way = 0; way < s.ways; ++way) {
    // Computed anew wherever it is wanted: kept, it costs the registers that the rest just has.
    const auto at = [&] { return PixelTile(s, maps.turns.cluster_index()); };
    const Bag bag = load_bag(p.offsets, at().episode * s.ways + way, s.total);
    const float scale = bag.valid ? exponent_scale(s, bag.count) : not_a_number();  // log2(e) / t
    // A bag whose offsets make no sense: its pixels get NaN, as in the forward.
    if (!bag.valid) sum_cos[0] = sum_cos[1] = not_a_number();
    const auto has_pixel = [&](int h) { return at().first + row + 8 * h < s.pixels; };
    // In the statistics of the maps.
    const auto pixel_at = [&](int h) {
      return int64_t(at().image * s.ways + way) * s.pixels + at().first + row + 8 * h;
    };
    float lse[2], delta[2] = {0, 0}, power[2];
    FP_UNROLL
    for (int h = 0; h < 2; ++h) lse[h] = has_pixel(h) ? p.statistics.lse[pixel_at(h)] : 0.f;

    FP_UNROLL
    for (int h = 0; h < 2; ++h) power[h] = shared.power_of(row + 8 * h, s.eps);

    form_grads(maps, shared, s.concat, way, count, group, base, power, acc, delta);
    count += Traits::kBoxes * (s.concat ? 2 : 1);
    float* parts = shared.sums + (way & 1) * 2 * kBox;
    FP_UNROLL
    for (int h = 0; h < 2; ++h) {
      delta[h] = sum_of_quad(delta[h]);
      if (lane % 4 == 0) parts[group * kBox + row + 8 * h] = delta[h];
    }
    fence_async();
    sync_some(kConsumersBarrier, kConsumers);
    FP_UNROLL
    for (int h = 0; h < 2; ++h) {
      delta[h] = parts[row + 8 * h] + parts[kBox + row + 8 * h];
      if (group == 0 && lane % 4 == 0 && has_pixel(h) && maps.turns.rank() == 0)
        p.delta[pixel_at(h)] = delta[h];
    }

    const float gradient_scale = scale * kLn2;  // 1 / t
    float frag[32];
    const auto multiply = [&](uint32_t from, int begin, int end) {
      FP_UNROLL
      for (int position = begin; position < end; ++position) {
        const int slot = Place::slot(from + position);
        const uint64_t a = advance(rows, box_at<Traits::kBoxes>(position) * kBoxBytes);
        const uint64_t b = advance(ring, slot * kBoxBytes);
        barrier_wait(shared.ring_full + slot, Place::parity(from + position));
        multiply_boxes<T, !kChannelsLast, false>(frag, a, b, position == 0);
      }
      if (begin < end) wgmma_commit();  // an empty group would be a product of its own
    };
    float own[16];
    const auto finish = [&](uint32_t from) {
      multiply(from, kAhead, Traits::kBoxes);
      wgmma_wait<0>();
      wgmma_hold(frag);
      send_products(shared.exchange, group, warp, thread, frag, own);
    };
    // One tile, whose products are there; those of the next one begin with the boxes that the ring
    // has already, meanwhile. Nothing is under way from one call to the next: the compiler would
    // wait for it.
    const auto consume = [&](int remaining, auto is_last) {
      constexpr bool kLast = decltype(is_last)::value;
      if constexpr (!kLast) multiply(count + Traits::kBoxes, 0, kAhead);

      const float* stats = shared.stats + (tile & 1) * 2 * kBox + 32 * group + lane % 4 * 2;
      const int column = 32 * group + lane % 4 * 2;
      barrier_wait(shared.stats_full + (tile & 1), tile >> 1 & 1);
      float dim_mean_q[2], rnorm_q[2], rnorm_power[2], delta[2];
      FP_UNROLL
      for (int h = 0; h < 2; ++h) {
        delta[h] = parts[row + 8 * h] + parts[kBox + row + 8 * h];
        dim_mean_q[h] = float(s.dim) * shared.rows[row + 8 * h];
        rnorm_q[h] = shared.rows[kBox + row + 8 * h];
        rnorm_power[h] = of_constant(rnorm_q[h], s.eps) * shared.power_of(row + 8 * h, s.eps);
      }
      uint32_t mine[8], theirs[8];
      FP_UNROLL
      for (int k = 0; k < 4; ++k) {
        const Vector16 received = received_products(shared.exchange, group, thread, k);
        const float mean_p[2] = {stats[8 * k], stats[8 * k + 1]};
        const float rnorm_p[2] = {stats[kBox + 8 * k], stats[kBox + 8 * k + 1]};
        FP_UNROLL
        for (int h = 0; h < 2; ++h) {
          float coefficient[2], terms = 0;
          FP_UNROLL
          for (int e = 0; e < 2; ++e) {
            const int i = 4 * k + 2 * h + e;
            const bool ok = !kLast || column + 8 * k + e < remaining;
            const float other = bits_to_float(received.x[2 * h + e]);
            const float product = group == 0 ? own[i] : other;
            const float grad_weight = group == 0 ? other : own[i];
            float cos = (product - dim_mean_q[h] * mean_p[e]) * (rnorm_q[h] * rnorm_p[e]);
            cos = ok ? cos : 0.f;
            const float w = exp2_fast(multiply_add(cos, scale, -lse[h]));
            float grad_cos = w * (grad_weight - delta[h]) * gradient_scale;
            grad_cos = ok ? grad_cos : 0.f;
            terms = e == 0 ? grad_cos * cos : multiply_add(grad_cos, cos, terms);
            // A constant prototype has c = 0 whatever F is: its reciprocal norm is 0 here.
            coefficient[e] = grad_cos * (rnorm_power[h] * rnorm_p[e]);
          }
          sum_cos[h] += terms;  // short chains: long ones hold registers
          // The means come out of the sum with the rounded coefficients that went into it.
          const uint32_t pair = pack<T>(coefficient[0], coefficient[1]);
          float rounded[2];
          unpack<T>(pair, &rounded[0], &rounded[1]);
          sum_mean[h] += multiply_add(rounded[1], mean_p[1], rounded[0] * mean_p[0]);
          mine[2 * k + h] = pair;
        }
      }
      sync_warp();
      if (lane == 0) barrier_arrive(shared.stats_empty + (tile & 1));
      exchange_coefficients(shared.exchange, group, warp, thread, mine, theirs);

      if (kLast && remaining < kBox) {
        // The rows behind the bag may hold anything, and 0 * NaN is no 0.
        sync_some(kConsumersBarrier, kConsumers);
        for (int q = 0; q < kOwned; ++q) {
          uint8_t* box = shared.ring + Place::slot(count + 2 * q + group) * kBoxBytes;
          for (int i = remaining * 8 + thread; i < kBox * 8; i += 128)
            reinterpret_cast<Vector16*>(box)[i] = {0, 0, 0, 0};
        }
        fence_async();
        sync_some(kGroupBarrier + group, 128);
      }

      FP_UNROLL
      for (int q = 0; q < kOwned; ++q) wgmma_hold(acc[q]);
      wgmma_begin();
      FP_UNROLL
      for (int q = 0; q < kOwned; ++q) {
        const uint64_t b = advance(ring, Place::slot(count + 2 * q + group) * kBoxBytes);
        const auto add = [&](const uint32_t (&x)[8], int from) {
          FP_UNROLL
          for (int step = 0; step < 2; ++step) {
            const uint32_t a[4] = {x[4 * step], x[4 * step + 1], x[4 * step + 2], x[4 * step + 3]};
            Wgmma<T, 64, false, true>::run(acc[q], a, advance(b, (from + step) * kStepBytes<true>),
                                           1);
          }
        };
        add(mine, 2 * group);
        add(theirs, 2 - 2 * group);
        wgmma_commit();
      }
      release_in_turn<kOwned>([&](int q) {
        if (lane == 0) barrier_arrive(shared.ring_empty + Place::slot(count + 2 * q + group));
      });
      FP_UNROLL
      for (int q = 0; q < kOwned; ++q) wgmma_hold(acc[q]);
      count += Traits::kBoxes;
      ++tile;
      if constexpr (!kLast) finish(count);
    };
    int remaining = bag.count - maps.turns.rank() * kBox;
    if (remaining > 0) {
      multiply(count, 0, kAhead);
      finish(count);
      for (; remaining > maps.turns.size() * kBox; remaining -= maps.turns.size() * kBox)
        consume(remaining, std::false_type());
    }
    if (lane == 0) barrier_arrive(shared.grad_empty);
    if (remaining > 0) consume(remaining, std::true_type());
  }

  finish_query_tiles(p, maps, shared, acc, sum_cos, sum_mean);
}

template <class Traits>
FP_KERNEL FP_LAUNCH_BOUNDS(Traits::kThreads, 1)
    backward_query_kernel(FP_GRID_CONSTANT BackwardParams p,
                          FP_GRID_CONSTANT BackwardQueryMaps maps) {
  const BackwardQueryShared<Traits> shared;
  const PixelTile at(p.problem, maps.turns.cluster_index());
  if (thread_index() == 0) {
    shared.place[0] = at.first;
    shared.place[1] = at.image;
    for (int i = 0; i < Traits::kBoxes; ++i) barrier_init(shared.grad_full + i, 1);
    barrier_init(shared.grad_empty, 8);
    init_ring<Traits::kRing>(shared.ring_full, shared.ring_empty, shared.stats_full,
                             shared.stats_empty);
    barrier_init_fence();
  }
  if (thread_index() < 2 * kBox) {
    const int row = thread_index() % kBox, which = thread_index() / kBox;
    const bool ok = at.first + row < p.problem.pixels;
    const int64_t from = (int64_t(at.image) * 2 + which) * p.problem.pixels + at.first + row;
    shared.rows[thread_index()] = ok ? p.statistics.query[from] : 0.f;
  }
  sync_block();

  const int warp = warp_index();
  if (warp >= kConsumers / 32) {
    registers_fewer<Traits::kProducerRegisters>();
    if (warp == 8 && lane_index() == 0) load_ring<Traits>(p, maps, shared, at);
    if (warp == 9 && lane_index() == 0) load_grads<Traits>(p, maps, shared, at);
    if (warp == 10) load_proto_stats<Traits>(p, maps, shared, at);
    attend_sums(maps.turns);
  } else {
    registers_more<Traits::kConsumerRegisters>();
    consume_query_tiles<Traits>(p, maps, shared);
  }
}

template <class T>
const char* launch_backward_query_of(const BackwardParams& p, const KernelPlan& plan,
                                     void* stream) {
  return with_traits<T, BackwardQueryTraits>(p.problem.dim, is_channels_last(p), [&](auto tag) {
    using Traits = typename decltype(tag)::type;
    const Problem& s = p.problem;
    const int64_t images = int64_t(s.episodes) * s.queries;
    BackwardQueryMaps maps = {
        {}, {}, {}, {}, {}, {}, MapSteps(p.feat), MapSteps(p.grad_out), Turns(plan.cluster)};
    MapMaker<Traits, BackwardParams> make{p};
    make.features(&maps.feat);
    make.gradients(&maps.enhanced, s.concat ? s.dim : 0);
    make.gradients(&maps.copy, 0);
    make.dense(&maps.agg, p.agg, images * s.ways);
    make.dense(&maps.grad_feat, p.grad_feat, images);
    make.protos(&maps.protos);
    return make.template launch<backward_query_kernel<Traits>>(maps, plan.blocks, plan.cluster,
                                                               stream);
  });
}

}  // namespace fastproto::cuda::sm90
