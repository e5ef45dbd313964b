// SPDX-License-Identifier: Apache-2.0
// Forward of proto_attention for one tile of pixels and one bag. Symbols as in docs/math.md.
//
//     S^T[N, T] = Pc[N, D] . Fc[D, T]      blocks of kBlockProtos prototypes
//     w = exp((c - bound)/t),  sums over prototypes
//     O^T[D, T] += Pc^T . w                G = O/L + (sum_j w_j mean_j)/L
//
// Both operands are centred on the way into cache, once per tile and block: in float32 the
// algebraic form (<q,p> - D mq mp) loses mean^2/std^2 in accuracy. The bound is 1 (|c| <= 1), so
// sums over blocks just add; where exp(-2/t) would underflow, a first pass finds the row maximum.
#pragma once

#include "tiles.h"

namespace fastproto::cpu {
namespace {

// Smallest t for which exp((c - 1)/t), times a prototype, stays a normal number for every c >= -1.
template <class Acc>
constexpr double kSmallestStaticT = sizeof(Acc) == 4 ? 2.0 / 60.0 : 2.0 / 600.0;

template <class Acc>
struct FwdScratch {
  Acc* raw;      // [D][kT] features
  Acc* centred;  // [D][kT]
  Acc* protos;   // [kBlockProtos][D] centred
  Acc* out;      // [D][kT]
  Acc* scores;   // [kBlockProtos][kT]
  PixelStats<Acc>* pixels;
  ProtoStats<Acc>* block;

  FwdScratch(void* memory, int64_t dim) {
    Scratch scratch(memory);
    raw = scratch.take<Acc>(dim * kT);
    centred = scratch.take<Acc>(dim * kT);
    protos = scratch.take<Acc>(kBlockProtos * dim);
    out = scratch.take<Acc>(dim * kT);
    scores = scratch.take<Acc>(kBlockProtos * kT);
    pixels = scratch.take<PixelStats<Acc>>(1);
    block = scratch.take<ProtoStats<Acc>>(1);
  }
};

// Cosines of `rows` prototypes starting at `begin` with every pixel of the tile, into s.scores.
template <class T>
void cosines(const Bags& bags, int64_t begin, int64_t rows, int64_t dim, AccOf<T> eps,
             const FwdScratch<AccOf<T>>& s) {
  using Acc = AccOf<T>;
  load_protos<T>(bags, begin, rows, dim, eps, s.protos, s.block);
  gemm<Acc>(rows, kT, dim, {s.protos, dim, 1}, s.centred, kT, s.scores, kT, false);
  for (int64_t n = 0; n < rows; ++n) {
    const Acc rnorm = s.block->rnorm[n];
    Acc* row = s.scores + n * kT;
    for (int64_t i = 0; i < kT; ++i) row[i] *= rnorm * s.pixels->rnorm[i];
  }
}

// Mean over channels of the bag's first prototype: means are summed relative to it, because the
// backward takes differences of them.
template <class T>
AccOf<T> mean_origin(const Bags& bags, int64_t begin, int64_t dim, AccOf<T>* row) {
  load_run(static_cast<const T*>(bags.protos) + begin * dim, row, dim);
  return row_mean(row, dim);
}

// The bag's O^T in s.out, its sum of weights and of weighted prototype means per pixel.
template <class T>
void attend(const ProtoAttnFwdParams& p, int64_t begin, int64_t end, const FwdScratch<AccOf<T>>& s,
            AccOf<T> origin, AccOf<T>* bound, AccOf<T>* sum, AccOf<T>* mean_sum) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  const int64_t dim = p.shape.dim;
  const Acc eps = Acc(p.shape.eps);
  const Acc inv_t = Acc(1.0 / p.shape.temperature);
  for (int64_t i = 0; i < kT; ++i) {
    bound[i] = 1;
    sum[i] = 0;
    mean_sum[i] = 0;
  }
  if (p.shape.temperature < kSmallestStaticT<Acc>) {
    for (int64_t i = 0; i < kT; ++i) bound[i] = Acc(-2);
    for (int64_t n = begin; n < end; n += kBlockProtos) {
      const int64_t rows = end - n < kBlockProtos ? end - n : kBlockProtos;
      cosines<T>(p.bags, n, rows, dim, eps, s);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < kT; ++i) {
          const Acc c = s.scores[r * kT + i];
          bound[i] = c > bound[i] ? c : bound[i];
        }
    }
  }
  for (int64_t n = begin; n < end; n += kBlockProtos) {
    const int64_t rows = end - n < kBlockProtos ? end - n : kBlockProtos;
    cosines<T>(p.bags, n, rows, dim, eps, s);
    for (int64_t i = 0; i < kT; i += L) {
      Vec<Acc> total = load(sum + i), mean_total = load(mean_sum + i);
      const Vec<Acc> top = load(bound + i);
      for (int64_t r = 0; r < rows; ++r) {
        const Vec<Acc> w = exp_nonpositive((load(s.scores + r * kT + i) - top) * inv_t);
        store(s.scores + r * kT + i, w);
        total += w;
        mean_total += w * (s.block->mean[r] - origin);
      }
      store(sum + i, total);
      store(mean_sum + i, mean_total);
    }
    gemm<Acc>(dim, kT, rows, {s.protos, 1, dim}, s.scores, kT, s.out, kT, n > begin);
  }
}

