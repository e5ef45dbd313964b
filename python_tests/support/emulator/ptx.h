// SPDX-License-Identifier: Apache-2.0
// Every function of csrc/cuda/common/ptx.cuh, lane by lane on the CPU. What each does is described
// there; what the hardware would answer with an error or with rubbish ends the run with a text.
#pragma once

#include <bit>
#include <cmath>

#include "machine.h"

namespace fastproto::cuda::emulator {

// ---------------------------------------------------------------- threads

inline int thread_index() { return self().thread; }
inline int thread_index_again() { return thread_index(); }
inline int block_index() { return self().block->index; }
inline int grid_size() { return self().machine->grid; }
inline int lane_index() { return self().lane; }
inline int warp_index() { return self().thread / kWarpThreads; }

inline uint8_t* shared_memory() { return self().block->shared; }

inline void sync_block() {
  sync_all("sync_block", self().block->meetings[0], self().block->alive_threads);
}
inline void sync_warp() {
  together("sync_warp", nullptr, [] {});
}

inline void meet_some(const char* what, int id, int threads, bool waits) {
  int arguments[2] = {id, threads};
  if (!collect(what, arguments)) return;
  Block& block = *current->block;
  for (int i = 0; i < kWarpThreads; ++i)
    if (memcmp(&argument<int[2]>(i), arguments, sizeof arguments) != 0)
      fail(what, ": lanes of a warp name different barriers or numbers of threads");
  if (id < 1 || id >= kNamedBarriers) fail(what, ": barrier ", id, "; there are 1 to 15");
  if (threads <= 0 || threads % kWarpThreads != 0 || threads > block.threads)
    fail(what, "(", id, "): ", threads, " threads of a block of ", block.threads,
         "; whole warps meet");
  Meeting& meeting = block.meetings[id];
  if (meeting.arrived > 0 && meeting.expected != threads)
    fail(what, "(", id, "): ", threads, " threads here, ", meeting.expected, " before");
  meet(meeting, threads, waits, "sync_some", id);
}

inline void sync_some(int id, int threads) { meet_some("sync_some", id, threads, true); }
inline void arrive_some(int id, int threads) { meet_some("arrive_some", id, threads, false); }

// ---------------------------------------------------------------- numbers

inline float bits_to_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t float_to_bits(float x) { return std::bit_cast<uint32_t>(x); }
inline float shuffle_xor(float x, int mask) {
  const int from = (self().lane ^ mask) & 31;
  return bits_to_float(gather("shuffle_xor", float_to_bits(x))[from]);
}
inline float shuffle(float x, int lane) {
  return bits_to_float(gather("shuffle", float_to_bits(x))[lane & 31]);
}
inline int shuffle(int x, int lane) {
  return int(gather("shuffle of int", uint32_t(x))[lane & 31]);
}
inline uint32_t ballot(bool x) {
  const uint32_t* votes = gather("ballot", x);
  uint32_t result = 0;
  for (int i = 0; i < kWarpThreads; ++i) result |= votes[i] << i;
  return result;
}

inline float infinity() { return bits_to_float(0x7f800000u); }
inline float not_a_number() { return bits_to_float(0x7fffffffu); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

// .ftz: subnormal numbers are zeros of the same sign.
inline float flush(float x) {
  const uint32_t bits = float_to_bits(x);
  return (bits & 0x7f800000u) == 0 ? bits_to_float(bits & 0x80000000u) : x;
}

inline float exp2_fast(float x) { return flush(std::exp2(flush(x))); }
inline float log2_fast(float x) { return flush(std::log2(flush(x))); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float to_float(half x) {
  // The bits in a float's places are 2^-112 of the number, subnormal ones too; the exponent of
  // infinities and NaN is then completed.
  const float y = bits_to_float(uint32_t(x.bits & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0;
  return bits_to_float(float_to_bits(y) | special | uint32_t(x.bits & 0x8000u) << 16);
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  if (x != x) return {0x7fff};
  const uint32_t bits = float_to_bits(x);
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
template <>
inline half from_float<half>(float x) {
  if (x != x) return {0x7fff};
  const uint32_t sign = float_to_bits(x) >> 16 & 0x8000u, bits = float_to_bits(x) & 0x7fffffffu;
  uint32_t y;
  if (bits >= 0x477ff000u)  // 65520 and above
    y = 0x7c00u;
  else if (bits >= 0x38800000u)  // normal numbers
    y = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1)) >> 13;
  else  // 0.5 has the last bit of the significand where float16's subnormals have it
    y = float_to_bits(bits_to_float(bits) + 0.5f) - 0x3f000000u;
  return {uint16_t(sign | y)};
}
template <class T>
uint32_t pack(float low, float high) {
  return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
}
template <class T>
void unpack(uint32_t x, float* low, float* high) {
  *low = to_float(T{uint16_t(x & 0xffffu)});
  *high = to_float(T{uint16_t(x >> 16)});
}
inline float to_tf32(float x) {
  if (x != x) return not_a_number();
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return x;
  return bits_to_float((bits + 0x1000u) & ~0x1fffu);
}

// ---------------------------------------------------------------- memory

inline uint32_t shared_address(const void* p) {
  // One past the end is the address of an empty piece.
  return shared_offset("shared_address", p, 0, 1);
}

// The bytes move when a wait completes their group; until then the place is poisoned.
inline void copy_async_16(void* to, const void* from, int valid) {
  shared_offset("copy_async_16", to, 16, 16);
  if (uintptr_t(from) % 16 != 0)
    fail("copy_async_16: global address ", from, " is not a multiple of 16");
  if (valid < 0 || valid > 16) fail("copy_async_16: ", valid, " valid bytes");
  memset(to, kPoison, 16);
  current->copies.add([to, from, valid] {
    memset(to, 0, 16);
    if (valid > 0) memcpy(to, from, size_t(valid));
  });
}
inline void copy_async_commit() { self().copies.commit(); }
template <int Pending>
void copy_async_wait() {
  interrupt();
  self().copies.wait(Pending);
}

inline Vector16 load_global_16(const void* from) {
  if (uintptr_t(from) % 16 != 0) fail("load_global_16: address ", from, " is not a multiple of 16");
  Vector16 v;
  memcpy(v.x, from, 16);
  return v;
}

struct MatrixArguments {
  uint32_t* r;
  uint8_t* row;
};
// Element (row, column) of a transposed or plain 8x8 matrix lies in register half column % 2 of
// lane 4 row + column / 2 (PTX ISA "Warp-level matrix load instruction: ldmatrix"). Calls
// move(the lane that names the row, memory, register half) for each.
template <class Move>
void move_matrices(const char* what, bool transpose, MatrixArguments mine, const Move& move) {
  together(what, &mine, [&] {
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const int major = transpose ? i : lane % 8, minor = transpose ? lane % 8 : i;
        uint32_t* reg = argument<MatrixArguments>(4 * major + minor / 2).r + lane / 8;
        move(lane, argument<MatrixArguments>(lane).row + 2 * i,
             reinterpret_cast<uint8_t*>(reg) + 2 * (minor % 2));
      }
    }
  });
}

template <bool Transpose>
void load_matrix(uint32_t (&r)[4], const void* row) {
  shared_offset("load_matrix", row, 16, 16);
  auto* from = static_cast<uint8_t*>(const_cast<void*>(row));
  move_matrices(Transpose ? "load_matrix<true>" : "load_matrix<false>", Transpose, {r, from},
                [](int, const uint8_t* memory, uint8_t* reg) { memcpy(reg, memory, 2); });
}
template <bool Transpose>
void store_matrix(void* row, const uint32_t (&r)[4]) {
  shared_offset("store_matrix", row, 16, 16);
  move_matrices(Transpose ? "store_matrix<true>" : "store_matrix<false>", Transpose,
                {const_cast<uint32_t*>(r), static_cast<uint8_t*>(row)},
                [](int lane, uint8_t* memory, const uint8_t* reg) {
                  memcpy(memory, reg, 2);
                  Block& block = *current->block;

                  block.proxies.written(uint32_t(memory - block.shared), 2,
                                        current->warp->lanes[lane].thread);
                });
}

// ---------------------------------------------------------------- mma.sync

// Two numbers in a register that every processor has.
typedef double Pair __attribute__((vector_size(16)));

// c += a b, [16][depth] x [depth][columns]: exact products, summed in double and rounded once. c
// lies in the registers of the lanes: of each eight columns the lane 4 (row % 8) + i has 2 i and
// 2 i + 1, of row % 8 and then of row % 8 + 8.
inline void multiply(const double* a, const double* b, int depth, int columns, float* const* c) {
  for (int j = 0; j < columns; j += 8) {
    for (int row = 0; row < 16; ++row) {
      float* const* lanes = c + row % 8 * 4;
      const int at = j / 2 + row / 8 * 2;
      Pair sums[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sums[i] = Pair{double(lanes[i][at]), double(lanes[i][at + 1])};
      for (int k = 0; k < depth; ++k) {
        Pair bs[4];
        memcpy(bs, b + k * columns + j, sizeof bs);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[i] += a[row * depth + k] * bs[i];
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        lanes[i][at] = float(sums[i][0]);
        lanes[i][at + 1] = float(sums[i][1]);
      }
    }
  }
}

struct MmaArguments {
  float* c;
  const uint32_t *a, *b;
};
// Fragments (common/ptx.cuh) of registers of `kParts` numbers, which number(register, part) reads.
template <int kParts, class Number>
void mma(const char* what, float* c, const uint32_t* a, const uint32_t* b, const Number& number) {
  MmaArguments mine{c, a, b};
  together(what, &mine, [&number] {
    constexpr int kDepth = 8 * kParts;
    double as[16][kDepth], bs[kDepth][8];
    for (int k = 0; k < kDepth; ++k) {
      const int i = k / kParts % 4, high = k / (4 * kParts), part = k % kParts;
      for (int row = 0; row < 16; ++row)
        as[row][k] = number(argument<MmaArguments>(row % 8 * 4 + i).a[row / 8 + 2 * high], part);
      for (int column = 0; column < 8; ++column)
        bs[k][column] = number(argument<MmaArguments>(column * 4 + i).b[high], part);
    }
    float* cs[kWarpThreads];
    for (int i = 0; i < kWarpThreads; ++i) cs[i] = argument<MmaArguments>(i).c;
    multiply(as[0], bs[0], kDepth, 8, cs);
  });
}

template <class T>
void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  mma<2>(std::is_same_v<T, half> ? "mma_16816<half>" : "mma_16816<bf16>", c, a, b,
         [](uint32_t x, int part) { return to_float(T{uint16_t(x >> 16 * part)}); });
}
inline void mma_1688_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  uint32_t as[4];
  memcpy(as, a, sizeof as);
  const uint32_t b[2] = {float_to_bits(b0), float_to_bits(b1)};
  // The unit does not read the low 13 bits of a float.
  mma<1>("mma_1688_tf32", c, as, b, [](uint32_t x, int) { return bits_to_float(x & ~0x1fffu); });
}

}  // namespace fastproto::cuda::emulator
