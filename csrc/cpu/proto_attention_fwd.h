// SPDX-License-Identifier: Apache-2.0
// Forward of proto_attention for one tile of pixels and one bag. Symbols as in docs/math.md.
//
//     S^T[N, W] = Pc[N, D] . Fc[D, W]      blocks of kBlockProtos prototypes, strips of W pixels
//     w = exp((c - bound)/t),  sums over prototypes
//     O^T[D, W] += Pc^T . w                G = O/L + (sum_j w_j mean_j)/L
//
// Both operands are centred on the way into cache, pixels once per tile, prototypes once per tile
// and block: in float32 the algebraic form (<q,p> - D mq mp) loses mean^2/std^2 in accuracy. The
// bound is 1 (|c| <= 1), so sums over blocks just add; where exp(-2/t) would underflow, a first
// pass finds the row maximum.
#pragma once

#include "tiles.h"

namespace fastproto::cpu {
namespace {

// Smallest t for which exp((c - 1)/t), times a prototype, stays a normal number for every c >= -1.
template <class Acc>
constexpr double kSmallestStaticT = sizeof(Acc) == 4 ? 2.0 / 60.0 : 2.0 / 600.0;

constexpr int64_t kMostStrips = 2;

// A strip of pixels and what one bag has added up for it.
template <class Acc>
struct Strip {
  PixelStats<Acc> stats;
  Acc bound[kMostPixels];     // of c/t
  Acc sum[kMostPixels];       // of weights
  Acc mean_sum[kMostPixels];  // of weights times the prototypes' means
  Acc* centred;               // [D][width]
  Acc* out;                   // [D][width]
  int64_t pixel;
  int64_t count;
};

template <class Acc>
struct FwdScratch : Scratch {
  Tiling tiling;
  Strip<Acc> strips[kMostStrips];
  Acc* protos;  // [kBlockProtos][row_stride(D)] centred
  Acc* scores;  // [kBlockProtos][width]
  ProtoStats<Acc> block;

  FwdScratch(void* memory, int64_t dim, Tiling t) : Scratch(memory), tiling(t) {
    for (int64_t i = 0; i < t.strips; ++i) {
      strips[i].centred = take<Acc>(dim * t.width);
      strips[i].out = take<Acc>(dim * t.width);
    }
    protos = take<Acc>(kBlockProtos * row_stride<Acc>(dim));
    scores = take<Acc>(kBlockProtos * t.width);
  }
};

// The softmax weight but for its normalisation, exp(c/t - bound) with c/t = score * scale: the
// fewest roundings. The backward must get the same bits.
template <class Acc>
inline Vec<Acc> exponent_scale(Acc proto_rnorm, Acc inv_t, Vec<Acc> pixel_rnorm) {
  return proto_rnorm * inv_t * pixel_rnorm;
}
template <class Acc>
inline Vec<Acc> softmax_term(Vec<Acc> score, Vec<Acc> scale, Vec<Acc> bound) {
  return exp_nonpositive(score * scale - bound);
}

// Before a bag is attended to: no sums yet, and `bound` for all its exponents.
template <class Acc>
void clear_sums(Acc bound, Tiling tiling, Strip<Acc>* strips) {
  for (int64_t i = 0; i < tiling.strips; ++i)
    for (int64_t x = 0; x < tiling.width; ++x) {
      strips[i].bound[x] = bound;
      strips[i].sum[x] = 0;
      strips[i].mean_sum[x] = 0;
    }
}

// The bag's O^T and sums in every strip. Means are summed relative to `origin`, that of the bag's
// first prototype, because the backward takes differences of them.
template <class T>
void attend(const ForwardParams& p, int64_t begin, int64_t end, AccOf<T> origin,
            FwdScratch<AccOf<T>>& s) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  const int64_t dim = p.problem.dim, width = s.tiling.width, stride = row_stride<Acc>(dim);
  const Acc inv_t = Acc(1.0 / p.problem.temperature);
  const bool search = p.problem.temperature < kSmallestStaticT<Acc>;
  clear_sums<Acc>(search ? Acc(-2) * inv_t : inv_t, s.tiling, s.strips);
  // Calls f(strip, rows, begin) with the scores of each block and strip.
  const auto for_scores = [&](auto&& f) {
    for (int64_t n = begin; n < end; n += kBlockProtos) {
      const int64_t rows = end - n < kBlockProtos ? end - n : kBlockProtos;
      const T* protos = static_cast<const T*>(p.protos) + n * dim;
      load_protos<T>(protos, rows, dim, Acc(p.problem.eps), s.protos, &s.block);
      Ahead ahead = rows_ahead(protos + rows * dim, end - n - rows, dim);
      for (int64_t i = 0; i < s.tiling.strips && s.strips[i].count > 0; ++i) {
        gemm<Acc>(rows, width, dim, {s.protos, stride, 1}, s.strips[i].centred, width, s.scores,
                  width, false);
        f(s.strips[i], rows, n, ahead);
      }
    }
  };
  if (search)
    for_scores([&](Strip<Acc>& strip, int64_t rows, int64_t, Ahead&) {
      for (int64_t x = 0; x < width; x += L) {
        const Vec<Acc> pixel_rnorm = load(strip.stats.rnorm + x);
        Vec<Acc> most = load(strip.bound + x);
        for (int64_t r = 0; r < rows; ++r) {
          const Vec<Acc> exponent = load(s.scores + r * width + x) *
                                    exponent_scale<Acc>(s.block.rnorm[r], inv_t, pixel_rnorm);
          most = exponent > most ? exponent : most;
        }
        store(strip.bound + x, most);
      }
    });
  for_scores([&](Strip<Acc>& strip, int64_t rows, int64_t n, Ahead& ahead) {
    for (int64_t x = 0; x < width; x += L) {
      const Vec<Acc> pixel_rnorm = load(strip.stats.rnorm + x), bound = load(strip.bound + x);
      Vec<Acc> sum = load(strip.sum + x), mean_sum = load(strip.mean_sum + x);
      for (int64_t r = 0; r < rows; ++r) {
        Acc* at = s.scores + r * width + x;
        const Vec<Acc> scale = exponent_scale<Acc>(s.block.rnorm[r], inv_t, pixel_rnorm);
        const Vec<Acc> w = softmax_term<Acc>(load(at), scale, bound);
        store(at, w);
        sum += w;
        mean_sum += w * (s.block.mean[r] - origin);
      }
      store(strip.sum + x, sum);
      store(strip.mean_sum + x, mean_sum);
    }
    gemm<Acc>(dim, width, rows, {s.protos, 1, stride}, s.scores, width, strip.out, width, n > begin,
              &ahead);
  });
}

// One task, decoded: ((episode*Q + query)*tiles + tile)*K + class.
struct ForwardTask {
  int64_t map, episode, query, tile, pixel_tile;
  int64_t begin, end;  // of the bag