// s.out = G - origin - mean; bound, 1/sum and mean per pixel; returns origin.
template <class T>
AccOf<T> aggregate_tile(const ProtoAttnFwdParams& p, int64_t begin, int64_t end,
                        const FwdScratch<AccOf<T>>& s, AccOf<T>* bound, AccOf<T>* rsum,
                        AccOf<T>* mean) {
  using Acc = AccOf<T>;
  const int64_t dim = p.shape.dim;
  for (int64_t i = 0; i < kT; ++i) {
    bound[i] = 0;
    rsum[i] = 0;
    mean[i] = 0;
  }
  if (end == begin) {
    for (int64_t i = 0; i < dim * kT; ++i) s.out[i] = 0;
    return 0;
  }
  if (end - begin == 1) {
    // One prototype: w = 1 exactly, whatever the cosine. G is not centred, so that it is P to the
    // bit; NaN and Inf reach every pixel, as they do through the cosine of the definition.
    load_run(static_cast<const T*>(p.bags.protos) + begin * dim, s.protos, dim);
    Acc poison = 0;
    for (int64_t d = 0; d < dim; ++d) poison += s.protos[d] - s.protos[d];
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t i = 0; i < kT; ++i)
        s.out[d * kT + i] = s.protos[d] + (poison + (s.pixels->rnorm[i] - s.pixels->rnorm[i]));
    return 0;
  }
  const Acc origin = mean_origin<T>(p.bags, begin, dim, s.protos);
  attend<T>(p, begin, end, s, origin, bound, rsum, mean);
  for (int64_t i = 0; i < kT; ++i) {
    rsum[i] = Acc(1) / rsum[i];
    mean[i] *= rsum[i];
  }
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t i = 0; i < kT; ++i) s.out[d * kT + i] *= rsum[i];
  return origin;
}

template <class T>
void forward_tile(const ProtoAttnFwdParams& p, int64_t bag, int64_t map, int64_t pixel,
                  TileView<const T> feat, const FwdScratch<AccOf<T>>& s) {
  using Acc = AccOf<T>;
  const int64_t dim = p.shape.dim, count = feat.count;
  Acc bound[kT], rsum[kT], mean[kT];
  const Acc origin =
      aggregate_tile<T>(p, p.bags.offsets[bag], p.bags.offsets[bag + 1], s, bound, rsum, mean);
  if (p.stats != nullptr) {
    store_tile<Acc>(s.out, dim, tile_of<Acc>(p.agg, map, 0, pixel, count));
    Acc* stats = static_cast<Acc*>(p.stats) + 3 * map * p.shape.pixels + pixel;
    for (int64_t i = 0; i < count; ++i) {
      stats[i] = bound[i];
      stats[p.shape.pixels + i] = rsum[i];
      stats[2 * p.shape.pixels + i] = mean[i];
    }
  }
  for (int64_t i = 0; i < kT; ++i) mean[i] += origin;
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t i = 0; i < kT; ++i)
      s.out[d * kT + i] = (s.out[d * kT + i] + mean[i]) * s.raw[d * kT + i];
  if (p.shape.concat) copy_tile<T>(feat, dim, tile_of<T>(p.out, map, 0, pixel, count));
  store_tile<T>(s.out, dim, tile_of<T>(p.out, map, p.shape.concat ? dim : 0, pixel, count));
}

template <class T>
void forward(const ProtoAttnFwdParams& p, TaskQueue& queue, void* memory) {
  using Acc = AccOf<T>;
  const FwdScratch<Acc> s(memory, p.shape.dim);
  const int64_t tiles = pixel_tiles(p.shape), ways = p.shape.ways;
  int64_t loaded = -1, begin, stop;
  while (queue.take(&begin, &stop)) {
    for (int64_t task = begin; task < stop; ++task) {
      const int64_t way = task % ways, tile = task / ways % tiles, image = task / ways / tiles;
      const int64_t episode = image / p.shape.queries, query = image % p.shape.queries;
      const int64_t pixel = tile * kT;
      const int64_t count = p.shape.pixels - pixel < kT ? p.shape.pixels - pixel : kT;
      const auto feat = tile_of<T>(p.feat, episode, query, pixel, count);
      if (task / ways != loaded) {
        load_tile<T>(feat, p.shape.dim, s.raw);
        centre_pixels<Acc>(s.raw, p.shape.dim, Acc(p.shape.eps), s.centred, s.pixels);
        loaded = task / ways;
      }
      forward_tile<T>(p, episode * ways + way, image * ways + way, pixel, feat, s);
    }
  }
}

}  // namespace
}  // namespace fastproto::cpu
