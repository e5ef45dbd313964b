// SPDX-License-Identifier: Apache-2.0
// Backward of proto_attention: two passes, each output element written by exactly one task, so the
// result is the same bits for any number of threads. Symbols and derivation in docs/math.md.
//
//     dO = dY2 * F        A = exp((c - bound)/t) / sum, the bits of the forward
//     dS = A * (<dO, P> - <dO, G>) / t           gradient of the cosine
//   feature pass, per pixel tile:
//     dF = dY1 + dY2 * G + rq (sum_j dS_j rp_j Pc_j  -  Fc rq sum_j dS_j c_j)
//   prototype pass, per block of one bag:
//     dP = sum_i (A_i dO_i + dS_i rq_i rp Fc_i)  -  Pc rp^2 sum_i dS_i c_i
//
// The norm terms vanish where max(norm, eps) is eps. The N x HW matrices live in cache, 64 x 64 at
// a time, and are recomputed by each pass: seven matrix products where five would do with them
// kept.
#pragma once

#include "proto_attention_fwd.h"

namespace fastproto::cpu {
namespace {

template <class Acc>
struct BwdScratch : FwdScratch<Acc> {
  Acc* grad_out;     // [D][kT] dO
  Acc* grad_scores;  // [kBlockProtos][kT] dS
  Acc* transposed;   // [kT][kBlockProtos]

  BwdScratch(void* memory, int64_t dim) : FwdScratch<Acc>(memory, dim) {
    Scratch scratch(this->block + 1);
    grad_out = scratch.take<Acc>(dim * kT);
    grad_scores = scratch.take<Acc>(kBlockProtos * kT);
    transposed = scratch.take<Acc>(kBlockProtos * kT);
  }
};

// Per-pixel sums of the incoming gradient of one (image, class).
template <class Acc>
struct GradStats {
  Acc delta[kT];     // <dO, Gc>
  Acc total[kT];     // sum over channels of dO
  Acc agg_mean[kT];  // sum_j A_j (mean(P_j) - origin), so that G = Gc + origin + agg_mean
  Acc origin;        // see mean_origin
  Acc bound[kT];
  Acc rsum[kT];
};

// s.grad_out = dY2 * F, s.out = Gc, and the sums over channels of a bag that is not empty.
template <class T>
void load_grad(const ProtoAttnBwdParams& p, int64_t map, int64_t bag, int64_t pixel, int64_t count,
               const BwdScratch<AccOf<T>>& s, GradStats<AccOf<T>>* g) {
  using Acc = AccOf<T>;
  const int64_t dim = p.shape.dim;
  const auto grad = tile_of<T>(p.grad_out, map, p.shape.concat ? dim : 0, pixel, count);
  const auto agg = tile_of<Acc>(p.agg, map, 0, pixel, count);
  // A bag of one is not centred (forward).
  const int64_t begin = p.bags.offsets[bag], size = p.bags.offsets[bag + 1] - begin;
  g->origin = size > 1 ? mean_origin<T>(p.bags, begin, dim, s.out) : Acc(0);
  load_tile<T>({grad.data, grad.stride_channel, grad.stride_pixel, count}, dim, s.grad_out);
  load_tile<Acc>({agg.data, agg.stride_channel, agg.stride_pixel, count}, dim, s.out);
  const Acc* stats = static_cast<const Acc*>(p.stats) + 3 * map * p.shape.pixels + pixel;
  for (int64_t i = 0; i < kT; ++i) {
    g->delta[i] = 0;
    g->total[i] = 0;
    g->bound[i] = i < count ? stats[i] : Acc(0);
    g->rsum[i] = i < count ? stats[p.shape.pixels + i] : Acc(0);
    g->agg_mean[i] = i < count ? stats[2 * p.shape.pixels + i] : Acc(0);
  }
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t i = 0; i < kT; ++i) {
      const Acc grad_o = s.grad_out[d * kT + i] * s.raw[d * kT + i];
      s.grad_out[d * kT + i] = grad_o;
      g->delta[i] += grad_o * s.out[d * kT + i];
      g->total[i] += grad_o;
    }
}

// For the loaded block of a bag of `size` prototypes: s.scores = A, s.grad_scores = dS, and
// `weighted` = dS * c.
template <class T>
void score_grads(const ProtoAttnBwdParams& p, int64_t size, int64_t rows,
                 const GradStats<AccOf<T>>& g, const BwdScratch<AccOf<T>>& s,
                 AccOf<T>* weighted /* [rows][kT] */) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  const int64_t dim = p.shape.dim;
  if (size == 1) {  // A = 1 whatever the cosine
    for (int64_t i = 0; i < kT; ++i) {
      s.scores[i] = 1;
      s.grad_scores[i] = 0;
      weighted[i] = 0;
    }
    return;
  }
  const Acc inv_t = Acc(1.0 / p.shape.temperature);
  gemm<Acc>(rows, kT, dim, {s.protos, dim, 1}, s.centred, kT, s.scores, kT, false);
  gemm<Acc>(rows, kT, dim, {s.protos, dim, 1}, s.grad_out, kT, s.grad_scores, kT, false);
  for (int64_t r = 0; r < rows; ++r) {
    const Acc rnorm = s.block->rnorm[r], mean = s.block->mean[r] - g.origin;
    for (int64_t i = 0; i < kT; i += L) {
      const int64_t at = r * kT + i;
      const Vec<Acc> c = load(s.scores + at) * (rnorm * load(s.pixels->rnorm + i));
      const Vec<Acc> a = exp_nonpositive((c - load(g.bound + i)) * inv_t) * load(g.rsum + i);
      // <dO, P> - <dO, G>, with both means taken out of the products: they would cancel.
      const Vec<Acc> excess = (load(s.grad_scores + at) - load(g.delta + i)) +
                              (mean - load(g.agg_mean + i)) * load(g.total + i);
      const Vec<Acc> grad_c = a * excess * inv_t;
      store(s.scores + at, a);
      store(s.grad_scores + at, grad_c);
      store(weighted + at, grad_c * c);
    }
  }
}

