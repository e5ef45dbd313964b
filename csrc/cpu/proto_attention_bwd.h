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
struct BwdScratch : Scratch {
  BwdScratch(void* memory, int64_t d, Tiling t) : Scratch(memory), dim(d), width(t.width) {}

  const int64_t dim, width, stride = row_stride<Acc>(dim);
  Acc* const centred = take<Acc>(dim * width);               // [D][W]
  Acc* const grad_out = take<Acc>(dim * width);              // [D][W] dO of the current bag
  Acc* const grad_feat = take<Acc>(dim * width);             // [D][W] sums of all bags
  Acc* const transposed = take<Acc>(2 * width * stride);     // [2 W][stride] dO, then Fc
  Acc* const protos = take<Acc>(kBlockProtos * stride);      // [kBlockProtos][stride] centred
  Acc* const weights = take<Acc>(kBlockProtos * 2 * width);  // [kBlockProtos][2 W] A, then dS'
  Acc* const grad_scores = take<Acc>(kBlockProtos * width);  // [kBlockProtos][W]
};

// Per-pixel sums of the incoming gradient of one (image, class).
template <class Acc>
struct alignas(64) GradStats {
  Acc delta[kMostPixels];     // <dO, Gc>
  Acc total[kMostPixels];     // sum over channels of dO
  Acc agg_mean[kMostPixels];  // sum_j A_j (mean(P_j) - origin), so that G = Gc + mean
  Acc mean[kMostPixels];      // origin + agg_mean
  Acc bound[kMostPixels];
  Acc rsum[kMostPixels];
  Acc along[kMostPixels] = {};  // sum_j dS_j c_j over all bags so far
  Acc origin;                   // mean(P) of the bag's first prototype, 0 in a bag of one
};

// What the kernels in float32 and on bfloat16 units have in common: where a task lies, its turn at
// the sums of the prototypes, and everything that is no product of matrices.
template <class T>
class BackwardBase {
 protected:
  using Acc = AccOf<T>;
  static constexpr int L = kLanes<Acc>;

  BackwardBase(const BackwardParams& p, const BackwardPass& pass, int64_t task)
      : p_(p), pass_(pass), task_(task), dim_(p.problem.dim), width_(pass.tiling.width) {
    const int64_t tiles = pass.tiling.tiles(p.problem), per_episode = p.problem.queries * tiles;
    image_ = task / tiles;
    pixel_ = task % tiles * width_;
    count_ = p.problem.pixels - pixel_ < width_ ? p.problem.pixels - pixel_ : width_;
    episode_ = image_ / p.problem.queries;
    first_ = task % per_episode == 0;
    last_ = task % per_episode == per_episode - 1;
  }

  bool wants_protos() const { return pass_.begin < pass_.end; }
  const T* protos(int64_t n) const { return static_cast<const T*>(p_.protos) + n * dim_; }
  TileView<const T> feat() const {
    return tile_of<T>(p_.feat, episode_, image_ % p_.problem.queries, pixel_, count_);
  }
  TileView<T> grad_feat() const { return tile_of<T>(p_.grad_feat, image_, 0, pixel_, count_); }

  // Calls bag(way, begin, end, want_protos) for every bag that this pass has work on, and after it
  // block(n, rows, to, single, want_protos) for its blocks [n, n + rows) up to `to`. An empty bag
  // has none: G = 0, nothing but dY1 reaches F.
  template <class Bag, class Block>
  void for_bags(Bag&& bag, Block&& block) const {
    const int64_t step = backward_block_rows(p_.problem);
    for (int64_t way = 0; way < p_.problem.ways; ++way) {
      const int32_t* bounds = p_.offsets + episode_ * p_.problem.ways + way;
      const int64_t begin = bounds[0], end = bounds[1];
      int64_t from = begin > pass_.begin ? begin : pass_.begin;
      int64_t to = end < pass_.end ? end : pass_.end;
      const bool want_protos = from < to;
      if (!want_protos && !pass_.want_feat) continue;
      if (!want_protos) {
        from = begin;
        to = end;
      }
      bag(way, begin, end, want_protos);
      for (int64_t n = from; n < to; n += step)
        block(n, to - n < step ? to - n : step, to, end - begin == 1, want_protos);
    }
  }

