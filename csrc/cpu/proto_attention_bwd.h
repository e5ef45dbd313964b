// SPDX-License-Identifier: Apache-2.0
// Backward of proto_attention: five matrix products. Symbols as in docs/math.md.
//
// A task is a strip of pixels of one image with all its bags. Per block of prototypes:
//     S^T = Pc . Fc,  dA^T = Pc . dO          both [rows, W]
//     dF^T [D, W]  += Pc^T . dS'              dS' = dS rp rq
//     dP [rows, D] += [A | dS'] . [dO ; Fc]   one product of depth 2 W
// dF belongs to the task. dP is added up by all tasks of an episode, each block of it in the order
// of the tasks: a task waits for the one before to be done with the block. Tasks are handed out in
// that order, so whoever is waited for is running; after the first blocks nobody waits. The order
// of all sums, and with it every bit of the result, depends on the problem alone.
#pragma once

#include <sched.h>

#include "proto_attention_fwd.h"

namespace fastproto::cpu {
namespace {

template <class Acc>
struct BwdScratch {
  Tiling tiling;
  Acc* centred;      // [D][W]
  Acc* grad_out;     // [D][W] dO of the current bag
  Acc* grad_feat;    // [D][W] sums of all bags
  Acc* transposed;   // [2 W][row_stride(D)] dO, then Fc
  Acc* protos;       // [kBlockProtos][row_stride(D)] centred
  Acc* weights;      // [kBlockProtos][2 W] A, then dS'
  Acc* grad_scores;  // [kBlockProtos][W]
  ProtoStats<Acc>* block;
  PixelStats<Acc>* pixels;
  int64_t bytes;

  BwdScratch(void* memory, int64_t dim, Tiling t) : tiling(t) {
    const int64_t width = t.width, stride = row_stride<Acc>(dim);
    Scratch scratch(memory);
    centred = scratch.take<Acc>(dim * width);
    grad_out = scratch.take<Acc>(dim * width);
    grad_feat = scratch.take<Acc>(dim * width);
    transposed = scratch.take<Acc>(2 * width * stride);
    protos = scratch.take<Acc>(kBlockProtos * stride);
    weights = scratch.take<Acc>(kBlockProtos * 2 * width);
    grad_scores = scratch.take<Acc>(kBlockProtos * width);
    block = scratch.take<ProtoStats<Acc>>(1);
    pixels = scratch.take<PixelStats<Acc>>(1);
    bytes = scratch.bytes();
  }
};

// Per-pixel sums of the incoming gradient of one (image, class).
template <class Acc>
struct GradStats {
  Acc delta[kMostPixels];     // <dO, Gc>
  Acc total[kMostPixels];     // sum over channels of dO
  Acc agg_mean[kMostPixels];  // sum_j A_j (mean(P_j) - origin), so that G = Gc + origin + agg_mean
  Acc origin;                 // see mean_origin
  Acc bound[kMostPixels];
  Acc rsum[kMostPixels];
  Acc along[kMostPixels];  // sum_j dS_j c_j over all bags so far
};

template <class T>
class BackwardTask {
 public:
  using Acc = AccOf<T>;
  static constexpr int L = kLanes<Acc>;

  BackwardTask(const ProtoAttnBwdParams& p, const BackwardPass& pass, const BwdScratch<Acc>& s,
               int64_t task)
      : p_(p), pass_(pass), s_(s), task_(task), dim_(p.shape.dim), width_(pass.tiling.width) {
    const int64_t tiles = pass.tiling.tiles(p.shape);
    image_ = task / tiles;
    pixel_ = task % tiles * width_;
    count_ = p.shape.pixels - pixel_ < width_ ? p.shape.pixels - pixel_ : width_;
    episode_ = image_ / p.shape.queries;
    const int64_t per_episode = p.shape.queries * tiles;
    first_of_episode_ = task % per_episode == 0;
    last_of_episode_ = task % per_episode == per_episode - 1;
  }