template <class T>
void backward_feat_tile(const ProtoAttnBwdParams& p, int64_t image, int64_t tile,
                        const BwdScratch<AccOf<T>>& s, double* grad_t, AccOf<T>* acc,
                        AccOf<T>* direct) {
  using Acc = AccOf<T>;
  const int64_t dim = p.shape.dim, ways = p.shape.ways, pixel = tile * kT;
  const int64_t count = p.shape.pixels - pixel < kT ? p.shape.pixels - pixel : kT;
  const int64_t episode = image / p.shape.queries;
  const Acc eps = Acc(p.shape.eps);
  load_tile<T>(tile_of<T>(p.feat, episode, image % p.shape.queries, pixel, count), dim, s.raw);
  centre_pixels<Acc>(s.raw, dim, eps, s.centred, s.pixels);

  Acc along[kT] = {};  // sum_j dS_j c_j over all classes
  bool touched = false;
  for (int64_t i = 0; i < dim * kT; ++i) direct[i] = 0;
  for (int64_t way = 0; way < ways; ++way) {
    const int64_t map = image * ways + way, bag = episode * ways + way;
    if (p.shape.concat) {
      const auto grad = tile_of<T>(p.grad_out, map, 0, pixel, count);
      load_tile<T>({grad.data, grad.stride_channel, grad.stride_pixel, count}, dim, s.grad_out);
      for (int64_t i = 0; i < dim * kT; ++i) direct[i] += s.grad_out[i];
    }
    const int64_t begin = p.bags.offsets[bag], end = p.bags.offsets[bag + 1];
    if (begin == end) continue;  // G = 0: nothing but dY1 reaches F
    GradStats<Acc> g;
    load_grad<T>(p, map, bag, pixel, count, s, &g);
    // dY2 * G; read again rather than divide dO by F, which is full of zeros.
    const auto grad = tile_of<T>(p.grad_out, map, p.shape.concat ? dim : 0, pixel, count);
    Acc run[kT], mean[kT];
    for (int64_t i = 0; i < kT; ++i) mean[i] = g.agg_mean[i] + g.origin;
    if (grad.pixels_contiguous()) {
      for (int64_t d = 0; d < dim; ++d) {
        load_run(grad.data + d * grad.stride_channel, run, count);
        for (int64_t i = 0; i < count; ++i)
          direct[d * kT + i] += run[i] * (s.out[d * kT + i] + mean[i]);
      }
    } else {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t d = 0; d < dim; ++d)
          direct[d * kT + i] +=
              to_acc(grad.data[i * grad.stride_pixel + d]) * (s.out[d * kT + i] + mean[i]);
    }
    if (end - begin == 1) continue;  // dS = 0
    for (int64_t n = begin; n < end; n += kBlockProtos) {
      const int64_t rows = end - n < kBlockProtos ? end - n : kBlockProtos;
      load_protos<T>(p.bags, n, rows, dim, eps, s.protos, s.block);
      score_grads<T>(p, end - begin, rows, g, s, s.transposed);
      for (int64_t r = 0; r < rows; ++r) {
        const Acc rnorm = s.block->rnorm[r];
        for (int64_t i = 0; i < kT; ++i) {
          along[i] += s.transposed[r * kT + i];
          s.grad_scores[r * kT + i] *= rnorm;
        }
      }
      gemm<Acc>(dim, kT, rows, {s.protos, 1, dim}, s.grad_scores, kT, acc, kT, touched);
      touched = true;
    }
  }

  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += double(along[i]);
  *grad_t = -sum / p.shape.temperature;
  if (touched)
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t i = 0; i < kT; ++i) {
        const Acc rnorm = s.pixels->rnorm[i];
        const Acc radial = s.pixels->free[i] * rnorm * along[i];
        direct[d * kT + i] += rnorm * (acc[d * kT + i] - s.centred[d * kT + i] * radial);
      }
  store_tile<T>(direct, dim, tile_of<T>(p.grad_feat, image, 0, pixel, count));
}

