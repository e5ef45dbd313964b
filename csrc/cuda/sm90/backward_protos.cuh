// SPDX-License-Identifier: Apache-2.0
// dP of 64 prototypes of one bag, summed over its queries. Symbols as in docs/math.md; the same
// algebra as backward_protos_kernel of fastproto/op/triton/backward.py.
//
//   S^T = P F^T      group 0                    dA^T = P dO^T    group 1
//   dS  = w (dA - delta) / t                    each group for half of the pixels
//   acc += (w 2^k) dO + (dS r(P) 2^k r(F)) F    each group for half of the channels
//
// Budget (D = 512)
//   tile      64 prototypes x 64 pixels x all channels
//   threads   2 consuming warpgroups, 232 registers each (64 x 256 accumulators: 128), and one of
//             producing warps: boxes of F and dY2; dO = dY2 * F in its place (2); statistics
//   shared    P 64 KiB (dP behind), a ring of 9 pairs of boxes 144 KiB, exchange 16 KiB
//   products  4 x 1024 cycles a tile; operands are read from shared memory at its full rate
//   traffic   128 KiB a tile, from the L2 cache where a bag has more tiles: 32 bytes a cycle
//
// Where that is too few blocks for the chip, those of a cluster take turns at the tiles of pixels
// and add up their accumulators (backward_tiles.cuh).
#pragma once

#include "backward_protos_loads.cuh"