  // sums += dY1 + dY2 * G of a bag (its first: =), and its GradStats. product(d, x, channels, dY2,
  // Gc, &delta, &total) keeps a block of dO = dY2 * F and adds it to the sums over channels.
  template <class Product>
  void load_grad(int64_t way, int64_t begin, int64_t end, Acc* sums, Product&& product) {
    const int64_t map = image_ * p_.problem.ways + way;
    load_stats(map, end - begin > 1 ? row_mean(protos(begin), dim_) : Acc(0));
    const bool concat = p_.problem.concat, first = way == 0, want_feat = pass_.want_feat;
    const auto lower = tile_of<const T>(p_.grad_out, map, 0, pixel_, count_);
    const auto upper = tile_of<const T>(p_.grad_out, map, concat ? dim_ : 0, pixel_, count_);
    const auto agg = tile_of<const Acc>(p_.agg, map, 0, pixel_, count_);
    PixelSums<Acc> deltas, totals;
    for_blocks<Acc>(dim_, width_, [&](int64_t d, int64_t x, auto channels) {
      Vec<Acc> grad[L], gc[L], direct[L];
      prefetch_block<false>(upper, dim_, d + L, x);
      prefetch_block<false>(agg, dim_, d + L, x);
      if (want_feat && concat) prefetch_block<false>(lower, dim_, d + L, x);
      load_block<T>(upper, d, x, channels, grad);
      load_block<Acc>(agg, d, x, channels, gc);
      Vec<Acc> delta = {}, total = {};
      product(d, x, channels, grad, gc, &delta, &total);
      deltas.add(d, x, delta);
      totals.add(d, x, total);
      if (!want_feat) return;
      if (concat)
        load_block<T>(lower, d, x, channels, direct);
      else
        for (int i = 0; i < channels; ++i) direct[i] = Vec<Acc>{};
      const Vec<Acc> plus = load(g_.mean + x);
      repeat(channels, [&](int i) {
        Acc* at = sums + (d + i) * width_ + x;
        const Vec<Acc> value = direct[i] + grad[i] * (gc[i] + plus);
        store(at, first ? value : load(at) + value);
      });
    });
    for (int64_t x = 0; x < width_; x += L) {
      store(g_.delta + x, deltas.get(x));
      store(g_.total + x, totals.get(x));
    }
  }

  // When its turn has come, adds to dP what add(sums) finds for prototypes [n, n + rows).
  template <class Add>
  void add_to_protos(int64_t n, int64_t rows, bool single, const ProtoStats<Acc>& stats,
                     const Acc* along, Add&& add) {
    Acc* sums = static_cast<Acc*>(pass_.sums) + (n - pass_.begin) * dim_;
    Acc* total = static_cast<Acc*>(pass_.along) + (n - pass_.begin);
    wait_for_turn();
    add(sums);
    for (int64_t r = 0; r < rows; ++r) total[r] = first_ ? along[r] : total[r] + along[r];
    if (last_) finish_protos(n, rows, single, stats, sums, total);
    __atomic_store_n(&pass_.done[task_], ++blocks_done_, __ATOMIC_RELEASE);
  }

  void store_grad_temperature() const {
    if (p_.grad_temperature_parts == nullptr) return;
    double sum = 0;
    for (int64_t x = 0; x < count_; ++x) sum += double(g_.along[x]);
    p_.grad_temperature_parts[task_] = -sum / p_.problem.temperature;
  }

  const BackwardParams& p_;
  const BackwardPass& pass_;
  const int64_t task_, dim_, width_;
  int64_t image_, pixel_, count_, episode_;
  bool first_, last_;  // task of its episode
  int32_t blocks_done_ = 0;
  GradStats<Acc> g_;

 private:
  // Reads the statistics that the forward saved of one (image, class).
  void load_stats(int64_t map, Acc origin) {
    const int64_t pixels = p_.problem.pixels;
    const Acc* stats = static_cast<const Acc*>(p_.stats) + 3 * map * pixels + pixel_;
    g_.origin = origin;
    for (int64_t x = 0; x < width_; ++x) {
      const bool inside = x < count_;
      g_.bound[x] = inside ? stats[x] : Acc(0);
      g_.rsum[x] = inside ? stats[pixels + x] : Acc(0);
      g_.agg_mean[x] = inside ? stats[2 * pixels + x] : Acc(0);
      g_.mean[x] = g_.agg_mean[x] + origin;
    }
  }

  // Until the task before is done with the block that this one has come to.
  void wait_for_turn() const {
    if (first_) return;
    const int32_t* previous = &pass_.done[task_ - 1];
    for (int spins = 0; __atomic_load_n(previous, __ATOMIC_ACQUIRE) <= blocks_done_; ++spins) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
      if (spins > 1000) sched_yield();
    }
  }

  // Prototypes [n, n + rows) have all their sums: takes out the part along the prototype.
  void finish_protos(int64_t n, int64_t rows, bool single, const ProtoStats<Acc>& stats,
                     const Acc* sums, const Acc* along) const {
    for (int64_t r = 0; r < rows; ++r) {
      T* dst = static_cast<T*>(p_.grad_protos) + (n + r) * dim_;
      const T* proto = protos(n + r);
      const Acc mean = single ? Acc(0) : stats.mean[r];
      const Acc radial =
          single ? Acc(0) : stats.free[r] * stats.rnorm[r] * stats.rnorm[r] * along[r];
      const Acc* sum = sums + r * dim_;
      for (int64_t d = 0; d < dim_; d += L) {
        Vec<Acc> v = load_as(sum + d, dim_ - d);
        if (!single) v -= (load_as(proto + d, dim_ - d) - mean) * radial;
        store_as(v, dst + d, dim_ - d);
      }
    }
  }
};

template <class T>
class BackwardTask : BackwardBase<T> {
  using Base = BackwardBase<T>;
  using Base::p_, Base::pass_, Base::dim_, Base::width_, Base::g_, Base::L;
  using typename Base::Acc;

