// SPDX-License-Identifier: Apache-2.0
// Instructions of sm_90a alone: clusters, mbarriers, TMA, warpgroup matrix products (WGMMA). As
// ptx.cuh. An mbarrier's phase ends when `count` arrivals and the announced bytes have come.
#pragma once

#include "ptx.cuh"

namespace fastproto::cuda {

// ---------------------------------------------------------------- clusters

FP_DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
// All threads of all blocks of the cluster; what they wrote before is seen after.
FP_DEVICE void sync_cluster() {
  __syncwarp();
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
// The address, in the cluster's window, of what lies at `p` in the shared memory of block `rank`.
FP_DEVICE uint32_t peer_address(const void* p, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(p)), "r"(rank));
  return address;
}
FP_DEVICE void store_peer(uint32_t address, uint32_t x) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
FP_DEVICE void store_peer(uint32_t address, const Vector16& v) {
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x[0]),
               "r"(v.x[1]), "r"(v.x[2]), "r"(v.x[3])
               : "memory");
}
FP_DEVICE uint32_t load_peer(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
FP_DEVICE Vector16 load_peer_16(uint32_t address) {
  Vector16 v;
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3])
               : "r"(address)
               : "memory");
  return v;
}

// ---------------------------------------------------------------- numbers

// Products of two pairs of 16-bit floats, rounded to nearest even.
template <class T>
FP_DEVICE uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  uint32_t y;
  if constexpr (std::is_same_v<T, bf16>)
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

// ---------------------------------------------------------------- registers

// All warps of a warpgroup; N a multiple of 8.
template <int N>
FP_DEVICE void registers_more() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
FP_DEVICE void registers_fewer() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---------------------------------------------------------------- mbarriers