  ForwardTask(const ForwardParams& p, Tiling tiling, int64_t task) {
    const int64_t ways = p.problem.ways, tiles = tiling.tiles(p.problem);
    const int64_t image = task / ways / tiles, way = task % ways;
    pixel_tile = task / ways;
    tile = pixel_tile % tiles;
    episode = image / p.problem.queries;
    query = image % p.problem.queries;
    map = image * ways + way;
    begin = p.offsets[episode * ways + way];
    end = p.offsets[episode * ways + way + 1];
  }
  int64_t size() const { return end - begin; }
  // Of the bag.
  template <class T>
  const T* first_proto(const ForwardParams& p) const {
    return static_cast<const T*>(p.protos) + begin * p.problem.dim;
  }
  template <class T, class Acc>
  TileView<const T> feat(const ForwardParams& p, const Strip<Acc>& strip) const {
    return tile_of<T>(p.feat, episode, query, strip.pixel, strip.count);
  }
  // Where each strip of the tile lies; those past the image are empty.
  template <class Acc>
  void place(const ForwardParams& p, Tiling tiling, Strip<Acc>* strips) const {
    for (int64_t i = 0; i < tiling.strips; ++i) {
      strips[i].pixel = (tile * tiling.strips + i) * tiling.width;
      const int64_t left = p.problem.pixels - strips[i].pixel;
      strips[i].count = left < 0 ? 0 : left < tiling.width ? left : tiling.width;
    }
  }
};

// out[d][x] = value of channel d, for a bag of one: w = 1 exactly, whatever the cosine. G is not
// centred, so that it is P to the bit; NaN and Inf reach every pixel, as they do through the cosine
// of the definition.
template <class T>
void copy_prototype(const T* proto, int64_t dim, int64_t width, Strip<AccOf<T>>& strip) {
  using Acc = AccOf<T>;
  Acc poison = 0;
  for (int64_t d = 0; d < dim; ++d) poison += to_acc(proto[d]) - to_acc(proto[d]);
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t x = 0; x < width; ++x)
      strip.out[d * width + x] =
          to_acc(proto[d]) + (poison + (strip.stats.rnorm[x] - strip.stats.rnorm[x]));
}