 public:
  BackwardTask(const BackwardParams& p, const BackwardPass& pass, const BwdScratch<Acc>& s,
               int64_t task)
      : Base(p, pass, task), s_(s) {}

  void run() {
    centre_pixels<T>(this->feat(), dim_, width_, Acc(p_.problem.eps), s_.centred, &pixels_);
    if (this->wants_protos())
      transpose_panel(s_.centred, dim_, width_, s_.transposed + width_ * stride_);
    this->for_bags(
        [&](int64_t way, int64_t begin, int64_t end, bool want_protos) {
          load_grad(way, begin, end);
          if (want_protos) transpose_panel(s_.grad_out, dim_, width_, s_.transposed);
        },
        [&](int64_t n, int64_t rows, int64_t to, bool single, bool want_protos) {
          run_block(n, rows, to, single, want_protos);
        });
    if (pass_.want_feat) finish_feat();
  }

 private:
  // s.grad_out = dO.
  void load_grad(int64_t way, int64_t begin, int64_t end) {
    const auto feature = this->feat();
    const auto product = [&](int64_t d, int64_t x, auto channels, const Vec<Acc>* grad,
                             const Vec<Acc>* gc, Vec<Acc>* delta, Vec<Acc>* total)
                             __attribute__((always_inline)) {
                               Vec<Acc> f[L];
                               load_block<T>(feature, d, x, channels, f);
                               repeat(channels, [&](int i) {
                                 const Vec<Acc> grad_o = grad[i] * f[i];
                                 store(s_.grad_out + (d + i) * width_ + x, grad_o);
                                 *delta += grad_o * gc[i];
                                 *total += grad_o;
                               });
                             };
    Base::load_grad(way, begin, end, s_.grad_feat, product);
  }

  // Prototypes [n, n + rows) of a bag whose blocks end at `to`.
  void run_block(int64_t n, int64_t rows, int64_t to, bool single, bool want_protos) {
    if (!single)
      load_protos<T>(this->protos(n), rows, dim_, Acc(p_.problem.eps), s_.protos, &block_);
    Ahead ahead = rows_ahead(this->protos(n + rows), to - n - rows, dim_);
    Acc along[kBlockProtos];  // sum_i dS_i c_i
    score_grads(rows, single, along, &ahead);
    if (pass_.want_feat && !single)
      gemm<Acc>(dim_, width_, rows, {s_.protos, 1, stride_}, s_.weights + width_, 2 * width_,
                s_.grad_feat, width_, true, &ahead);
    if (want_protos)
      this->add_to_protos(n, rows, single, block_, along, [&](Acc* sums) {
        gemm<Acc>(rows, dim_, single ? width_ : 2 * width_, {s_.weights, 2 * width_, 1},
                  s_.transposed, stride_, sums, dim_, !this->first_);
      });
  }

  // s.weights = [A | dS rp rq] and the sums of dS c, for the loaded block.
  void score_grads(int64_t rows, bool single, Acc* along, Ahead* ahead) {
    const int64_t pitch = 2 * width_;
    if (single) {  // A = 1 whatever the cosine
      for (int64_t x = 0; x < width_; ++x) {
        s_.weights[x] = 1;
        s_.weights[width_ + x] = 0;
      }
      along[0] = 0;
      return;
    }
    const Acc inv_t = Acc(1.0 / p_.problem.temperature);
    gemm<Acc>(rows, width_, dim_, {s_.protos, stride_, 1}, s_.centred, width_, s_.weights, pitch,
              false, ahead);
    gemm<Acc>(rows, width_, dim_, {s_.protos, stride_, 1}, s_.grad_out, width_, s_.grad_scores,
              width_, false, ahead);
    for (int64_t r = 0; r < rows; ++r) {
      const Acc rnorm = block_.rnorm[r], mean = block_.mean[r] - g_.origin;
      Vec<Acc> sum = {};
      for (int64_t x = 0; x < width_; x += L) {
        Acc* at = s_.weights + r * pitch + x;
        const Vec<Acc> pixel_rnorm = load(pixels_.rnorm + x);
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

  void finish_feat() {
    this->store_grad_temperature();
    Acc radial[kMostPixels];
    for (int64_t x = 0; x < width_; ++x)
      radial[x] = pixels_.free[x] * pixels_.rnorm[x] * pixels_.rnorm[x] * g_.along[x];
    const auto dst = this->grad_feat();
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

  const BwdScratch<Acc>& s_;
  const int64_t stride_ = row_stride<Acc>(dim_);
  ProtoStats<Acc> block_;  // of the current block
  PixelStats<Acc> pixels_;
};

template <class T>
void backward(const BackwardParams& p, const BackwardPass& pass, TaskQueue& queue, void* memory) {
  const BwdScratch<AccOf<T>> s(memory, p.problem.dim, pass.tiling);
  int64_t first, stop;
  while (queue.take(&first, &stop))
    for (int64_t task = first; task < stop; ++task) BackwardTask<T>(p, pass, s, task).run();
}

}  // namespace
}  // namespace fastproto::cpu