FP_DEVICE void barrier_init(Barrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}
// After the inits and before a block-wide (cluster-wide) barrier: TMA sees them.
FP_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
FP_DEVICE void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// An arrival that also announces `bytes` of bulk copies for this phase.
FP_DEVICE void barrier_arrive_expect(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Until the phase of this parity (0 for the first) is over.
FP_DEVICE void barrier_wait(Barrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---------------------------------------------------------------- TMA

FP_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// What ordinary instructions wrote to shared memory becomes visible to TMA and WGMMA.
FP_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The box at element `at` (innermost first) to shared memory; its bytes arrive at `barrier`. One
// thread issues it. Elements outside the tensor become zeros and are counted.
FP_DEVICE void tma_load(void* to, const TensorMap* map, Barrier* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}
FP_DEVICE void tma_load(void* to, const TensorMap* map, Barrier* barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
FP_DEVICE void tma_load(void* to, const TensorMap* map, Barrier* barrier, int x, int y, int z,
                        int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
FP_DEVICE void tma_load(void* to, const TensorMap* map, Barrier* barrier, int x, int y, int z,
                        int w, int v) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v)
      : "memory");
}
// A box back to global memory; elements outside the tensor are dropped. After fence_async by the
// threads that wrote it and a barrier; then tma_store_commit and, before the box is written again
// (or the block ends), tma_store_wait.
FP_DEVICE void tma_store(const TensorMap* map, const void* from, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(shared_address(from)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
FP_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most `Pending` groups of this thread still read shared memory.
template <int Pending>
FP_DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// ---------------------------------------------------------------- WGMMA

// A shared-memory matrix descriptor (PTX ISA "Asynchronous warpgroup level matrix shared memory
// layout") of a tile in 128-byte swizzle, as TMA writes it: 16-byte piece p of the 128-byte row r
// lies at p ^ (r % 8), rows in groups of 8 = 1024 bytes; tiles start at multiples of 1024 bytes.
//
//   K-major (K contiguous, 64 numbers a row): `stride` is from 8 rows of M (N) to the next 8, 1024
//   for a dense tile; `leading` is not used. K advances by adding bytes: 32 per 16 numbers, in the
//   128-byte row.
//   MN-major (M or N contiguous, 64 numbers a row; rows are K): `stride` is from 8 rows of K to the
//   next 8, 1024 for a dense tile; `leading` from 64 numbers of M (N) to the next 64. K advances by
//   2048 bytes per 16 rows.
FP_DEVICE uint64_t matrix_descriptor(const void* start, int leading, int stride) {
  return (uint64_t(shared_address(start) & 0x3ffff) >> 4) | (uint64_t(leading >> 4) << 16) |
         (uint64_t(stride >> 4) << 32) | (uint64_t(1) << 62);
}

// Before the first product, and whenever registers of operands were written since: all 128 threads.
FP_DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FP_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
FP_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// Keeps the compiler from moving registers of a product under way.
template <int Count>
FP_DEVICE void wgmma_hold(float (&c)[Count]) {
  FP_UNROLL
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// c[64][Columns] (+)= a[64][16] b[16][Columns]: `add` 0 or 1. Thread t of the warpgroup holds, with
// g = t / 4 % 8, i = t % 4, row 16 (t / 32) + g of columns 8 k + 2 i, + 1 in c[4 k], c[4 k + 1],
// and row + 8 in c[4 k + 2], c[4 k + 3]. T is bf16 or half. TransposeA (B): that operand is
// MN-major.
template <class T, int Columns, bool TransposeA, bool TransposeB>
struct Wgmma;

#define FP_WGMMA_C64                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FP_WGMMA_C128                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FP_WGMMA_C256                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FP_OUT4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define FP_OUT16(i) FP_OUT4(i), FP_OUT4(i + 4), FP_OUT4(i + 8), FP_OUT4(i + 12)
#define FP_OUT32(i) FP_OUT16(i), FP_OUT16(i + 16)
#define FP_OUT64(i) FP_OUT32(i), FP_OUT32(i + 32)
#define FP_OUT128(i) FP_OUT64(i), FP_OUT64(i + 64)

// Two forms: both operands in shared memory, or a in registers (the fragment of mma.m16n8k16 for
// the 16 rows of this warp). P0.. are the numbers of the operands behind the accumulator's.
#define FP_WGMMA(T, TYPE, N, COUNT, P0, P1, P2, P3, P4, P5, P6)                                  \
  template <bool TransposeA, bool TransposeB>                                                    \
  struct Wgmma<T, N, TransposeA, TransposeB> {                                                   \
    static FP_DEVICE void run(float (&c)[COUNT], uint64_t a, uint64_t b, int add) {              \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2                                        \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE               \
                   " {" FP_WGMMA_C##N "}, " P0 ", " P1 ", p, 1, 1, " P3 ", " P4 ";\n}"           \
                   : FP_OUT##COUNT(0)                                                            \
                   : "l"(a), "l"(b), "r"(add), "n"(int(TransposeA)), "n"(int(TransposeB)));      \
    }                                                                                            \
    static FP_DEVICE void run(float (&c)[COUNT], const uint32_t (&a)[4], uint64_t b, int add) {  \
      static_assert(!TransposeA, "registers have one layout");                                   \
      asm volatile(                                                                              \
          "{\n.reg .pred p;\nsetp.ne.b32 p, " P5                                                 \
          ", 0;\n"                                                                               \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FP_WGMMA_C##N     \
          "}, "                                                                                  \
          "{" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1, " P6 ";\n}"                        \
          : FP_OUT##COUNT(0)                                                                     \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(int(TransposeB))); \
    }                                                                                            \
  };
#define FP_WGMMA_ALL(T, TYPE)                                                 \
  FP_WGMMA(T, TYPE, 64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")  \
  FP_WGMMA(T, TYPE, 128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70") \
  FP_WGMMA(T, TYPE, 256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
FP_WGMMA_ALL(bf16, "bf16")
FP_WGMMA_ALL(half, "f16")
#undef FP_WGMMA_ALL
#undef FP_WGMMA
#undef FP_OUT4
#undef FP_OUT16
#undef FP_OUT32
#undef FP_OUT64
#undef FP_OUT128
#undef FP_WGMMA_C64
#undef FP_WGMMA_C128
#undef FP_WGMMA_C256

}  // namespace fastproto::cuda