// Y, and what the backward needs, of one strip whose O^T is complete: the sum of weighted
// prototypes, centred (the mean of G is still to be added) or not.
template <class T>
void finish_strip(const ForwardParams& p, const ForwardTask& task, AccOf<T> origin, int64_t width,
                  bool centred, Strip<AccOf<T>>& strip) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  const int64_t dim = p.problem.dim, map = task.map;
  const bool weighted = task.size() > 1;
  const auto feat = task.feat<T>(p, strip);
  Acc scale[kMostPixels], mean[kMostPixels];
  for (int64_t x = 0; x < width; ++x) {
    scale[x] = weighted ? Acc(1) / strip.sum[x] : Acc(1);
    mean[x] = weighted ? strip.mean_sum[x] * scale[x] : Acc(0);
  }
  if (p.stats != nullptr) {
    Acc* stats = static_cast<Acc*>(p.stats) + 3 * map * p.problem.pixels + strip.pixel;
    for (int64_t x = 0; x < strip.count; ++x) {
      stats[x] = weighted ? strip.bound[x] : Acc(0);
      stats[p.problem.pixels + x] = weighted ? scale[x] : Acc(0);
      stats[2 * p.problem.pixels + x] = mean[x];
    }
  }
  for (int64_t x = 0; x < width; ++x) mean[x] += origin;
  Acc plus[kMostPixels], minus[kMostPixels];
  for (int64_t x = 0; x < width; ++x) {
    plus[x] = centred ? mean[x] : Acc(0);
    minus[x] = centred ? Acc(0) : mean[x];
  }
  const auto out = tile_of<T>(p.out, map, p.problem.concat ? dim : 0, strip.pixel, strip.count);
  const auto agg =
      p.stats == nullptr ? TileView<Acc>{} : tile_of<Acc>(p.agg, map, 0, strip.pixel, strip.count);
  for_blocks<Acc>(dim, width, [&](int64_t d, int64_t x, auto channels) {
    Vec<Acc> f[L], g[L];
    prefetch_block<false>(feat, dim, d + L, x);
    prefetch_block<true>(out, dim, d + L, x);
    load_block<T>(feat, d, x, channels, f);
    const Vec<Acc> by = load(scale + x), add = load(plus + x), subtract = load(minus + x);
    repeat(channels, [&](int i) {
      g[i] = load(strip.out + (d + i) * width + x) * by;
      f[i] *= g[i] + add;
      g[i] -= subtract;
    });
    store_block<T>(f, d, x, channels, out);
    if (p.stats != nullptr) store_block<Acc>(g, d, x, channels, agg);
  });
  if (p.problem.concat)
    copy_tile<T>(feat, dim, tile_of<T>(p.out, map, 0, strip.pixel, strip.count));
}

// Computes a task; `loaded` is the tile of pixels whose panels are in s.
template <class T>
void forward_task(const ForwardParams& p, const ForwardTask& task, FwdScratch<AccOf<T>>& s,
                  int64_t* loaded) {
  using Acc = AccOf<T>;
  const int64_t dim = p.problem.dim, width = s.tiling.width;
  if (task.pixel_tile != *loaded) {
    task.place(p, s.tiling, s.strips);
    for (int64_t i = 0; i < s.tiling.strips && s.strips[i].count > 0; ++i)
      centre_pixels<T>(task.feat<T>(p, s.strips[i]), dim, width, Acc(p.problem.eps),
                       s.strips[i].centred, &s.strips[i].stats);
    *loaded = task.pixel_tile;
  }
  const T* proto = task.first_proto<T>(p);
  const Acc origin = task.size() > 1 ? row_mean(proto, dim) : Acc(0);
  if (task.size() > 1) attend<T>(p, task.begin, task.end, origin, s);
  for (int64_t i = 0; i < s.tiling.strips && s.strips[i].count > 0; ++i) {
    Strip<Acc>& strip = s.strips[i];
    if (task.size() == 0)
      for (int64_t at = 0; at < dim * width; ++at) strip.out[at] = 0;
    if (task.size() == 1) copy_prototype<T>(proto, dim, width, strip);
    finish_strip<T>(p, task, origin, width, true, strip);
  }
}

template <class T>
void forward(const ForwardParams& p, Tiling tiling, TaskQueue& queue, void* memory) {
  FwdScratch<AccOf<T>> s(memory, p.problem.dim, tiling);
  int64_t loaded = -1, first, stop;
  while (queue.take(&first, &stop))
    for (int64_t task = first; task < stop; ++task)
      forward_task<T>(p, ForwardTask(p, tiling, task), s, &loaded);
}

}  // namespace
}  // namespace fastproto::cpu
