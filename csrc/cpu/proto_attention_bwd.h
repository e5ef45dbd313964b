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

// Where a task lies, and its turn at the sums of the prototypes.
struct BackwardPlace {
  const ProtoAttnBwdParams& p;
  const BackwardPass& pass;
  const int64_t task, dim, width;
  int64_t image, pixel, count, episode;
  bool first_of_episode, last_of_episode;
  int32_t blocks_done = 0;

  BackwardPlace(const ProtoAttnBwdParams& params, const BackwardPass& run, int64_t number)
      : p(params), pass(run), task(number), dim(params.shape.dim), width(run.tiling.width) {
    const int64_t tiles = pass.tiling.tiles(p.shape), per_episode = p.shape.queries * tiles;
    image = task / tiles;
    pixel = task % tiles * width;
    count = p.shape.pixels - pixel < width ? p.shape.pixels - pixel : width;
    episode = image / p.shape.queries;
    first_of_episode = task % per_episode == 0;
    last_of_episode = task % per_episode == per_episode - 1;
  }

  // Calls bag(way, begin, end, want_protos) for every bag that this pass has work on, and after it
  // block(n, rows, to, single, want_protos) for its blocks [n, n + rows) up to `to`. An empty bag
  // has none: G = 0, nothing but dY1 reaches F.
  template <class Bag, class Block>
  void for_bags(Bag&& bag, Block&& block) const {
    const int64_t step = backward_block_rows(p.shape);
    for (int64_t way = 0; way < p.shape.ways; ++way) {
      const int32_t* bounds = p.bags.offsets + episode * p.shape.ways + way;
      const int64_t begin = bounds[0], end = bounds[1];
      int64_t from = begin > pass.begin ? begin : pass.begin, to = end < pass.end ? end : pass.end;
      const bool want_protos = from < to;
      if (!want_protos && !pass.want_feat) continue;
      if (!want_protos) {
        from = begin;
        to = end;
      }
      bag(way, begin, end, want_protos);
      for (int64_t n = from; n < to; n += step)
        block(n, to - n < step ? to - n : step, to, end - begin == 1, want_protos);
    }
  }

  // Until the task before is done with the block that this one has come to.
  void wait_for_turn() const {
    if (first_of_episode) return;
    const int32_t* previous = &pass.done[task - 1];
    for (int spins = 0; __atomic_load_n(previous, __ATOMIC_ACQUIRE) <= blocks_done; ++spins) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
      if (spins > 1000) sched_yield();
    }
  }
  void end_turn() { __atomic_store_n(&pass.done[task], ++blocks_done, __ATOMIC_RELEASE); }
};

// Prototypes [n, n + rows) have all their sums: takes out the part along the prototype, and stores.
template <class T>
void finish_protos(const ProtoAttnBwdParams& p, int64_t n, int64_t rows, bool single,
                   const ProtoStats<AccOf<T>>& stats, const AccOf<T>* sums, const AccOf<T>* along) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  const int64_t dim = p.shape.dim;
  for (int64_t r = 0; r < rows; ++r) {
    T* dst = static_cast<T*>(p.grad_protos) + (n + r) * dim;
    const T* proto = static_cast<const T*>(p.bags.protos) + (n + r) * dim;
    const Acc mean = single ? Acc(0) : stats.mean[r];
    const Acc radial = single ? Acc(0) : stats.free[r] * stats.rnorm[r] * stats.rnorm[r] * along[r];
    const Acc* sum = sums + r * dim;
    for (int64_t d = 0; d < dim; d += L) {
      Vec<Acc> v = load_as(sum + d, dim - d);
      if (!single) v -= (load_as(proto + d, dim - d) - mean) * radial;
      store_as(v, dst + d, dim - d);
    }
  }
}

// Reads the statistics that the forward saved of one (image, class).
template <class Acc>
void load_stats(const BackwardPlace& at, int64_t map, Acc origin, GradStats<Acc>* g) {
  const int64_t pixels = at.p.shape.pixels;
  const Acc* stats = static_cast<const Acc*>(at.p.stats) + 3 * map * pixels + at.pixel;
  g->origin = origin;
  for (int64_t x = 0; x < at.width; ++x) {
    const bool inside = x < at.count;
    g->bound[x] = inside ? stats[x] : Acc(0);
    g->rsum[x] = inside ? stats[pixels + x] : Acc(0);
    g->agg_mean[x] = inside ? stats[2 * pixels + x] : Acc(0);
  }
}

template <class Acc>
void store_grad_temperature(const BackwardPlace& at, const GradStats<Acc>& g) {
  if (at.p.grad_temperature_parts == nullptr) return;
  double sum = 0;
  for (int64_t x = 0; x < at.count; ++x) sum += double(g.along[x]);
  at.p.grad_temperature_parts[at.task] = -sum / at.p.shape.temperature;
}

