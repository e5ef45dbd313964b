// SPDX-License-Identifier: Apache-2.0
// Scalars of the op: bags, exponents, norms. Symbols as in docs/math.md; the same rules as in
// fastproto/op/triton/tiles.py.
#pragma once

#include "../params.h"
#include "platform.h"

namespace fastproto::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Rows [begin, begin + count) of `protos`. Offsets that make no sense give an empty bag that is not
// valid; its pixels become NaN.
struct Bag {
  int begin;
  int count;
  bool valid;
};
FP_DEVICE Bag load_bag(const int32_t* offsets, int bag, int total) {
  const int begin = offsets[bag], end = offsets[bag + 1];
  const bool valid = begin >= 0 && begin <= end && end <= total && (bag > 0 || begin == 0);
  return valid ? Bag{begin, end - begin, true} : Bag{0, 0, false};
}

// log2(e) / t; 0 for a bag of one, whose weight is 1 exactly; NaN for a t that is not above 0,
// which cannot be checked on the host where t is a tensor.
FP_DEVICE float exponent_scale(const Problem& p, int count) {
  float t = p.temperature;
  if (p.temperature_tensor != nullptr)
    t = p.temperature_is_double ? float(*static_cast<const double*>(p.temperature_tensor))
                                : *static_cast<const float*>(p.temperature_tensor);
  const float scale = t > 0 ? kLog2E / t : not_a_number();
  return count == 1 ? scale * 0 : scale;
}

// 1 / max(norm, eps), and 0 for a constant vector, whose cosines are 0. NaN stays NaN.
FP_DEVICE float reciprocal_norm(float sum_of_squares, float eps) {
  if (sum_of_squares <= 0) return 0;
  const float norm = sqrtf(sum_of_squares);
  return norm <= eps ? 1 / eps : 1 / norm;
}

// Sums over a vector x of x - x_0 and of its square: relative to the first element, so that a
// constant vector gives exact zeros and a large mean costs few digits.
struct RowSums {
  float total = 0;
  float squares = 0;
  FP_DEVICE void add(float shifted) {
    total += shifted;
    squares = multiply_add(shifted, shifted, squares);
  }
};
struct RowStatistics {
  float mean;
  float rnorm;
};
FP_DEVICE RowStatistics row_statistics(float first, RowSums sums, int dim, float eps) {
  const float mean = sums.total / float(dim);
  return {first + mean, reciprocal_norm(sums.squares - sums.total * mean, eps)};
}

// The reciprocal norm that a gradient is multiplied with: 1/eps for a constant vector.
FP_DEVICE float of_constant(float rnorm, float eps) { return rnorm == 0 ? 1 / eps : rnorm; }

// rnorm^2, or 0 where the norm was clamped and so is no function of the vector.
FP_DEVICE float projection_factor(float rnorm, float eps) {
  return rnorm == 0 || rnorm == 1 / eps ? 0 : rnorm * rnorm;
}

// Over the four lanes that share a row of a product's fragment.
FP_DEVICE float sum_of_quad(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
FP_DEVICE float max_of_quad(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

// A power of two near the norm: scales to the range of float16 and costs no digit.
FP_DEVICE float power_of_two_near(float rnorm) { return exp2_fast(ceilf(-log2_fast(rnorm))); }

}  // namespace fastproto::cuda
