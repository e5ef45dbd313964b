// SPDX-License-Identifier: Apache-2.0
// The instructions the kernels are written in, one function each (PTX ISA 8.x; the section is named
// where the operands' layout matters). Kernels include platform.h.
//
// Fragments of mma (PTX ISA "Matrix fragments for mma.m16n8k16 / .m16n8k8"), g = lane / 4,
// i = lane % 4:
//   A 16-bit [16][16]  a[0] = (g, 2i..2i+1)  a[1] = (g+8, ..)  a[2] = (g, 2i+8..)  a[3] = (g+8,
//   2i+8..) B 16-bit [16][8]   b[0] = (2i..2i+1, g)  b[1] = (2i+8.., g) A tf32   [16][8]   a[0] =
//   (g, i)  a[1] = (g+8, i)  a[2] = (g, i+4)  a[3] = (g+8, i+4) B tf32   [8][8]    b[0] = (i, g)
//   b[1] = (i+4, g) C float  [16][8]   c[0..1] = (g, 2i..2i+1)  c[2..3] = (g+8, 2i..2i+1)
#pragma once

#include <type_traits>

#include "platform.h"

namespace fastproto::cuda {

// ---------------------------------------------------------------- threads

FP_DEVICE int thread_index() { return int(threadIdx.x); }
// The same, but nothing that was computed from thread_index() is kept in registers for it.
FP_DEVICE int thread_index_again() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
FP_DEVICE int block_index() { return int(blockIdx.x); }
FP_DEVICE int grid_size() { return int(gridDim.x); }
FP_DEVICE int lane_index() { return int(threadIdx.x) & 31; }
// Uniform over the warp, and the compiler knows.
FP_DEVICE int warp_index() { return __shfl_sync(~0u, int(threadIdx.x) >> 5, 0); }

// The block's dynamic shared memory, 1024-byte aligned; the only shared memory there is.
FP_DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return memory;
}

// All threads of the block.
FP_DEVICE void sync_block() { __syncthreads(); }
FP_DEVICE void sync_warp() { __syncwarp(); }
// `threads` threads of the block (whole warps) meet at barrier `id` (1..15; 0 is sync_block's).
FP_DEVICE void sync_some(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// The same in halves: those who only announce, and those who wait.
FP_DEVICE void arrive_some(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

FP_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
FP_DEVICE float shuffle(float x, int lane) { return __shfl_sync(~0u, x, lane); }
FP_DEVICE int shuffle(int x, int lane) { return __shfl_sync(~0u, x, lane); }
FP_DEVICE uint32_t ballot(bool x) { return __ballot_sync(~0u, x); }

// ---------------------------------------------------------------- numbers

FP_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FP_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FP_DEVICE float bits_to_float(uint32_t x) { return __uint_as_float(x); }
FP_DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }
FP_DEVICE float infinity() { return __uint_as_float(0x7f800000u); }
FP_DEVICE float not_a_number() { return __uint_as_float(0x7fffffffu); }
FP_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

FP_DEVICE float to_float(float x) { return x; }
FP_DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
FP_DEVICE float to_float(half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
// Round to nearest even.
template <class T>
FP_DEVICE T from_float(float x);
template <>
FP_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
FP_DEVICE bf16 from_float<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
FP_DEVICE half from_float<half>(float x) {
  half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
// Two 16-bit floats in a register, `low` in the low half.
template <class T>
FP_DEVICE uint32_t pack(float low, float high) {
  uint32_t y;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <class T>
FP_DEVICE void unpack(uint32_t x, float* low, float* high) {
  *low = to_float(T{uint16_t(x & 0xffffu)});
  *high = to_float(T{uint16_t(x >> 16)});
}
// The nearest tf32 number, ties away from zero (cvt.rna), as a float.
FP_DEVICE float to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return __uint_as_float(y);
}

// ---------------------------------------------------------------- memory

// The address the instructions below take.
FP_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16 bytes, global to shared, asynchronously; zeros instead of the bytes past `valid` (0..16).
// Both addresses are multiples of 16; `from` is not touched where valid is 0.
FP_DEVICE void copy_async_16(void* to, const void* from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid)
               : "memory");
}
FP_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `Pending` of this thread's groups are under way.
template <int Pending>
FP_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// 16 aligned bytes of global memory; not read again, so not kept in the L1 cache.
FP_DEVICE Vector16 load_global_16(const void* from) {
  Vector16 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3])
               : "l"(from));
  return v;
}

// Four 8x8 matrices of 16-bit numbers; `row` is this lane's: lane l names row l % 8 of matrix l /
// 8, 16 aligned bytes. r[m] is the fragment of matrix m: (row g, columns 2i..2i+1), with Transpose
// (row 2i..2i+1, column g).
template <bool Transpose>
FP_DEVICE void load_matrix(uint32_t (&r)[4], const void* row) {
#define FP_LOAD_MATRIX(TRANS)                                                              \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" TRANS ".shared.b16 {%0, %1, %2, %3}, [%4];" \
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                            \
               : "r"(shared_address(row))                                                  \
               : "memory")
  if constexpr (Transpose)
    FP_LOAD_MATRIX(".trans");
  else
    FP_LOAD_MATRIX("");
#undef FP_LOAD_MATRIX
}
// The reverse; sm_90.
template <bool Transpose>
FP_DEVICE void store_matrix(void* row, const uint32_t (&r)[4]) {
#define FP_STORE_MATRIX(TRANS)                                                   \
  asm volatile("stmatrix.sync.aligned.m8n8.x4" TRANS                             \
               ".shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), \
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])                        \
               : "memory")
  if constexpr (Transpose)
    FP_STORE_MATRIX(".trans");
  else
    FP_STORE_MATRIX("");
#undef FP_STORE_MATRIX
}

// ---------------------------------------------------------------- mma.sync

// c += a b, [16][16] x [16][8], T = bf16 or half.
template <class T>
FP_DEVICE void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define FP_MMA(TYPE)                                                             \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE            \
               ".f32 "                                                           \
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, bf16>)
    FP_MMA("bf16");
  else
    FP_MMA("f16");
#undef FP_MMA
}
// c += a b, [16][8] x [8][8]; the operands are tf32 numbers held as floats.
FP_DEVICE void mma_1688_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(float_to_bits(a[0])), "r"(float_to_bits(a[1])), "r"(float_to_bits(a[2])),
        "r"(float_to_bits(a[3])), "r"(float_to_bits(b0)), "r"(float_to_bits(b1)));
}

}  // namespace fastproto::cuda