namespace fastproto::cuda::sm90 {

// dP from the accumulator and its sums, in the place of P; then to rows of whole vectors.
template <class Traits>
FP_DEVICE void finish_pixel_tiles(const BackwardParams& p, const BackwardProtosMaps& maps,
                                  const BackwardProtosShared<Traits>& shared,
                                  const float (&acc)[Traits::kOwned][32], float (&sum_cos)[2],
                                  float (&sum_mean)[2]) {
  using T = typename Traits::T;
  const Problem& s = p.problem;
  const int index = thread_index_again(), group = index / 128, thread = index % 128;
  const int warp = thread / 32, lane = thread % 32, row = 16 * warp + lane / 4;  // and row + 8
  float* parts = reinterpret_cast<float*>(shared.exchange);
  sync_some(kConsumersBarrier, kConsumers);
  share_sums(parts, group, row, lane, sum_cos, sum_mean);
  const int base = fragment_base<true>(warp, lane);
  const int first = shared.place[0], end = shared.place[1];
  finish_products(maps.turns, shared.ring, group, thread, acc, [&](const auto& for_boxes) {
    shared_sums(maps.turns, parts, row, sum_cos, sum_mean);
    const RowEnd row_end(shared.rows, row, s.eps, sum_cos, sum_mean,
                         [&](int r) { return shared.power_of(r, s.eps); });
    for_boxes([&](int index, const float (&sum)[32]) {
      uint8_t* box = shared.protos + index * kBoxBytes;
      row_end.finish_box<T, true>(box, base, sum);
      sync_warp();
      const int piece = lane % 8, channel = index * kBox + 8 * piece;
      FP_UNROLL
      for (int i = 0; i < 16; i += 4) {
        const int r = 16 * warp + i + lane / 8;
        if (first + r < end && channel < s.dim)
          *reinterpret_cast<Vector16*>(static_cast<T*>(p.grad_protos) + int64_t(first + r) * s.dim +
                                       channel) =
              *reinterpret_cast<const Vector16*>(box + box_offset(r, piece));
      }
    });
  });
}

template <class Traits>
FP_DEVICE void consume_pixel_tiles(const BackwardParams& p, const BackwardProtosMaps& maps,
                                   const BackwardProtosShared<Traits>& shared) {
  using T = typename Traits::T;
  using Place = Places<Traits::kRing>;
  constexpr bool kChannelsLast = Traits::kChannelsLast;
  constexpr int kOwned = Traits::kOwned;
  const Problem& s = p.problem;
  const int warp = warp_index() % 4, group = warp_index() / 4, lane = lane_index();
  const int thread = thread_index() % 128;
  const int row = 16 * warp + lane / 4;  // and row + 8

  // Descriptors of the operands: with 64 numbers of M or N, `leading` says nothing.
  const uint64_t protos = matrix_descriptor(shared.protos, 0, 1024);
  const uint64_t ring = matrix_descriptor(shared.ring, 0, 1024);

  float acc[kOwned][32] = {};
  float sum_cos[2] = {0, 0};   // sum_i dS c
  float sum_mean[2] = {0, 0};  // sum_i dS r(F) mean(F), scaled as the accumulator

  barrier_wait(shared.protos_full, 0);
  const uint32_t tiles = tiles_of_block(s, maps.turns);
  for (uint32_t tile = 0; tile < tiles; ++tile) {
    const uint32_t count = tile * Traits::kBoxes;  // pairs of boxes that went through the ring
    float frag[32];
    Barrier* ready = group == 0 ? shared.ring_full : shared.ring_formed;
    FP_UNROLL
    for (int position = 0; position < Traits::kBoxes; ++position) {
      const int slot = Place::slot(count + position);
      const uint64_t a = advance(protos, box_at<Traits::kBoxes>(position) * kBoxBytes);
      const uint64_t b = advance(ring, slot * Traits::kPairBytes + group * kBoxBytes);
      barrier_wait(ready + slot, Place::parity(count + position));
      multiply_boxes<T, false, !kChannelsLast>(frag, a, b, position == 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(frag);

    float own[16];
    send_products(shared.exchange, group, warp, thread, frag, own);

    const float* stats = shared.stats + (tile & 1) * 4 * kBox + 32 * group + lane % 4 * 2;
    barrier_wait(shared.stats_full + (tile & 1), tile >> 1 & 1);
    const float scale = shared.scale[0], gradient_scale = scale * kLn2;  // 1 / t
    float dim_mean_p[2], rnorm_p[2], rnorm_power[2], power[2];
    FP_UNROLL
    for (int h = 0; h < 2; ++h) {
      dim_mean_p[h] = float(s.dim) * shared.rows[row + 8 * h];
      rnorm_p[h] = shared.rows[kBox + row + 8 * h];
      power[h] = shared.power_of(row + 8 * h, s.eps);
      rnorm_power[h] = of_constant(rnorm_p[h], s.eps) * power[h];
    }
    uint32_t mine[16], theirs[16];  // [4 k + h]: w, [4 k + 2 + h]: dS
    FP_UNROLL
    for (int k = 0; k < 4; ++k) {
      const Vector16 received = received_products(shared.exchange, group, thread, k);
      float mean_q[2], rnorm_q[2], lse[2], delta[2];
      FP_UNROLL
      for (int e = 0; e < 2; ++e) {
        mean_q[e] = stats[8 * k + e];
        rnorm_q[e] = stats[kBox + 8 * k + e];
        lse[e] = stats[2 * kBox + 8 * k + e];
        delta[e] = stats[3 * kBox + 8 * k + e];
      }
      FP_UNROLL
      for (int h = 0; h < 2; ++h) {
        float weight[2], coefficient[2], terms = 0;
        FP_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int i = 4 * k + 2 * h + e;
          const float other = bits_to_float(received.x[2 * h + e]);
          const float product = group == 0 ? own[i] : other;
          const float grad_weight = group == 0 ? other : own[i];
          const float cos = (product - dim_mean_p[h] * mean_q[e]) * (rnorm_p[h] * rnorm_q[e]);
          const float w = exp2_fast(multiply_add(cos, scale, -lse[e]));
          const float grad_cos = w * (grad_weight - delta[e]) * gradient_scale;
          terms = e == 0 ? grad_cos * cos : multiply_add(grad_cos, cos, terms);
          weight[e] = w * power[h];
          // A constant pixel has c = 0 whatever P is: its reciprocal norm is 0 here.
          coefficient[e] = grad_cos * (rnorm_power[h] * rnorm_q[e]);
        }
        mine[4 * k + h] = pack<T>(weight[0], weight[1]);
        sum_cos[h] += terms;  // short chains: long ones hold registers
        // The means come out of the sum with the rounded coefficients that went into it.
        const uint32_t pair = pack<T>(coefficient[0], coefficient[1]);
        float rounded[2];
        unpack<T>(pair, &rounded[0], &rounded[1]);
        sum_mean[h] += multiply_add(rounded[1], mean_q[1], rounded[0] * mean_q[0]);
        mine[4 * k + 2 + h] = pair;
      }
    }
    sync_warp();
    if (lane == 0) barrier_arrive(shared.stats_empty + (tile & 1));
    exchange_coefficients(shared.exchange, group, warp, thread, mine, theirs);

    // acc += w dO + dS F. Group 0 saw F alone so far.
    FP_UNROLL
    for (int q = 0; q < kOwned; ++q) {
      const int slot = Place::slot(count + 2 * q + group);
      const uint64_t b = advance(ring, slot * Traits::kPairBytes);
      if (group == 0) barrier_wait(shared.ring_formed + slot, Place::parity(count + 2 * q));
      wgmma_begin();
      FP_UNROLL
      for (int i = 0; i < 4; ++i) {
        // The weights belong to dO, the second box of a pair.
        const int step = i / 2, from = 8 * step + i % 2 * 2;
        const int box = i % 2 == 0 ? kBoxBytes : 0;
        const uint32_t a[4] = {mine[from], mine[from + 1], mine[from + 4], mine[from + 5]};
        const uint32_t c[4] = {theirs[from], theirs[from + 1], theirs[from + 4], theirs[from + 5]};
        Wgmma<T, 64, false, kChannelsLast>::run(
            acc[q], a, advance(b, box + (2 * group + step) * kStepBytes<kChannelsLast>), 1);
        Wgmma<T, 64, false, kChannelsLast>::run(
            acc[q], c, advance(b, box + (2 - 2 * group + step) * kStepBytes<kChannelsLast>), 1);
      }
      wgmma_commit();
    }
    release_in_turn<kOwned>([&](int q) {
      if (lane == 0) barrier_arrive(shared.ring_empty + Place::slot(count + 2 * q + group));
    });
    FP_UNROLL
    for (int q = 0; q < kOwned; ++q) wgmma_hold(acc[q]);
  }

  finish_pixel_tiles(p, maps, shared, acc, sum_cos, sum_mean);
}

template <class Traits>
FP_KERNEL FP_LAUNCH_BOUNDS(Traits::kThreads, 1)
    backward_protos_kernel(FP_GRID_CONSTANT BackwardParams p,
                           FP_GRID_CONSTANT BackwardProtosMaps maps) {
  const Problem& s = p.problem;
  const BackwardProtosShared<Traits> shared;
  const ProtoTile at(s, p.offsets, maps.turns.cluster_index());
  if (at.first >= at.end) return;  // more than the bag needs
  // Rows of no bag may hold anything, their gradient is zero; offsets that make no sense give NaN.
  if (!at.is_bag || at.begin < 0 || at.end > s.total) {
    using T = typename Traits::T;
    const uint32_t fill = at.is_bag ? pack<T>(not_a_number(), not_a_number()) : 0;
    Vector16* to =
        reinterpret_cast<Vector16*>(static_cast<T*>(p.grad_protos) + int64_t(at.first) * s.dim);
    for (int i = thread_index(); i < kBox * s.dim / 8; i += Traits::kThreads) {
      const int row = at.first + i / (s.dim / 8);
      if (row >= 0 && row < at.end && row < s.total) to[i] = {{fill, fill, fill, fill}};
    }
    return;
  }
  if (thread_index() == 0) {
    shared.scale[0] = exponent_scale(s, at.end - at.begin);
    shared.place[0] = at.first;
    shared.place[1] = at.end;
    barrier_init(shared.protos_full, 1);
    for (int i = 0; i < Traits::kRing; ++i) barrier_init(shared.ring_formed + i, 32);
    init_ring<Traits::kRing>(shared.ring_full, shared.ring_empty, shared.stats_full,
                             shared.stats_empty);
    barrier_init_fence();
  }
  if (thread_index() < 2 * kBox) {
    const int row = thread_index() % kBox, which = thread_index() / kBox;
    const bool ok = at.first + row < at.end;
    shared.rows[thread_index()] =
        ok ? p.statistics.protos[int64_t(which) * s.total + at.first + row] : 0.f;
  }
  sync_block();

  const int warp = warp_index();
  if (warp >= kConsumers / 32) {
    registers_fewer<Traits::kProducerRegisters>();
    if (warp == 8 && lane_index() == 0) load_pixels<Traits>(s, maps, shared, at);
    if (warp == 9 || warp == 10)
      form_grads<Traits>(shared, tiles_of_block(s, maps.turns) * Traits::kBoxes, warp - 9);
    if (warp == 11) load_pixel_stats<Traits>(p, maps, shared, at);
    attend_sums(maps.turns);
  } else {
    registers_more<Traits::kConsumerRegisters>();
    consume_pixel_tiles<Traits>(p, maps, shared);
  }
}

template <class T>
const char* launch_backward_protos_of(const BackwardParams& p, const KernelPlan& plan,
                                      void* stream) {
  return with_traits<T, BackwardProtosTraits>(p.problem.dim, is_channels_last(p), [&](auto tag) {
    using Traits = typename decltype(tag)::type;
    BackwardProtosMaps maps = {
        {}, {}, {}, MapSteps(p.feat), MapSteps(p.grad_out), Turns(plan.cluster)};
    MapMaker<Traits, BackwardParams> make{p};
    make.features(&maps.feat);
    make.gradients(&maps.enhanced, p.problem.concat ? p.problem.dim : 0);
    make.protos(&maps.protos);
    return make.template launch<backward_protos_kernel<Traits>>(maps, plan.blocks, plan.cluster,
                                                                stream);
  });
}

}  // namespace fastproto::cuda::sm90
