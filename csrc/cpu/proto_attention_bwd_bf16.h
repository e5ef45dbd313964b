// SPDX-License-Identifier: Apache-2.0
// Backward of proto_attention in bfloat16 on the CPU's bfloat16 units: the five products, the order
// of sums and the turns of proto_attention_bwd.h, on numbers rounded to bfloat16 where autograd
// rounds them, too (dO, A, dS'), with sums in float32. What forward_bf16 leaves to the float32
// kernel is left to it here.
//
//     S^T, dA^T      = P . F, P . dO            P and F as they are; means taken out in float32
//     dF^T          += P^T . dS'                the prototypes' means taken out at the end
//     dP            += [A | dS'] . [dO ; Fc]
#pragma once

#include "proto_attention_bwd.h"
#include "proto_attention_fwd_bf16.h"

namespace fastproto::cpu {
namespace {

struct BwdScratchBf16 : Scratch {
  BwdScratchBf16(void* memory, int64_t d, Tiling t) : Scratch(memory), dim(d), width(t.width) {}

  const int64_t dim, width;
  // [D/2][W][2] pairs of channels of F and of dO.
  uint16_t* const feat = take<uint16_t>(dim * width);
  uint16_t* const grad_out = take<uint16_t>(dim * width);
  // [W][D][2] pairs of pixels: W/2 of dO, then W/2 of Fc.
  uint16_t* const transposed = take<uint16_t>(2 * width * dim);
  float* const grad_feat = take<float>(dim * width);                 // [D][W] sums of all bags
  uint16_t* const rows = take<uint16_t>(kBlockProtos * dim);         // [kBlockProtos][D]
  uint16_t* const proto_panel = take<uint16_t>(dim * kBlockProtos);  // [D][kBlockProtos] P^T
  float* const scores = take<float>(kBlockProtos * width);           // [kBlockProtos][W]
  float* const grad_scores = take<float>(kBlockProtos * width);      // [kBlockProtos][W]
  // [kBlockProtos][2 W] A, then dS'; and [kBlockProtos/2][W][2] dS'.
  uint16_t* const weights = take<uint16_t>(kBlockProtos * 2 * width);
  uint16_t* const pairs = take<uint16_t>(kBlockProtos * width);
  float* const sums = take<float>(kBlockProtos * dim);  // [kBlockProtos][D] of a block of odd size
};

// values: one vector of pixels of 16 channels -> pairs of pixels at out[pair][channel][2], rows of
// `dim` pairs.
FASTPROTO_INLINE void store_pixel_pairs(Vec<float>* values, int64_t dim, uint16_t* out) {
  constexpr int L = kLanes<float>;
  transpose(values);
#pragma GCC unroll 8
  for (int i = 0; i < L; i += 2) {
    const BitVec pair = bfloat16_bits(values[i]) | (bfloat16_bits(values[i + 1]) << 16);
    __builtin_memcpy(out + i * dim, &pair, 64);
  }
}

FASTPROTO_INLINE void store_half(BitVec bits, uint16_t* out) {
  const auto half = __builtin_convertvector(bits, HalfVec);
  __builtin_memcpy(out, &half, sizeof(half));
}

class BackwardTaskBf16 : BackwardBase<BFloat16> {
 public:
  BackwardTaskBf16(const BackwardParams& p, const BackwardPass& pass, const BwdScratchBf16& s,
                   int64_t task)
      : BackwardBase(p, pass, task), s_(s) {
    input_.pairs = s.feat;
  }

  // False, with nothing done, when a pixel is not fit.
  bool run() {
    load_pairs(feat(), dim_, width_, float(p_.problem.eps), strip_, input_);
    if (!input_.ordinary) return false;
    if (wants_protos()) transpose_feat();
    for_bags([&](int64_t way, int64_t begin, int64_t end, bool) { load_grad(way, begin, end); },
             [&](int64_t n, int64_t rows, int64_t, bool single, bool want_protos) {
               run_block(n, rows, single, want_protos);
             });
    if (pass_.want_feat) finish_feat();
    return true;
  }

 private:
  // The lower half of s.transposed: Fc, rounded.
  void transpose_feat() {
    uint16_t* out = s_.transposed + width_ * dim_;
    for (int64_t d = 0; d < dim_; d += L)
      for (int64_t x = 0; x < width_; x += L) {
        const Vec<float> mean = load(strip_.stats.mean + x);
        Vec<float> values[L];
#pragma GCC unroll 8
        for (int i = 0; i < L / 2; ++i) {
          BitVec pair;
          __builtin_memcpy(&pair, input_.pairs + ((d / 2 + i) * width_ + x) * 2, 64);
          values[2 * i] = as_floats(pair << 16) - mean;
          values[2 * i + 1] = as_floats(pair & 0xffff0000u) - mean;
        }
        store_pixel_pairs(values, dim_, out + (x * dim_ + 2 * d));
      }
  }

