// SPDX-License-Identifier: Apache-2.0
// Vectors of one register, through the compiler's vector extension: the same source is compiled
// once per instruction set. Everything compiled this way is in an unnamed namespace, static or
// always inlined: a function compiled for AVX-512 must never be the copy the linker keeps for a CPU
// without it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__F16C__)
#include <immintrin.h>
#endif

// For functions that hand on vectors in arrays: kept in registers only where inlined.
#define FASTPROTO_INLINE __attribute__((always_inline)) inline

namespace fastproto::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <class Acc>
struct VecTypes;
template <>
struct VecTypes<float> {
  typedef float Vec __attribute__((vector_size(kVecBytes)));
  typedef int32_t Int __attribute__((vector_size(kVecBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kVecBytes)));
  typedef uint16_t HalfBits __attribute__((vector_size(kVecBytes / 2)));  // as many lanes as Vec
};
template <>
struct VecTypes<double> {
  typedef double Vec __attribute__((vector_size(kVecBytes)));
  typedef int64_t Int __attribute__((vector_size(kVecBytes)));
};
template <class Acc>
using Vec = typename VecTypes<Acc>::Vec;
template <class Acc>
constexpr int kLanes = kVecBytes / int(sizeof(Acc));

template <class Acc>
inline Vec<Acc> load(const Acc* p) {
  Vec<Acc> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class Acc>
inline void store(Acc* p, Vec<Acc> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
template <class Acc>
inline Vec<Acc> splat(Acc x) {
  return x - Vec<Acc>{};
}
template <class V>
inline V multiply_add(V sum, V a, V b) {
  return sum + a * b;
}

#if defined(__AVX512BF16__)
// Two bfloat16 numbers. Their products with another two are added to one float32.
struct Pair {
  uint16_t bits[2];
};
inline __m512bh load(const Pair* p) {
  __m512bh v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline __m512bh splat(Pair x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return (__m512bh)_mm512_set1_epi32(bits);
}
inline Vec<float> multiply_add(Vec<float> sum, __m512bh a, __m512bh b) {
  return Vec<float>(_mm512_dpbf16_ps(sum, a, b));
}
#endif

// exp(x) for x <= 0, relative error below 2e-7; results under the smallest normal number are 0.
// NaN stays NaN: the comparisons below are false for it.
FASTPROTO_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  using Int = VecTypes<float>::Int;
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
  constexpr float kSmallest = -87.0f;
  const Int tiny = x < kSmallest;
  Vec<float> clamped = tiny ? splat(kSmallest) : x;
  // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
  constexpr float kRound = 12582912.0f;
  const Vec<float> n = (clamped * kLog2E + kRound) - kRound;
  const Vec<float> r = (clamped - n * kLn2Hi) - n * kLn2Lo;
  Vec<float> y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const Int exponent = (__builtin_convertvector(n, Int) + 127) << 23;
  Vec<float> scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  y = y * scale;
  return tiny ? Vec<float>{} : y;
}
// float64 exists for gradcheck and for measuring the other types: accuracy only.
FASTPROTO_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

// Storage types. Arithmetic is in Acc: float, or double for float64.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct Storage {
  using Acc = T;
};
template <>
struct Storage<BFloat16> {
  using Acc = float;
};
template <>
struct Storage<Float16> {
  using Acc = float;
};

inline float bits_to_float(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
}

inline float to_acc(float x) { return x; }
inline double to_acc(double x) { return x; }
inline float to_acc(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float to_acc(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Multiplying by 2^112 moves the exponent's bias; it makes subnormals right too.
  const float scaled = bits_to_float(magnitude << 13) * bits_to_float(0x77800000u);
  const uint32_t bits =
      magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : float_to_bits(scaled);
  return bits_to_float(sign | bits);
#endif
}

// Rounding to nearest even, as PyTorch does.
inline void from_acc(float x, float* out) { *out = x; }
inline void from_acc(double x, double* out) { *out = x; }
inline void from_acc(float x, BFloat16* out) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = uint16_t(x != x ? 0x7fc0u : rounded);
}
inline void from_acc(float x, Float16* out) {
#if defined(__F16C__)
  out->bits = uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal in float16: let the adder round it
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = uint16_t(sign | half);
#endif
}

template <class T>
using AccOf = typename Storage<T>::Acc;

// One vector of Acc from as many values of storage type, and back.
FASTPROTO_INLINE Vec<float> load_as(const float* p) { return load(p); }
FASTPROTO_INLINE Vec<double> load_as(const double* p) { return load(p); }
FASTPROTO_INLINE void store_as(Vec<float> v, float* p) { store(p, v); }
FASTPROTO_INLINE void store_as(Vec<double> v, double* p) { store(p, v); }
FASTPROTO_INLINE Vec<float> load_as(const BFloat16* p) {
  VecTypes<float>::HalfBits half;
  __builtin_memcpy(&half, p, sizeof(half));
  const auto bits = __builtin_convertvector(half, VecTypes<float>::Bits) << 16;
  Vec<float> v;
  __builtin_memcpy(&v, &bits, sizeof(v));
  return v;
}
// The upper halves of the lanes of v, rounded to nearest even.
FASTPROTO_INLINE VecTypes<float>::Bits bfloat16_bits(Vec<float> v) {
  VecTypes<float>::Bits bits;
  __builtin_memcpy(&bits, &v, sizeof(v));
  bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return v != v ? VecTypes<float>::Bits{} + 0x7fc0u : bits;
}
FASTPROTO_INLINE void store_as(Vec<float> v, BFloat16* p) {
  const auto half = __builtin_convertvector(bfloat16_bits(v), VecTypes<float>::HalfBits);
  __builtin_memcpy(p, &half, sizeof(half));
}
FASTPROTO_INLINE Vec<float> load_as(const Float16* p) {
#if defined(__AVX512F__)
  // The maskz forms: GCC 12 warns about the others.
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_acc(p[i]);
  return v;
#endif
}
FASTPROTO_INLINE void store_as(Vec<float> v, Float16* p) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) from_acc(v[i], p + i);
#endif
}

