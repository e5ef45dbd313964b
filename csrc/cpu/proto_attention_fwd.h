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

// A strip of pixels and what one bag has added up for it.
template <class Acc>
struct Strip {
  Acc* centred;  // [D][width]
  Acc* out;      // [D][width]
  int64_t pixel;
  int64_t count;
  PixelStats<Acc> stats;
  Acc bound[kMostPixels];     // of c/t
  Acc sum[kMostPixels];       // of weights
  Acc mean_sum[kMostPixels];  // of weights times the prototypes' means
};

template <class Acc>
struct FwdScratch {
  static constexpr int64_t kMostStrips = 2;
  Tiling tiling;
  Strip<Acc>* strips;
  Acc* protos;  // [kBlockProtos][row_stride(D)] centred
  Acc* scores;  // [kBlockProtos][width]
  ProtoStats<Acc>* block;
  int64_t bytes;

  FwdScratch(void* memory, int64_t dim, Tiling t) : tiling(t) {
    Scratch scratch(memory);
    strips = scratch.take<Strip<Acc>>(t.strips);
    for (int64_t i = 0; i < t.strips; ++i) {
      Acc* centred = scratch.take<Acc>(dim * t.width);
      Acc* out = scratch.take<Acc>(dim * t.width);
      if (memory != nullptr) {
        strips[i].centred = centred;
        strips[i].out = out;
      }
    }
    protos = scratch.take<Acc>(kBlockProtos * row_stride<Acc>(dim));
    scores = scratch.take<Acc>(kBlockProtos * t.width);
    block = scratch.take<ProtoStats<Acc>>(1);
    bytes = scratch.bytes();
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

// Mean over channels of the bag's first prototype: means are summed relative to it, because the
// backward takes differences of them.
template <class T>
AccOf<T> mean_origin(const Bags& bags, int64_t begin, int64_t dim) {
  return row_mean(static_cast<const T*>(bags.protos) + begin * dim, dim);
}

// The bag's O^T and sums in every strip.
template <class T>
void attend(const ProtoAttnFwdParams& p, int64_t begin, int64_t end, AccOf<T> origin,
            const FwdScratch<AccOf<T>>& s) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  const int64_t dim = p.shape.dim, width = s.tiling.width, stride = row_stride<Acc>(dim);
  const Acc eps = Acc(p.shape.eps);
  const Acc inv_t = Acc(1.0 / p.shape.temperature);
  const bool search = p.shape.temperature < kSmallestStaticT<Acc>;
  for (int64_t i = 0; i < s.tiling.strips; ++i)
    for (int64_t x = 0; x < width; ++x) {
      s.strips[i].bound[x] = search ? Acc(-2) * inv_t : inv_t;
      s.strips[i].sum[x] = 0;
      s.strips[i].mean_sum[x] = 0;
    }
  // Calls f(strip, rows, begin) with the scores of each block and strip.
  const auto for_scores = [&](auto&& f) {
    for (int64_t n = begin; n < end; n += kBlockProtos) {
      const int64_t rows = end - n < kBlockProtos ? end - n : kBlockProtos;
      load_protos<T>(p.bags, n, rows, dim, eps, s.protos, s.block);
      Ahead ahead = rows_ahead<T>(p.bags, n + rows, end, dim);
      for (int64_t i = 0; i < s.tiling.strips; ++i) {
        if (s.strips[i].count == 0) break;
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
                                    exponent_scale<Acc>(s.block->rnorm[r], inv_t, pixel_rnorm);
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
        const Vec<Acc> scale = exponent_scale<Acc>(s.block->rnorm[r], inv_t, pixel_rnorm);
        const Vec<Acc> w = softmax_term<Acc>(load(at), scale, bound);
        store(at, w);
        sum += w;
        mean_sum += w * (s.block->mean[r] - origin);
      }
      store(strip.sum + x, sum);
      store(strip.mean_sum + x, mean_sum);
    }
    gemm<Acc>(dim, width, rows, {s.protos, 1, stride}, s.scores, width, strip.out, width, n > begin,
              &ahead);
  });
}

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
void finish_strip(const ProtoAttnFwdParams& p, int64_t bag_size, int64_t map, AccOf<T> origin,
                  TileView<const T> feat, int64_t width, bool centred, Strip<AccOf<T>>& strip) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  const int64_t dim = p.shape.dim;
  Acc scale[kMostPixels], mean[kMostPixels];
  for (int64_t x = 0; x < width; ++x) {
    scale[x] = bag_size > 1 ? Acc(1) / strip.sum[x] : Acc(1);
    mean[x] = bag_size > 1 ? strip.mean_sum[x] * scale[x] : Acc(0);
  }
  if (p.stats != nullptr) {
    Acc* stats = static_cast<Acc*>(p.stats) + 3 * map * p.shape.pixels + strip.pixel;
    for (int64_t x = 0; x < strip.count; ++x) {
      stats[x] = bag_size > 1 ? strip.bound[x] : Acc(0);
      stats[p.shape.pixels + x] = bag_size > 1 ? scale[x] : Acc(0);
      stats[2 * p.shape.pixels + x] = mean[x];
    }
  }
  for (int64_t x = 0; x < width; ++x) mean[x] += origin;
  Acc plus[kMostPixels], minus[kMostPixels];
  for (int64_t x = 0; x < width; ++x) {
    plus[x] = centred ? mean[x] : Acc(0);
    minus[x] = centred ? Acc(0) : mean[x];
  }
  const auto out = tile_of<T>(p.out, map, p.shape.concat ? dim : 0, strip.pixel, strip.count);
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
  if (p.shape.concat) copy_tile<T>(feat, dim, tile_of<T>(p.out, map, 0, strip.pixel, strip.count));
}