  // dO in both forms; g_.delta is <dO, G> here, since the prototypes' means stay in dA as well.
  void load_grad(int64_t way, int64_t begin, int64_t end) {
    const bool want_protos = wants_protos();
    const auto product = [&](int64_t d, int64_t x, auto, const Vec<float>* grad,
                             const Vec<float>* gc, Vec<float>* delta,
                             Vec<float>* total) __attribute__((always_inline)) {
      Vec<float> grad_o[L];
#pragma GCC unroll 8
      for (int i = 0; i < L; i += 2) {
        const int64_t at = (d / 2 + i / 2) * width_ + x;
        BitVec pair;
        __builtin_memcpy(&pair, input_.pairs + 2 * at, 64);
        const BitVec low = bfloat16_bits(grad[i] * as_floats(pair << 16));
        const BitVec high = bfloat16_bits(grad[i + 1] * as_floats(pair & 0xffff0000u));
        grad_o[i] = as_floats(low << 16);
        grad_o[i + 1] = as_floats(high << 16);
        pair = low | (high << 16);
        __builtin_memcpy(s_.grad_out + 2 * at, &pair, 64);
        *delta += grad_o[i] * gc[i];
        *delta += grad_o[i + 1] * gc[i + 1];
        *total += grad_o[i] + grad_o[i + 1];
      }
      if (want_protos) store_pixel_pairs(grad_o, dim_, s_.transposed + (x * dim_ + 2 * d));
    };
    BackwardBase::load_grad(way, begin, end, s_.grad_feat, product);
    for (int64_t x = 0; x < width_; x += L)
      store(g_.delta + x, load(g_.delta + x) + load(g_.mean + x) * load(g_.total + x));
  }

  void run_block(int64_t n, int64_t rows, bool single, bool want_protos) {
    float along[kBlockProtos] = {};  // sum_i dS_i c_i
    if (single) {                    // A = 1 whatever the cosine
      for (int64_t x = 0; x < 2 * width_; ++x) s_.weights[x] = x < width_ ? 0x3f80 : 0;
    } else {
      // Fit, or backward_bf16 had not come here.
      proto_moments(protos(n), rows, dim_, float(p_.problem.eps), &stats_);
      const RowsBf16 block = load_block_rows(protos(n), rows, dim_, s_.rows);
      gemm_bf16(whole_tiles(rows), width_, dim_, block, {input_.pairs, width_}, s_.scores, width_,
                false);
      gemm_bf16(whole_tiles(rows), width_, dim_, block, {s_.grad_out, width_}, s_.grad_scores,
                width_, false);
      score_grads(rows, along);
      if (pass_.want_feat) {
        transpose_protos(block, rows, dim_, s_.proto_panel);
        gemm_bf16(dim_, width_, product_depth(rows), {s_.proto_panel, kBlockProtos},
                  {s_.pairs, width_}, s_.grad_feat, width_, true);
      }
    }
    if (want_protos) add_block(n, rows, single, along);
  }

  // s.weights and s.pairs, and the sums of dS c.
  void score_grads(int64_t rows, float* along) {
    const float inv_t = float(1.0 / p_.problem.temperature), t = float(p_.problem.temperature);
    const int64_t pitch = 2 * width_;
    Vec<float> sums[kBlockProtos] = {};
    for (int64_t x = 0; x < width_; x += L) {
      const Vec<float> rnorm = load(strip_.stats.rnorm + x);
      const Vec<float> scaled_mean = load(input_.scaled_mean + x);
      const Vec<float> bound = load(g_.bound + x), rsum = load(g_.rsum + x);
      const Vec<float> delta = load(g_.delta + x);
      Vec<float> pixel_along = load(g_.along + x), mean_sum = load(mean_sum_ + x);
      const auto row = [&](int64_t r) __attribute__((always_inline)) {
        const float by = stats_.rnorm[r] * inv_t, minus = float(dim_) * stats_.mean[r] * by;
        const Vec<float> exponent =
            load(s_.scores + r * width_ + x) * (by * rnorm) - minus * scaled_mean;  // c/t
        const Vec<float> a = exp_nonpositive(exponent - bound) * rsum;
        const Vec<float> grad_c = a * (load(s_.grad_scores + r * width_ + x) - delta) * inv_t;
        const Vec<float> term = grad_c * (exponent * t);
        const BitVec ds = bfloat16_bits(grad_c * (stats_.rnorm[r] * rnorm));
        store_half(bfloat16_bits(a), s_.weights + r * pitch + x);
        store_half(ds, s_.weights + r * pitch + width_ + x);
        pixel_along += term;
        mean_sum += as_floats(ds << 16) * stats_.mean[r];
        sums[r] += term;
        return ds;
      };
      store_row_pairs(rows, width_, s_.pairs + 2 * x, row);
      store(g_.along + x, pixel_along);
      store(mean_sum_ + x, mean_sum);
    }
    for (int64_t r = 0; r < rows; ++r) along[r] = sum_lanes<float>(sums[r]);
    // Whole tiles: rows of zeros below.
    std::memset(s_.weights + rows * pitch, 0, size_t((whole_tiles(rows) - rows) * pitch * 2));
  }

