// SPDX-License-Identifier: Apache-2.0
// As primitives.cpp: the matrix products.
#include "../../../csrc/cuda/common/platform.h"

using namespace fastproto::cuda;
using emulator::run;

namespace {

template <class T>
void mma_16(const uint16_t* a, const uint16_t* b, float (&c)[4], int g, int i) {
  uint32_t as[4], bs[2];
  for (int r = 0; r < 4; ++r) memcpy(&as[r], a + (g + r % 2 * 8) * 16 + 2 * i + r / 2 * 8, 4);
  for (int r = 0; r < 2; ++r) {
    const uint16_t* pair = b + (2 * i + 8 * r) * 8 + g;
    bs[r] = pair[0] | uint32_t(pair[8]) << 16;
  }
  mma_16816<T>(c, as, bs[0], bs[1]);
}
void mma_tf32(const float* a, const float* b, float (&c)[4], int g, int i) {
  float as[4];
  for (int r = 0; r < 4; ++r) as[r] = a[(g + r % 2 * 8) * 8 + i + r / 2 * 4];
  mma_1688_tf32(c, as, b[i * 8 + g], b[(i + 4) * 8 + g]);
}

struct WgmmaParams {
  int is_half, columns, transpose_a, transpose_b, registers;
  int depth;       // a multiple of 64
  int early;       // before the wait: 1 overwrites b, 2 reads c
  float* c;        // [64][columns]
  TensorMap a, b;  // boxes of 64 numbers times all rows
};

template <class T, int Columns>
void multiply(const WgmmaParams& p, float* sums, uint64_t a, const uint32_t (&as)[4], uint64_t b,
              int add) {
  auto& c = reinterpret_cast<float (&)[Columns / 2]>(*sums);
  if (p.registers && p.transpose_b) return Wgmma<T, Columns, false, true>::run(c, as, b, add);
  if (p.registers) return Wgmma<T, Columns, false, false>::run(c, as, b, add);
  if (p.transpose_a && p.transpose_b) return Wgmma<T, Columns, true, true>::run(c, a, b, add);
  if (p.transpose_a) return Wgmma<T, Columns, true, false>::run(c, a, b, add);
  if (p.transpose_b) return Wgmma<T, Columns, false, true>::run(c, a, b, add);
  Wgmma<T, Columns, false, false>::run(c, a, b, add);
}

template <class T, int Columns>
void wgmma_kernel(const WgmmaParams& p) {
  // K-major: pieces of 64 along K, [rows][64] each. MN-major: pieces of 64 along M (N), [K][64].
  const int a_bytes = 64 * p.depth * 2, b_bytes = Columns * p.depth * 2;
  uint8_t* a = shared_memory();
  uint8_t* b = a + a_bytes;
  Barrier* barrier = reinterpret_cast<Barrier*>(b + b_bytes);
  const int warp = warp_index(), g = lane_index() / 4, i = lane_index() % 4;
  if (thread_index() == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
  }
  sync_block();
  if (thread_index() == 0) {
    barrier_arrive_expect(barrier, a_bytes + b_bytes);
    const int a_pieces = p.transpose_a ? 1 : p.depth / 64;
    const int b_pieces = p.transpose_b ? Columns / 64 : p.depth / 64;
    for (int n = 0; n < a_pieces; ++n)
      tma_load(a + n * (a_bytes / a_pieces), &p.a, barrier, 64 * n, 0);
    for (int n = 0; n < b_pieces; ++n)
      tma_load(b + n * (b_bytes / b_pieces), &p.b, barrier, 64 * n, 0);
  }
  barrier_wait(barrier, 0);
  float c[Columns / 2];
  for (float& x : c) x = 1000;  // the first product does not add
  wgmma_begin();
  for (int k = 0; k < p.depth; k += 16) {
    const auto start = [&](const uint8_t* from, int transpose, int rows) {
      return from + (transpose ? k * 128 : k / 64 * (rows * 128) + k % 64 * 2);
    };
    uint32_t as[4];
    for (int r = 0; r < 4; ++r) {
      const int row = warp * 16 + g + r % 2 * 8, column = k % 64 + 2 * i + r / 2 * 8;
      const int at = k / 64 * (64 * 128) + row * 128 + (column / 8 ^ row % 8) * 16;
      memcpy(&as[r], a + at + column % 8 * 2, 4);
    }
    multiply<T, Columns>(p, c, matrix_descriptor(start(a, p.transpose_a, 64), 0, 1024), as,
                         matrix_descriptor(start(b, p.transpose_b, Columns), p.depth * 128, 1024),
                         k > 0);
    if (k == 0) wgmma_commit();
  }
  wgmma_commit();
  wgmma_wait<1>();
  if (p.early == 1) memset(b, 0, size_t(b_bytes));
  const float seen = c[0];
  wgmma_wait<0>();
  wgmma_hold(c);
  if (p.early == 2) c[0] = seen;
  for (int j = 0; j < Columns / 2; ++j) {
    const int row = warp * 16 + g + j / 2 % 2 * 8, column = j / 4 * 8 + 2 * i + j % 2;
    p.c[row * Columns + column] = c[j];
  }
}
template <class T>
auto wgmma_kernel_of(int columns) {
  return columns == 64    ? wgmma_kernel<T, 64>
         : columns == 128 ? wgmma_kernel<T, 128>
                          : wgmma_kernel<T, 256>;
}

}  // namespace

extern "C" {

const char* mma(int type, const void* a, const void* b, float* c) {  // [16][K] [K][8] [16][8]
  return run(1, 32, 1, 0, [=] {
    const int g = lane_index() / 4, i = lane_index() % 4;
    float mine[4];
    for (int j = 0; j < 4; ++j) mine[j] = c[(g + j / 2 * 8) * 8 + 2 * i + j % 2];
    const auto *a16 = static_cast<const uint16_t*>(a), *b16 = static_cast<const uint16_t*>(b);
    if (type == 0) mma_16<bf16>(a16, b16, mine, g, i);
    if (type == 1) mma_16<half>(a16, b16, mine, g, i);
    if (type == 2) mma_tf32(static_cast<const float*>(a), static_cast<const float*>(b), mine, g, i);
    for (int j = 0; j < 4; ++j) c[(g + j / 2 * 8) * 8 + 2 * i + j % 2] = mine[j];
  });
}
// a: [64][depth], or transposed; b: [columns][depth], or (N-major) [depth][columns].
const char* wgmma(int is_half, int columns, int transpose_a, int transpose_b, int registers,
                  const void* a, const void* b, float* c, int depth, int early) {
  WgmmaParams p = {is_half, columns, transpose_a, transpose_b, registers, depth, early, c, {}, {}};
  const auto make = [depth](TensorMap* map, const void* data, int mn, int transpose) {
    const uint64_t sizes[2] = {uint64_t(transpose ? mn : depth), uint64_t(transpose ? depth : mn)};
    const uint64_t strides[1] = {sizes[0] * 2};
    const uint32_t box[2] = {64, uint32_t(sizes[1])};
    return make_tensor_map(map, MapType::kBFloat16, 2, data, sizes, strides, box);
  };
  const char* error = make(&p.a, a, 64, transpose_a);
  if (error == nullptr) error = make(&p.b, b, columns, transpose_b);
  if (error != nullptr) return error;
  const auto kernel = is_half ? wgmma_kernel_of<half>(columns) : wgmma_kernel_of<bf16>(columns);
  return run(1, 128, 1, (64 + columns) * depth * 2 + 16, [=] { kernel(p); });
}

}  // extern "C"