// One task, decoded: ((episode*Q + query)*tiles + tile)*K + class.
struct ForwardTask {
  int64_t map, bag, episode, query, tile, pixel_tile;
  int64_t begin, end;  // of the bag

  ForwardTask(const ProtoAttnFwdParams& p, Tiling tiling, int64_t task) {
    const int64_t ways = p.shape.ways, tiles = tiling.tiles(p.shape);
    const int64_t image = task / ways / tiles, way = task % ways;
    pixel_tile = task / ways;
    tile = pixel_tile % tiles;
    episode = image / p.shape.queries;
    query = image % p.shape.queries;
    map = image * ways + way;
    bag = episode * ways + way;
    begin = p.bags.offsets[bag];
    end = p.bags.offsets[bag + 1];
  }
};

// Where each strip of the task's tile lies; those past the image are empty.
template <class Acc>
void place_strips(const ProtoAttnFwdParams& p, Tiling tiling, int64_t tile, Strip<Acc>* strips) {
  for (int64_t i = 0; i < tiling.strips; ++i) {
    strips[i].pixel = (tile * tiling.strips + i) * tiling.width;
    const int64_t left = p.shape.pixels - strips[i].pixel;
    strips[i].count = left < 0 ? 0 : left < tiling.width ? left : tiling.width;
  }
}

// Computes a task; `loaded` is the tile of pixels whose panels are in s.
template <class T>
void forward_task(const ProtoAttnFwdParams& p, const ForwardTask& task,
                  const FwdScratch<AccOf<T>>& s, int64_t* loaded) {
  using Acc = AccOf<T>;
  const int64_t dim = p.shape.dim, width = s.tiling.width, size = task.end - task.begin;
  const auto feat_of = [&](const Strip<Acc>& strip) {
    return tile_of<T>(p.feat, task.episode, task.query, strip.pixel, strip.count);
  };
  if (task.pixel_tile != *loaded) {
    place_strips(p, s.tiling, task.tile, s.strips);
    for (int64_t i = 0; i < s.tiling.strips && s.strips[i].count > 0; ++i)
      centre_pixels<T>(feat_of(s.strips[i]), dim, width, Acc(p.shape.eps), s.strips[i].centred,
                       &s.strips[i].stats);
    *loaded = task.pixel_tile;
  }
  Acc origin = 0;
  if (size > 1) {
    origin = mean_origin<T>(p.bags, task.begin, dim);
    attend<T>(p, task.begin, task.end, origin, s);
  }
  for (int64_t i = 0; i < s.tiling.strips && s.strips[i].count > 0; ++i) {
    Strip<Acc>& strip = s.strips[i];
    if (size == 0)
      for (int64_t at = 0; at < dim * width; ++at) strip.out[at] = 0;
    if (size == 1)
      copy_prototype<T>(static_cast<const T*>(p.bags.protos) + task.begin * dim, dim, width, strip);
    finish_strip<T>(p, size, task.map, origin, feat_of(strip), width, true, strip);
  }
}

template <class T>
void forward(const ProtoAttnFwdParams& p, Tiling tiling, TaskQueue& queue, void* memory) {
  const FwdScratch<AccOf<T>> s(memory, p.shape.dim, tiling);
  int64_t loaded = -1, first, stop;
  while (queue.take(&first, &stop))
    for (int64_t task = first; task < stop; ++task)
      forward_task<T>(p, ForwardTask(p, tiling, task), s, &loaded);
}

}  // namespace
}  // namespace fastproto::cpu