// The first `count` lanes alone; the others are zero.
template <class T>
FASTPROTO_INLINE Vec<AccOf<T>> load_as(const T* p, int64_t count) {
  if (count >= kLanes<AccOf<T>>) return load_as(p);
  Vec<AccOf<T>> v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = to_acc(p[i]);
  return v;
}
template <class T>
FASTPROTO_INLINE void store_as(Vec<AccOf<T>> v, T* p, int64_t count) {
  if (count >= kLanes<AccOf<T>>) return store_as(v, p);
  for (int64_t i = 0; i < count; ++i) from_acc(v[i], p + i);
}

template <class Acc>
inline Acc sum_lanes(Vec<Acc> v) {
  Acc sum = 0;
  for (int i = 0; i < kLanes<Acc>; ++i) sum += v[i];
  return sum;
}

// rows[i][j] <-> rows[j][i], in log2(lanes) rounds that each swap off-diagonal blocks.
template <int Step, class V, std::size_t... J>
FASTPROTO_INLINE void swap_blocks(V& a, V& b, std::index_sequence<J...>) {
  constexpr int L = sizeof...(J);
  const V low = __builtin_shufflevector(a, b, ((J & Step) ? L + J - Step : J)...);
  b = __builtin_shufflevector(a, b, ((J & Step) ? L + J : J + Step)...);
  a = low;
}
template <int Step, int L, class V>
FASTPROTO_INLINE void transpose_from(V* rows) {
  if constexpr (Step < L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i)
      if ((i & Step) == 0)
        swap_blocks<Step>(rows[i], rows[i + Step], std::make_index_sequence<std::size_t(L)>());
    transpose_from<2 * Step, L>(rows);
  }
}
template <class V>
FASTPROTO_INLINE void transpose(V* rows) {
  transpose_from<1, int(sizeof(V) / sizeof(rows[0][0]))>(rows);
}

}  // namespace
}  // namespace fastproto::cpu