  void run() {
    const bool want_protos = pass_.begin < pass_.end;
    centre_pixels<T>(feat(), dim_, width_, Acc(p_.shape.eps), s_.centred, s_.pixels);
    if (want_protos) transpose_panel(s_.centred, dim_, width_, bottom_of_transposed());
    for (int64_t x = 0; x < width_; ++x) g_.along[x] = 0;
    for (int64_t way = 0; way < p_.shape.ways; ++way) {
      const int64_t bag = episode_ * p_.shape.ways + way;
      const int64_t begin = p_.bags.offsets[bag], end = p_.bags.offsets[bag + 1];
      const bool blocks = want_protos && begin < pass_.end && end > pass_.begin;
      if (!blocks && !pass_.want_feat) continue;
      load_grad(way, begin, end);
      if (begin == end) continue;  // G = 0: nothing but dY1 reaches F
      if (blocks) transpose_panel(s_.grad_out, dim_, width_, s_.transposed);
      if (pass_.want_feat && !blocks)
        run_blocks(begin, end, begin, end, false);
      else
        run_blocks(begin, end, begin > pass_.begin ? begin : pass_.begin,
                   end < pass_.end ? end : pass_.end, true);
    }
    if (pass_.want_feat) finish_feat();
  }

 private:
  TileView<const T> feat() const {
    return tile_of<T>(p_.feat, episode_, image_ % p_.shape.queries, pixel_, count_);
  }
  Acc* bottom_of_transposed() const { return s_.transposed + width_ * row_stride<Acc>(dim_); }

  // s.grad_out = dY2 * F; s.grad_feat += dY1 + dY2 * G; and the sums over channels.
  void load_grad(int64_t way, int64_t begin, int64_t end) {
    const int64_t map = image_ * p_.shape.ways + way, pixels = p_.shape.pixels;
    const auto view = [&](const Maps& maps, int64_t channel) {
      const auto tile = tile_of<T>(maps, map, channel, pixel_, count_);
      return TileView<const T>{tile.data, tile.stride_channel, tile.stride_pixel, count_};
    };
    const auto lower = view(p_.grad_out, 0);
    const auto upper = view(p_.grad_out, p_.shape.concat ? dim_ : 0);
    const auto saved = tile_of<Acc>(p_.agg, map, 0, pixel_, count_);
    const TileView<const Acc> agg{saved.data, saved.stride_channel, saved.stride_pixel, count_};
    const auto feature = feat();
    // A bag of one is not centred (forward).
    g_.origin = end - begin > 1 ? mean_origin<T>(p_.bags, begin, dim_) : Acc(0);
    const Acc* stats = static_cast<const Acc*>(p_.stats) + 3 * map * pixels + pixel_;
    Acc mean[kMostPixels];
    PixelSums<Acc> deltas, totals;
    for (int64_t x = 0; x < width_; ++x) {
      const bool inside = x < count_;
      g_.bound[x] = inside ? stats[x] : Acc(0);
      g_.rsum[x] = inside ? stats[pixels + x] : Acc(0);
      g_.agg_mean[x] = inside ? stats[2 * pixels + x] : Acc(0);
      mean[x] = g_.agg_mean[x] + g_.origin;
    }
    const bool concat = p_.shape.concat, first = way == 0, want_feat = pass_.want_feat;
    for_blocks<Acc>(dim_, width_, [&](int64_t d, int64_t x, auto channels) {
      Vec<Acc> grad[L], f[L], gc[L];
      prefetch_block<false>(upper, dim_, d + L, x);
      prefetch_block<false>(agg, dim_, d + L, x);
      if (want_feat && concat) prefetch_block<false>(lower, dim_, d + L, x);
      load_block<T>(upper, d, x, channels, grad);
      load_block<T>(feature, d, x, channels, f);
      load_block<Acc>(agg, d, x, channels, gc);
      Vec<Acc> delta = {}, total = {};
      repeat(channels, [&](int i) {
        const Vec<Acc> grad_o = grad[i] * f[i];
        store(s_.grad_out + (d + i) * width_ + x, grad_o);
        delta += grad_o * gc[i];
        total += grad_o;
      });
      deltas.add(d, x, delta);
      totals.add(d, x, total);
      if (!want_feat) return;
      if (concat)
        load_block<T>(lower, d, x, channels, f);
      else
        for (int i = 0; i < channels; ++i) f[i] = Vec<Acc>{};
      const Vec<Acc> plus = load(mean + x);
      repeat(channels, [&](int i) {
        Acc* at = s_.grad_feat + (d + i) * width_ + x;
        const Vec<Acc> direct = f[i] + grad[i] * (gc[i] + plus);
        store(at, first ? direct : load(at) + direct);
      });
    });
    for (int64_t x = 0; x < width_; x += L) {
      store(g_.delta + x, deltas.get(x));
      store(g_.total + x, totals.get(x));
    }
  }