template <class T>
void backward_feat(const ProtoAttnBwdParams& p, TaskQueue& queue, void* memory) {
  using Acc = AccOf<T>;
  const BwdScratch<Acc> s(memory, p.shape.dim);
  Scratch more(s.transposed + kBlockProtos * kT);
  Acc* acc = more.take<Acc>(p.shape.dim * kT);
  Acc* direct = more.take<Acc>(p.shape.dim * kT);
  const int64_t tiles = pixel_tiles(p.shape);
  int64_t begin, stop;
  while (queue.take(&begin, &stop))
    for (int64_t task = begin; task < stop; ++task) {
      double grad_t;
      backward_feat_tile<T>(p, task / tiles, task % tiles, s, &grad_t, acc, direct);
      if (p.grad_temperature_parts != nullptr) p.grad_temperature_parts[task] = grad_t;
    }
}

template <class T>
void backward_proto_block(const ProtoAttnBwdParams& p, const ProtoBlock& block,
                          const BwdScratch<AccOf<T>>& s, AccOf<T>* acc /* [D][kT] dP^T */,
                          AccOf<T>* weighted) {
  using Acc = AccOf<T>;
  const int64_t dim = p.shape.dim, ways = p.shape.ways, rows = block.end - block.begin;
  const int64_t episode = block.bag / ways, way = block.bag % ways;
  const int64_t size = p.bags.offsets[block.bag + 1] - p.bags.offsets[block.bag];
  const Acc eps = Acc(p.shape.eps);
  load_protos<T>(p.bags, block.begin, rows, dim, eps, s.protos, s.block);
  Acc along[kBlockProtos] = {};  // sum_i dS_i c_i
  bool touched = false;
  for (int64_t query = 0; query < p.shape.queries; ++query) {
    const int64_t image = episode * p.shape.queries + query, map = image * ways + way;
    for (int64_t pixel = 0; pixel < p.shape.pixels; pixel += kT) {
      const int64_t count = p.shape.pixels - pixel < kT ? p.shape.pixels - pixel : kT;
      load_tile<T>(tile_of<T>(p.feat, episode, query, pixel, count), dim, s.raw);
      centre_pixels<Acc>(s.raw, dim, eps, s.centred, s.pixels);
      GradStats<Acc> g;
      load_grad<T>(p, map, block.bag, pixel, count, s, &g);
      score_grads<T>(p, size, rows, g, s, weighted);
      // Transposed, so that prototypes are the vector dimension: [kT][kBlockProtos].
      for (int64_t r = 0; r < kBlockProtos; ++r)
        for (int64_t i = 0; i < kT; ++i)
          s.transposed[i * kBlockProtos + r] =
              r < rows && i < count ? s.scores[r * kT + i] : Acc(0);
      gemm<Acc>(dim, kBlockProtos, count, {s.grad_out, kT, 1}, s.transposed, kBlockProtos, acc,
                kBlockProtos, touched);
      touched = true;
      if (size == 1) continue;
      for (int64_t r = 0; r < kBlockProtos; ++r)
        for (int64_t i = 0; i < kT; ++i) {
          const bool inside = r < rows && i < count;
          if (inside) along[r] += weighted[r * kT + i];
          s.transposed[i * kBlockProtos + r] =
              inside ? s.grad_scores[r * kT + i] * s.pixels->rnorm[i] * s.block->rnorm[r] : Acc(0);
        }
      gemm<Acc>(dim, kBlockProtos, count, {s.centred, kT, 1}, s.transposed, kBlockProtos, acc,
                kBlockProtos, true);
    }
  }
  T* dst = static_cast<T*>(p.grad_protos) + block.begin * dim;
  for (int64_t r = 0; r < rows; ++r) {
    const Acc rnorm = s.block->rnorm[r];
    const Acc radial = size == 1 ? Acc(0) : s.block->free[r] * rnorm * rnorm * along[r];
    for (int64_t d = 0; d < dim; ++d) {
      const Acc sum = touched ? acc[d * kBlockProtos + r] : Acc(0);
      from_acc(sum - (size == 1 ? Acc(0) : s.protos[r * dim + d] * radial), dst + r * dim + d);
    }
  }
}

template <class T>
void backward_protos(const ProtoAttnBwdParams& p, const ProtoBlock* blocks, TaskQueue& queue,
                     void* memory) {
  using Acc = AccOf<T>;
  const BwdScratch<Acc> s(memory, p.shape.dim);
  Scratch more(s.transposed + kBlockProtos * kT);
  Acc* acc = more.take<Acc>(p.shape.dim * kT);
  Acc* weighted = more.take<Acc>(kBlockProtos * kT);
  int64_t begin, stop;
  while (queue.take(&begin, &stop))
    for (int64_t task = begin; task < stop; ++task)
      backward_proto_block<T>(p, blocks[task], s, acc, weighted);
}

}  // namespace
}  // namespace fastproto::cpu
