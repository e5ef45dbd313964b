// SPDX-License-Identifier: Apache-2.0
// Every function of common/ptx.cuh, lane by lane on the CPU. What each does is described there;
// what the hardware would answer with an error or with rubbish ends the run with a text.
#pragma once

#include "cuda.h"

namespace fastproto::cuda {

// ---------------------------------------------------------------- threads

inline int thread_index() { return emulator::self().thread; }
inline int thread_index_again() { return thread_index(); }
inline int block_index() { return emulator::self().block->index; }
inline int grid_size() { return emulator::self().machine->grid; }
inline int lane_index() { return emulator::self().lane; }
inline int warp_index() { return emulator::self().thread / emulator::kWarpThreads; }

inline uint8_t* shared_memory() { return emulator::self().block->shared; }

inline void sync_block() {
  if (!emulator::collect("sync_block", nullptr)) return;
  emulator::Block& block = *emulator::current->block;
  emulator::meet(block.meetings[0], block.alive_threads, true, "sync_block", 0);
}
inline void sync_warp() {
  if (emulator::collect("sync_warp", nullptr)) emulator::release();
}

namespace emulator {

inline void meet_some(const char* what, int id, int threads, bool waits) {
  int arguments[2] = {id, threads};
  if (!collect(what, arguments)) return;
  Block& block = *current->block;
  for (int i = 0; i < kWarpThreads; ++i) {
    const int* other = static_cast<const int*>(current->warp->arguments[i]);
    if (other[0] != id || other[1] != threads)
      fail("%s: lanes of a warp name different barriers or numbers of threads", what);
  }
  if (id < 1 || id >= kNamedBarriers) fail("%s: barrier %d; there are 1 to 15", what, id);
  if (threads <= 0 || threads % kWarpThreads != 0 || threads > block.threads)
    fail("%s(%d): %d threads of a block of %d; whole warps meet", what, id, threads, block.threads);
  Meeting& meeting = block.meetings[id];
  if (meeting.arrived > 0 && meeting.expected != threads)
    fail("%s(%d): %d threads here, %d before", what, id, threads, meeting.expected);
  meet(meeting, threads, waits, "sync_some", id);
}

}  // namespace emulator

inline void sync_some(int id, int threads) { emulator::meet_some("sync_some", id, threads, true); }
inline void arrive_some(int id, int threads) {
  emulator::meet_some("arrive_some", id, threads, false);
}

namespace emulator {

template <class T>
struct Exchange {
  T x;
  int lane;
  T result;
};
template <class T>
T exchange(const char* what, T x, int lane) {
  Exchange<T> mine{x, lane, x};
  if (collect(what, &mine)) {
    for (int i = 0; i < kWarpThreads; ++i) {
      auto& other = argument<Exchange<T>>(i);
      other.result = argument<Exchange<T>>(other.lane & (kWarpThreads - 1)).x;
    }
    release();
  }
  return mine.result;
}

}  // namespace emulator

inline float shuffle_xor(float x, int mask) {
  return emulator::exchange("shuffle_xor", x, emulator::self().lane ^ mask);
}
inline float shuffle(float x, int lane) { return emulator::exchange("shuffle", x, lane); }
inline int shuffle(int x, int lane) { return emulator::exchange("shuffle of int", x, lane); }
inline uint32_t ballot(bool x) {
  struct Vote {
    bool x;
    uint32_t result;
  } mine{x, 0};
  if (emulator::collect("ballot", &mine)) {
    uint32_t result = 0;
    for (int i = 0; i < emulator::kWarpThreads; ++i)
      result |= uint32_t(emulator::argument<Vote>(i).x) << i;
    for (int i = 0; i < emulator::kWarpThreads; ++i) emulator::argument<Vote>(i).result = result;
    emulator::release();
  }
  return mine.result;
}

// ---------------------------------------------------------------- numbers

inline float bits_to_float(uint32_t x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline uint32_t float_to_bits(float x) {
  uint32_t y;
  memcpy(&y, &x, 4);
  return y;
}
inline float infinity() { return bits_to_float(0x7f800000u); }
inline float not_a_number() { return bits_to_float(0x7fffffffu); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

namespace emulator {

// .ftz: subnormal numbers are zeros of the same sign.
inline float flush(float x) {
  const uint32_t bits = float_to_bits(x);
  return (bits & 0x7f800000u) == 0 ? bits_to_float(bits & 0x80000000u) : x;
}

}  // namespace emulator

inline float exp2_fast(float x) { return emulator::flush(std::exp2(emulator::flush(x))); }
inline float log2_fast(float x) { return emulator::flush(std::log2(emulator::flush(x))); }

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
  return emulator::shared_offset("shared_address", p, 0, 1);
}

// The bytes move when a wait completes their group; until then the place is poisoned.
inline void copy_async_16(void* to, const void* from, int valid) {
  emulator::shared_offset("copy_async_16", to, 16, 16);
  if (uintptr_t(from) % 16 != 0)
    emulator::fail("copy_async_16: global address %p is not a multiple of 16", from);
  if (valid < 0 || valid > 16) emulator::fail("copy_async_16: %d valid bytes", valid);
  memset(to, emulator::kPoison, 16);
  emulator::current->copies.add(
      {static_cast<uint8_t*>(to), static_cast<const uint8_t*>(from), valid});
}
inline void copy_async_commit() { emulator::self().copies.commit(); }
template <int Pending>
void copy_async_wait() {
  emulator::interrupt();
  emulator::self().copies.wait(Pending, [](const emulator::CopyAsync& copy) {
    if (copy.valid > 0) memcpy(copy.to, copy.from, size_t(copy.valid));
    memset(copy.to + copy.valid, 0, size_t(16 - copy.valid));
  });
}

struct alignas(16) Vector16 {
  uint32_t x[4];
};
inline Vector16 load_global_16(const void* from) {
  if (uintptr_t(from) % 16 != 0)
    emulator::fail("load_global_16: address %p is not a multiple of 16", from);
  Vector16 v;
  memcpy(v.x, from, 16);
  return v;
}

namespace emulator {

template <class Registers>  // uint32_t, const or not
struct MatrixArguments {
  Registers* r;
  const void* row;
};
// Element (row, column) of a transposed or plain 8x8 matrix lies in register half column % 2 of
// lane 4 row + column / 2 (PTX ISA "Warp-level matrix load instruction: ldmatrix").
template <bool Transpose, class Arguments, class Move>
void move_matrices(const Move& move) {
  for (int m = 0; m < 4; ++m) {
    for (int row = 0; row < 8; ++row) {
      uint16_t* memory =
          static_cast<uint16_t*>(const_cast<void*>(argument<Arguments>(8 * m + row).row));
      for (int column = 0; column < 8; ++column) {
        const int major = Transpose ? column : row, minor = Transpose ? row : column;
        auto* reg = argument<Arguments>(4 * major + minor / 2).r + m;
        move(memory + column, reg, 16 * (minor % 2));
      }
    }
  }
}

}  // namespace emulator

template <bool Transpose>
void load_matrix(uint32_t (&r)[4], const void* row) {
  using Arguments = emulator::MatrixArguments<uint32_t>;
  emulator::shared_offset("load_matrix", row, 16, 16);
  Arguments mine{r, row};
  if (!emulator::collect(Transpose ? "load_matrix<true>" : "load_matrix<false>", &mine)) return;
  emulator::move_matrices<Transpose, Arguments>(
      [](const uint16_t* memory, uint32_t* reg, int shift) {
        *reg = (*reg & (0xffff0000u >> shift)) | uint32_t(*memory) << shift;
      });
  emulator::release();
}
template <bool Transpose>
void store_matrix(void* row, const uint32_t (&r)[4]) {
  using Arguments = emulator::MatrixArguments<const uint32_t>;
  emulator::shared_offset("store_matrix", row, 16, 16);
  Arguments mine{r, row};
  if (!emulator::collect(Transpose ? "store_matrix<true>" : "store_matrix<false>", &mine)) return;
  emulator::move_matrices<Transpose, Arguments>(
      [](uint16_t* memory, const uint32_t* reg, int shift) { *memory = uint16_t(*reg >> shift); });
  emulator::Block& block = *emulator::current->block;
  for (int i = 0; block.proxies.started() && i < emulator::kWarpThreads; ++i) {
    const void* to = emulator::argument<Arguments>(i).row;
    const std::ptrdiff_t offset = static_cast<const uint8_t*>(to) - block.shared;
    block.proxies.written(uint32_t(offset), 16, emulator::current->warp->lanes[i].thread);
  }
  emulator::release();
}

// ---------------------------------------------------------------- mma.sync

namespace emulator {

// Two numbers in a register that every processor has.
typedef double Pair __attribute__((vector_size(16)));

// c += a b: exact products, summed in double and rounded once. c lies in the registers of the
// lanes: of each eight columns the lane 4 (row % 8) + i has 2 i and 2 i + 1, of row % 8 and then of
// row % 8 + 8.
template <int Columns, int Depth>
void multiply(const double (&a)[16][Depth], const double (&b)[Depth][Columns],
              float* const (&c)[kWarpThreads]) {
  for (int j = 0; j < Columns; j += 8) {
    Pair bs[Depth][4];
    for (int k = 0; k < Depth; ++k) memcpy(bs[k], &b[k][j], sizeof bs[k]);
    for (int row = 0; row < 16; ++row) {
      float* const* lanes = c + row % 8 * 4;
      const int at = j / 2 + row / 8 * 2;
      const auto load = [lanes, at](int i) {
        return Pair{double(lanes[i][at]), double(lanes[i][at + 1])};
      };
      Pair s0 = load(0), s1 = load(1), s2 = load(2), s3 = load(3);
      for (int k = 0; k < Depth; ++k) {
        const Pair x = {a[row][k], a[row][k]};
        s0 += x * bs[k][0];
        s1 += x * bs[k][1];
        s2 += x * bs[k][2];
        s3 += x * bs[k][3];
      }
      const Pair sums[4] = {s0, s1, s2, s3};
      for (int i = 0; i < 4; ++i) {
        lanes[i][at] = float(sums[i][0]);
        lanes[i][at + 1] = float(sums[i][1]);
      }
    }
  }
}

struct MmaArguments {
  float* c;
  const void* a;
  const void* b;
};
template <int Depth>
void multiply_arguments(const double (&a)[16][Depth], const double (&b)[Depth][8]) {
  float* c[kWarpThreads];
  for (int i = 0; i < kWarpThreads; ++i) c[i] = argument<MmaArguments>(i).c;
  multiply(a, b, c);
}
inline void unpack_to(double* to, uint32_t x, bf16) {
  float low, high;
  unpack<bf16>(x, &low, &high);
  to[0] = double(low);
  to[1] = double(high);
}
inline void unpack_to(double* to, uint32_t x, half) {
  float low, high;
  unpack<half>(x, &low, &high);
  to[0] = double(low);
  to[1] = double(high);
}
template <class T>
void mma_16816(const char* what, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  MmaArguments mine{c, a, b};
  if (!collect(what, &mine)) return;
  double as[16][16], bs[16][8];
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    const int g = lane / 4, i = lane % 4;
    const auto& arguments = argument<MmaArguments>(lane);
    const uint32_t* x = static_cast<const uint32_t*>(arguments.a);
    unpack_to(&as[g][2 * i], x[0], T{});
    unpack_to(&as[g + 8][2 * i], x[1], T{});
    unpack_to(&as[g][2 * i + 8], x[2], T{});
    unpack_to(&as[g + 8][2 * i + 8], x[3], T{});
    for (int half_k = 0; half_k < 2; ++half_k) {
      double pair[2];
      unpack_to(pair, static_cast<const uint32_t*>(arguments.b)[half_k], T{});
      bs[2 * i + 8 * half_k][g] = pair[0];
      bs[2 * i + 8 * half_k + 1][g] = pair[1];
    }
  }
  multiply_arguments(as, bs);
  release();
}

// What the unit sees of a float: the low 13 bits are not read.
inline double truncate_tf32(float x) { return double(bits_to_float(float_to_bits(x) & ~0x1fffu)); }

}  // namespace emulator

template <class T>
void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
inline void mma_16816<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::mma_16816<bf16>("mma_16816<bf16>", c, a, b0, b1);
}
template <>
inline void mma_16816<half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::mma_16816<half>("mma_16816<half>", c, a, b0, b1);
}
inline void mma_1688_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  using emulator::MmaArguments, emulator::truncate_tf32;
  const float b[2] = {b0, b1};
  MmaArguments mine{c, a, b};
  if (!emulator::collect("mma_1688_tf32", &mine)) return;
  double as[16][8], bs[8][8];
  for (int lane = 0; lane < emulator::kWarpThreads; ++lane) {
    const int g = lane / 4, i = lane % 4;
    const auto& arguments = emulator::argument<MmaArguments>(lane);
    const float* x = static_cast<const float*>(arguments.a);
    const float* y = static_cast<const float*>(arguments.b);
    as[g][i] = truncate_tf32(x[0]);
    as[g + 8][i] = truncate_tf32(x[1]);
    as[g][i + 4] = truncate_tf32(x[2]);
    as[g + 8][i + 4] = truncate_tf32(x[3]);
    bs[i][g] = truncate_tf32(y[0]);
    bs[i + 4][g] = truncate_tf32(y[1]);
  }
  emulator::multiply_arguments(as, bs);
  emulator::release();
}

}  // namespace fastproto::cuda

#include "hopper.h"
