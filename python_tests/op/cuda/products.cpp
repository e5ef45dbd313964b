// SPDX-License-Identifier: Apache-2.0
// As primitives.cpp: the matrix products.
#include "../../../csrc/cuda/common/platform.h"

using namespace fastproto::cuda;

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
  int transpose_a, transpose_b, registers;
  const uint8_t *a_image, *b_image;  // as they lie in shared memory, in boxes of 64 columns
  const uint16_t* a;                 // [64][depth]
  float* c;                          // [64][columns]
  int depth;                         // a multiple of 64
  int early;                         // before the wait: 1 overwrites b, 2 reads c
};

template <class T, int Columns>
void multiply(const WgmmaParams& p, float (&c)[Columns / 2], uint64_t a, const uint32_t (&as)[4],
              uint64_t b, int add) {
  if (p.registers && p.transpose_b) return Wgmma<T, Columns, false, true>::run(c, as, b, add);
  if (p.registers) return Wgmma<T, Columns, false, false>::run(c, as, b, add);
  if (p.transpose_a && p.transpose_b) return Wgmma<T, Columns, true, true>::run(c, a, b, add);
  if (p.transpose_a) return Wgmma<T, Columns, true, false>::run(c, a, b, add);
  if (p.transpose_b) return Wgmma<T, Columns, false, true>::run(c, a, b, add);
  Wgmma<T, Columns, false, false>::run(c, a, b, add);
}

template <class T, int Columns>
const char* wgmma_of(const WgmmaParams& p) {
  const int a_bytes = 64 * p.depth * 2, b_bytes = Columns * p.depth * 2;
  return run(1, 128, 1, a_bytes + b_bytes, [=] {
    uint8_t* a = shared_memory();
    uint8_t* b = a + a_bytes;
    const int row = warp_index() * 16 + lane_index() / 4, column = lane_index() % 4 * 2;
    if (thread_index() == 0) {
      memcpy(a, p.a_image, size_t(a_bytes));
      memcpy(b, p.b_image, size_t(b_bytes));
    }
    sync_block();
    float c[Columns / 2];
    for (float& x : c) x = 1000;  // the first product does not add
    wgmma_begin();
    for (int k = 0; k < p.depth; k += 16) {
      const auto descriptor = [&](const uint8_t* from, int transpose, int rows) {
        from += transpose ? k * 128 : k / 64 * (rows * 128) + k % 64 * 2;
        return matrix_descriptor(from, p.depth * 128, 1024);
      };
      uint32_t as[4];
      for (int r = 0; r < 4; ++r)
        memcpy(&as[r], p.a + (row + r % 2 * 8) * p.depth + k + column + r / 2 * 8, 4);
      multiply<T, Columns>(p, c, descriptor(a, p.transpose_a, 64), as,
                           descriptor(b, p.transpose_b, Columns), k > 0);
      if (k == 0) wgmma_commit();
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (p.early == 1) memset(b, 0, size_t(b_bytes));
    const float seen = c[0];
    wgmma_wait<0>();
    wgmma_hold(c);
    if (p.early == 2) c[0] = seen;
    for (int j = 0; j < Columns / 2; ++j)
      p.c[(row + j / 2 % 2 * 8) * Columns + j / 4 * 8 + column + j % 2] = c[j];
  });
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
const char* wgmma(int is_half, int columns, int transpose_a, int transpose_b, int registers,
                  const uint8_t* a_image, const uint8_t* b_image, const uint16_t* a, float* c,
                  int depth, int early) {
  const WgmmaParams p{transpose_a, transpose_b, registers, a_image, b_image, a, c, depth, early};
  if (columns == 64) return is_half ? wgmma_of<half, 64>(p) : wgmma_of<bf16, 64>(p);
  if (columns == 128) return is_half ? wgmma_of<half, 128>(p) : wgmma_of<bf16, 128>(p);
  return is_half ? wgmma_of<half, 256>(p) : wgmma_of<bf16, 256>(p);
}

}  // extern "C"