  // Blocks [from, to) of the bag [begin, end).
  void run_blocks(int64_t begin, int64_t end, int64_t from, int64_t to, bool want_protos) {
    const int64_t stride = row_stride<Acc>(dim_), step = backward_block_rows(p_.shape);
    const bool single = end - begin == 1;
    for (int64_t n = from; n < to; n += step) {
      const int64_t rows = to - n < step ? to - n : step;
      if (!single) load_protos<T>(p_.bags, n, rows, dim_, Acc(p_.shape.eps), s_.protos, s_.block);
      Ahead ahead = rows_ahead<T>(p_.bags, n + rows, to, dim_);
      Acc along[kBlockProtos];  // sum_i dS_i c_i
      score_grads(rows, single, along, &ahead);
      if (pass_.want_feat && !single)
        gemm<Acc>(dim_, width_, rows, {s_.protos, 1, stride}, s_.weights + width_, 2 * width_,
                  s_.grad_feat, width_, true, &ahead);
      if (want_protos) add_to_protos(n, rows, single, along);
    }
  }

  // s.weights = [A | dS rp rq] and the sums of dS c, for the loaded block.
  void score_grads(int64_t rows, bool single, Acc* along, Ahead* ahead) {
    const int64_t stride = row_stride<Acc>(dim_), pitch = 2 * width_;
    if (single) {  // A = 1 whatever the cosine
      for (int64_t x = 0; x < width_; ++x) {
        s_.weights[x] = 1;
        s_.weights[width_ + x] = 0;
      }
      along[0] = 0;
      return;
    }
    const Acc inv_t = Acc(1.0 / p_.shape.temperature);
    gemm<Acc>(rows, width_, dim_, {s_.protos, stride, 1}, s_.centred, width_, s_.weights, pitch,
              false, ahead);
    gemm<Acc>(rows, width_, dim_, {s_.protos, stride, 1}, s_.grad_out, width_, s_.grad_scores,
              width_, false, ahead);
    for (int64_t r = 0; r < rows; ++r) {
      const Acc rnorm = s_.block->rnorm[r], mean = s_.block->mean[r] - g_.origin;
      Vec<Acc> sum = {};
      for (int64_t x = 0; x < width_; x += L) {
        Acc* at = s_.weights + r * pitch + x;
        const Vec<Acc> pixel_rnorm = load(s_.pixels->rnorm + x);
        const Vec<Acc> score = load(at);
        const Vec<Acc> scale = exponent_scale<Acc>(rnorm, inv_t, pixel_rnorm);
        const Vec<Acc> a = softmax_term<Acc>(score, scale, load(g_.bound + x)) * load(g_.rsum + x);
        // <dO, P> - <dO, G>, with both means taken out of the products: they would cancel.
        const Vec<Acc> excess = (load(s_.grad_scores + r * width_ + x) - load(g_.delta + x)) +
                                (mean - load(g_.agg_mean + x)) * load(g_.total + x);
        const Vec<Acc> grad_c = a * excess * inv_t;
        const Vec<Acc> rnorms = rnorm * pixel_rnorm;
        const Vec<Acc> term = grad_c * (score * rnorms);
        store(at, a);
        store(at + width_, grad_c * rnorms);
        store(g_.along + x, load(g_.along + x) + term);
        sum += term;
      }
      along[r] = sum_lanes<Acc>(sum);
    }
  }