template <class T>
TileView<const T> grad_view(const BackwardPlace& at, int64_t map, int64_t channel) {
  const auto tile = tile_of<T>(at.p.grad_out, map, channel, at.pixel, at.count);
  return {tile.data, tile.stride_channel, tile.stride_pixel, tile.count};
}
template <class Acc>
TileView<const Acc> agg_view(const BackwardPlace& at, int64_t map) {
  const auto tile = tile_of<Acc>(at.p.agg, map, 0, at.pixel, at.count);
  return {tile.data, tile.stride_channel, tile.stride_pixel, tile.count};
}
template <class T>
TileView<const T> feat_view(const BackwardPlace& at) {
  return tile_of<T>(at.p.feat, at.episode, at.image % at.p.shape.queries, at.pixel, at.count);
}

template <class T>
class BackwardTask {
 public:
  using Acc = AccOf<T>;
  static constexpr int L = kLanes<Acc>;

  BackwardTask(const ProtoAttnBwdParams& p, const BackwardPass& pass, const BwdScratch<Acc>& s,
               int64_t task)
      : at_(p, pass, task), p_(p), pass_(pass), s_(s), dim_(at_.dim), width_(at_.width) {}

  void run() {
    const bool want_protos = pass_.begin < pass_.end;
    centre_pixels<T>(feat_view<T>(at_), dim_, width_, Acc(p_.shape.eps), s_.centred, s_.pixels);
    if (want_protos) transpose_panel(s_.centred, dim_, width_, bottom_of_transposed());
    for (int64_t x = 0; x < width_; ++x) g_.along[x] = 0;
    at_.for_bags(
        [&](int64_t way, int64_t begin, int64_t end, bool protos) {
          load_grad(way, begin, end);
          if (protos) transpose_panel(s_.grad_out, dim_, width_, s_.transposed);
        },
        [&](int64_t n, int64_t rows, int64_t to, bool single, bool protos) {
          run_block(n, rows, to, single, protos);
        });
    if (pass_.want_feat) finish_feat();
  }

 private:
  Acc* bottom_of_transposed() const { return s_.transposed + width_ * row_stride<Acc>(dim_); }

  // s.grad_out = dY2 * F; s.grad_feat += dY1 + dY2 * G; and the sums over channels.
  void load_grad(int64_t way, int64_t begin, int64_t end) {
    const int64_t map = at_.image * p_.shape.ways + way;
    const auto lower = grad_view<T>(at_, map, 0);
    const auto upper = grad_view<T>(at_, map, p_.shape.concat ? dim_ : 0);
    const auto agg = agg_view<Acc>(at_, map);
    const auto feature = feat_view<T>(at_);
    // A bag of one is not centred (forward).
    load_stats<Acc>(at_, map, end - begin > 1 ? mean_origin<T>(p_.bags, begin, dim_) : Acc(0), &g_);
    Acc mean[kMostPixels];
    for (int64_t x = 0; x < width_; ++x) mean[x] = g_.agg_mean[x] + g_.origin;
    PixelSums<Acc> deltas, totals;
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

  // Prototypes [n, n + rows) of a bag whose blocks end at `to`.
  void run_block(int64_t n, int64_t rows, int64_t to, bool single, bool want_protos) {
    const int64_t stride = row_stride<Acc>(dim_);
    if (!single) load_protos<T>(p_.bags, n, rows, dim_, Acc(p_.shape.eps), s_.protos, s_.block);
    Ahead ahead = rows_ahead<T>(p_.bags, n + rows, to, dim_);
    Acc along[kBlockProtos];  // sum_i dS_i c_i
    score_grads(rows, single, along, &ahead);
    if (pass_.want_feat && !single)
      gemm<Acc>(dim_, width_, rows, {s_.protos, 1, stride}, s_.weights + width_, 2 * width_,
                s_.grad_feat, width_, true, &ahead);
    if (want_protos) add_to_protos(n, rows, single, along);
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
    const bool first = at_.first_of_episode;
    at_.wait_for_turn();
    gemm<Acc>(rows, dim_, single ? width_ : 2 * width_, {s_.weights, 2 * width_, 1}, s_.transposed,
              row_stride<Acc>(dim_), sums, dim_, !first);
    for (int64_t r = 0; r < rows; ++r) total[r] = first ? along[r] : total[r] + along[r];
    if (at_.last_of_episode) finish_protos<T>(p_, n, rows, single, *s_.block, sums, total);
    at_.end_turn();
  }

  void finish_feat() {
    store_grad_temperature(at_, g_);
    Acc radial[kMostPixels];
    for (int64_t x = 0; x < width_; ++x)
      radial[x] = s_.pixels->free[x] * s_.pixels->rnorm[x] * s_.pixels->rnorm[x] * g_.along[x];
    const auto dst = tile_of<T>(p_.grad_feat, at_.image, 0, at_.pixel, at_.count);
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

  BackwardPlace at_;
  const ProtoAttnBwdParams& p_;
  const BackwardPass& pass_;
  const BwdScratch<Acc>& s_;
  const int64_t dim_, width_;
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