  void add_block(int64_t n, int64_t rows, bool single, const float* along) {
    const bool whole = rows % 16 == 0;
    const RowsBf16 weights{s_.weights, 2 * width_};
    const PairsBf16 panels{s_.transposed, dim_};
    if (single) std::memset(s_.weights + 2 * width_, 0, size_t(15 * 2 * width_ * 2));
    // Rows past the block belong to others: what is no multiple of a tile goes another way round.
    if (!whole)
      gemm_bf16(whole_tiles(rows), dim_, 2 * width_, weights, panels, s_.sums, dim_, false);
    add_to_protos(n, rows, single, stats_, along, [&](float* sums) {
      if (whole) return gemm_bf16(rows, dim_, 2 * width_, weights, panels, sums, dim_, !first_);
      for (int64_t i = 0; i < rows * dim_; i += L)
        store(sums + i, first_ ? load(s_.sums + i) : load(sums + i) + load(s_.sums + i));
    });
  }

  void finish_feat() {
    store_grad_temperature();
    float radial[kMostPixels];
    for (int64_t x = 0; x < width_; ++x)
      radial[x] = strip_.stats.rnorm[x] * strip_.stats.rnorm[x] * g_.along[x];
    const auto dst = grad_feat();
    for_blocks<float>(dim_, width_, [&](int64_t d, int64_t x, auto channels) {
      Vec<float> rows[L];
      prefetch_block<true>(dst, dim_, d + L, x);
      const Vec<float> by = load(radial + x), mean = load(strip_.stats.mean + x);
      const Vec<float> minus = load(mean_sum_ + x) - mean * by;
#pragma GCC unroll 8
      for (int i = 0; i < L; i += 2) {
        BitVec pair;
        __builtin_memcpy(&pair, input_.pairs + ((d / 2 + i / 2) * width_ + x) * 2, 64);
        const float* at = s_.grad_feat + (d + i) * width_ + x;
        rows[i] = load(at) - (as_floats(pair << 16) * by + minus);
        rows[i + 1] = load(at + width_) - (as_floats(pair & 0xffff0000u) * by + minus);
      }
      store_block<BFloat16>(rows, d, x, channels, dst);
    });
  }

  const BwdScratchBf16& s_;
  Strip<float> strip_;                // statistics of the pixels
  StripBf16 input_;                   // F
  ProtoStats<float> stats_;           // of the current block
  float mean_sum_[kMostPixels] = {};  // sum_j dS'_j mean(P_j)
};

// Whether every prototype of bags of more than one is fit; all workers find the same.
inline bool all_protos_fit(const BackwardParams& p) {
  const int64_t bags = p.problem.episodes * p.problem.ways;
  const auto* protos = static_cast<const BFloat16*>(p.protos);
  ProtoStats<float> stats;
  for (int64_t bag = 0; bag < bags; ++bag) {
    const int64_t begin = p.offsets[bag], end = p.offsets[bag + 1];
    for (int64_t n = begin; end - begin > 1 && n < end; n += kBlockProtos)
      if (!proto_moments(protos + n * p.problem.dim,
                         end - n < kBlockProtos ? end - n : kBlockProtos, p.problem.dim,
                         float(p.problem.eps), &stats))
        return false;
  }
  return true;
}

// Tasks as in `backward`.
void backward_bf16(const BackwardParams& p, const BackwardPass& pass, TaskQueue& queue,
                   void* memory) {
  const int64_t dim = p.problem.dim;
  if (dim % 32 != 0 || p.problem.temperature < kSmallestStaticT<float> || !all_protos_fit(p))
    return backward<BFloat16>(p, pass, queue, memory);
  [[maybe_unused]] MatrixUnit unit;
  int64_t first, stop;
  while (queue.take(&first, &stop))
    for (int64_t task = first; task < stop; ++task) {
      const BwdScratchBf16 s(memory, dim, pass.tiling);
      if (BackwardTaskBf16(p, pass, s, task).run()) continue;
      const BwdScratch<float> wide(memory, dim, pass.tiling);
      BackwardTask<BFloat16>(p, pass, wide, task).run();
    }
}

}  // namespace
}  // namespace fastproto::cpu