  // Adds the block's share of dP when its turn has come.
  void add_to_protos(int64_t n, int64_t rows, bool single, const Acc* along) {
    Acc* sums = static_cast<Acc*>(pass_.sums) + (n - pass_.begin) * dim_;
    Acc* total = static_cast<Acc*>(pass_.along) + (n - pass_.begin);
    if (!first_of_episode_) wait_for_previous();
    gemm<Acc>(rows, dim_, single ? width_ : 2 * width_, {s_.weights, 2 * width_, 1}, s_.transposed,
              row_stride<Acc>(dim_), sums, dim_, !first_of_episode_);
    for (int64_t r = 0; r < rows; ++r)
      total[r] = first_of_episode_ ? along[r] : total[r] + along[r];
    if (last_of_episode_) finish_protos(n, rows, single, sums, total);
    __atomic_store_n(&pass_.done[task_], ++blocks_done_, __ATOMIC_RELEASE);
  }

  void wait_for_previous() const {
    const int32_t* previous = &pass_.done[task_ - 1];
    for (int spins = 0; __atomic_load_n(previous, __ATOMIC_ACQUIRE) <= blocks_done_; ++spins) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
      if (spins > 1000) sched_yield();
    }
  }

  // Takes out the part along the prototype, and stores.
  void finish_protos(int64_t n, int64_t rows, bool single, const Acc* sums, const Acc* total) {
    const int64_t stride = row_stride<Acc>(dim_);
    for (int64_t r = 0; r < rows; ++r) {
      T* dst = static_cast<T*>(p_.grad_protos) + (n + r) * dim_;
      const Acc rnorm = s_.block->rnorm[r];
      const Acc radial = single ? Acc(0) : s_.block->free[r] * rnorm * rnorm * total[r];
      const Acc *sum = sums + r * dim_, *proto = s_.protos + r * stride;
      for (int64_t d = 0; d < dim_; d += L) {
        Vec<Acc> v = load_as(sum + d, dim_ - d);
        if (!single) v -= load(proto + d) * radial;
        store_as(v, dst + d, dim_ - d);
      }
    }
  }

  void finish_feat() {
    double sum = 0;
    for (int64_t x = 0; x < count_; ++x) sum += double(g_.along[x]);
    if (p_.grad_temperature_parts != nullptr)
      p_.grad_temperature_parts[task_] = -sum / p_.shape.temperature;
    Acc radial[kMostPixels];
    for (int64_t x = 0; x < width_; ++x)
      radial[x] = s_.pixels->free[x] * s_.pixels->rnorm[x] * s_.pixels->rnorm[x] * g_.along[x];
    const auto dst = tile_of<T>(p_.grad_feat, image_, 0, pixel_, count_);
    for_blocks<Acc>(dim_, width_, [&](int64_t d, int64_t x, auto channels) {
      Vec<Acc> rows[L];
      prefetch_block<true>(dst, dim_, d + L, x);
      const Vec<Acc> by = load(radial + x);
      repeat(channels, [&](int i) {
        const int64_t at = (d + i) * width_ + x;
        rows[i] = load(s_.grad_feat + at) - load(s_.centred + at) * by;
      });
      store_block<T>(rows, d, x, channels, dst);
    });
  }

  const ProtoAttnBwdParams& p_;
  const BackwardPass& pass_;
  const BwdScratch<Acc>& s_;
  const int64_t task_, dim_, width_;
  int64_t image_, pixel_, count_, episode_;
  bool first_of_episode_, last_of_episode_;
  int32_t blocks_done_ = 0;
  GradStats<Acc> g_;
};

template <class T>
void backward(const ProtoAttnBwdParams& p, const BackwardPass& pass, TaskQueue& queue,
              void* memory) {
  const BwdScratch<AccOf<T>> s(memory, p.shape.dim, pass.tiling);
  int64_t first, stop;
  while (queue.take(&first, &stop))
    for (int64_t task = first; task < stop; ++task) BackwardTask<T>(p, pass, s, task).run();
}

}  // namespace
}  // namespace fastproto::cpu
