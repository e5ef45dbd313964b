// SPDX-License-Identifier: Apache-2.0
// The products of warpgroups of csrc/cuda/common/hopper.cuh on the CPU: operands are read where
// their descriptors say, as late as a wait lets them.
#pragma once

#include "hopper.h"

namespace fastproto::cuda::emulator {

inline uint64_t matrix_descriptor(const void* start, int leading, int stride) {
  return (uint64_t(shared_address(start) & 0x3ffff) >> 4) | (uint64_t(leading >> 4) << 16) |
         (uint64_t(stride >> 4) << 32) | (uint64_t(1) << 62);
}

// PTX ISA "Matrix descriptor": bits 0-13 the start address, 16-29 the leading dimension byte
// offset, 32-45 the stride dimension byte offset, all without their low four bits; 49-51 the base
// offset, 0 where the pattern of the swizzle starts at a multiple of 1024 bytes; 62-63 the swizzle,
// 1 for 128 bytes.
struct Operand {
  uint32_t start, leading, stride;
  bool mn_major;

  // "Strides", in pieces of 16 bytes (8 numbers). K-major: the leading offset is not used, the
  // stride offset is "from the first 8 rows to the next 8 rows"; so the canonical layout is
  // ((8,m),(8,2)):((64,stride),(1,8)) in numbers. MN-major: the leading offset is "from the first
  // (swizzle-byte-size/16) rows to the next", rows being pieces of 8 numbers along M or N: 64
  // numbers; the stride offset is "from the first 8 columns to the next 8 columns", columns being
  // steps of K: ((8,8,m),(8,k)):((1,8,leading),(64,stride)). The swizzle applies to the address
  // that results.
  uint32_t address(int mn, int k) const {
    const uint32_t m = uint32_t(mn), j = uint32_t(k);
    return start + (mn_major ? m / 64 * leading + m % 64 * 2 + j / 8 * stride + j % 8 * 128
                             : m / 8 * stride + m % 8 * 128 + j * 2);
  }
};

inline Operand decode(const char* name, uint64_t descriptor, bool mn_major, int mn) {
  const Operand o{uint32_t(descriptor & 0x3fff) << 4, uint32_t(descriptor >> 16 & 0x3fff) << 4,
                  uint32_t(descriptor >> 32 & 0x3fff) << 4, mn_major};
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0)
    fail("Wgmma: the descriptor of ", name, " is not one of matrix_descriptor");
  // K-major operands may start within the first row of the pattern: K advances there.
  if (mn_major ? o.start % 1024 != 0 : o.start % 1024 > 96 || o.start % 32 != 0)
    fail("Wgmma: ", name, " starts at ", o.start, ", not at ",
         mn_major ? "a multiple of " : "0, 32, 64 or 96 past a multiple of ", 1024);
  if (o.stride == 0 || o.stride % 1024 != 0)
    fail("Wgmma: the stride of ", name, " is ", o.stride, ", no multiple of 1024");
  if (mn_major && mn > 64 && (o.leading == 0 || o.leading % 1024 != 0))
    fail("Wgmma: the leading offset of ", name, " is ", o.leading, ", no multiple of 1024");
  if (int(o.address(mn - 1, 15)) + 2 > current->block->shared_bytes)
    fail("Wgmma: ", name, " reaches past the block's shared memory");
  return o;
}

// Pieces of 16 bytes, which stay together whatever the swizzle, of rows first to first + count - 1
// (along M or N): to(row - first, k, offset).
template <class To>
void for_pieces(const Operand& operand, int first, int count, const To& to) {
  for (int k = 0; k < 16; k += operand.mn_major ? 1 : 8)
    for (int row = 0; row < count; row += operand.mn_major ? 8 : 1)
      to(row, k, swizzle(operand.address(first + row, k)));
}

struct Product {
  const char* what;
  int columns;
  bool transpose_a, transpose_b;
  bool is_half;
  float* c;
  const uint32_t* a_registers;  // null: a is in shared memory
  uint64_t a, b;                // descriptors
  int add;

  double number(uint32_t bits) const {
    return double(is_half ? to_float(half{uint16_t(bits)}) : to_float(bf16{uint16_t(bits)}));
  }
  Operand decode_a() const { return decode("a", a, transpose_a, 64); }
  Operand decode_b() const { return decode("b", b, transpose_b, columns); }
  // Their numbers: to(row - first, k, number).
  template <class To>
  void read(const Operand& operand, int first, int count, const To& to) const {
    for_pieces(operand, first, count, [&](int row, int k, uint32_t offset) {
      uint16_t piece[8];
      memcpy(piece, current->block->shared + offset, 16);
      for (int i = 0; i < 8; ++i)
        operand.mn_major ? to(row + i, k, number(piece[i])) : to(row, k + i, number(piece[i]));
    });
  }
};

inline void check_untouched(const float* c, int count) {
  for (int i = 0; i < count; ++i)
    if (float_to_bits(c[i]) != ~0u)
      fail("Wgmma: an accumulator was written while a product was under way");
}

// The last lane of a warp ends a product of 16 w to 16 w + 15, the rows of warp w: its accumulator
// gets the numbers when it was the last one under way. `a` holds [16][16] where it was in
// registers.
inline void complete_product(const Product& p, size_t index, std::vector<double> a) {
  Warp& warp = *current->warp;
  Accumulator& accumulator = warp.accumulators[index];
  if (a.empty()) {
    a.resize(16 * 16);
    p.read(p.decode_a(), warp.index % 4 * 16, 16,
           [&a](int row, int k, double x) { a[size_t(row * 16 + k)] = x; });
  }
  std::vector<double> b(size_t(16 * p.columns));
  p.read(p.decode_b(), 0, p.columns,
         [&](int j, int k, double x) { b[size_t(k * p.columns + j)] = x; });
  if (p.add == 0) std::fill(accumulator.values.begin(), accumulator.values.end(), 0.0f);
  float* c[kWarpThreads];
  for (int i = 0; i < kWarpThreads; ++i) c[i] = &accumulator.values[size_t(i * accumulator.count)];
  multiply(a.data(), b.data(), 16, p.columns, c);
  if (--accumulator.products > 0) return;
  accumulator.fence = warp.fences;
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    check_untouched(accumulator.lanes[lane], accumulator.count);
    std::copy_n(c[lane], accumulator.count, accumulator.lanes[lane]);
  }
}

// The warp's accumulator that begins at lane 0's `c`; numbers under way read as NaN.
inline size_t begin_accumulator(int count) {
  auto& all = current->warp->accumulators;
  const float* first = argument<Product>(0).c;
  const auto found = std::find_if(all.begin(), all.end(),
                                  [first](const Accumulator& x) { return x.lanes[0] == first; });
  const size_t index = size_t(found - all.begin());
  if (found == all.end()) all.emplace_back();
  Accumulator& x = all[index];
  const size_t bytes = sizeof(float) * size_t(count);
  const bool known = x.count == count;
  if (!known && x.products > 0) fail("Wgmma: an accumulator under way has another size");
  x.count = count;
  x.values.resize(size_t(count * kWarpThreads));
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    float* c = argument<Product>(lane).c;
    float* values = x.values.data() + lane * count;
    if (x.products > 0) {
      if (x.lanes[lane] != c) fail("Wgmma: lanes of a warp have different accumulators");
      check_untouched(c, count);
    } else {
      if (known && x.fence == current->warp->fences && x.lanes[lane] == c &&
          memcmp(values, c, bytes) != 0)
        fail("Wgmma: an accumulator was written after the last product, and no wgmma_begin since");
      x.lanes[lane] = c;
      memcpy(values, c, bytes);
      memset(c, kPoison, bytes);
    }
  }
  ++x.products;
  return index;
}

inline std::string words(const Signature& signature) {
  const auto& [what, a, b, add] = signature;
  return text(what, " a ", a, " b ", b, " add ", add);
}

// The last lane of a warp: its product is under way.
inline void begin_product(const Product& p) {
  Warp& warp = *current->warp;
  if (warp.block->threads % 128 != 0 && warp.index / 4 == warp.block->threads / 128)
    fail("Wgmma: the warp is in no whole warpgroup");
  if (warp.fences == 0) fail("Wgmma: no wgmma_begin before the first product");
  if (p.add != 0 && p.add != 1) fail("Wgmma: add is ", p.add);
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    const auto& other = argument<Product>(lane);
    if (other.a != p.a || other.b != p.b || other.add != p.add)
      fail("Wgmma: lanes of a warp have different descriptors");
  }
  warp.block->proxies.note(current->thread);
  const auto check = [&p](int, int, uint32_t offset) { check_fenced(p.what, offset, 16); };
  std::vector<double> a;
  if (p.a_registers != nullptr) {
    for (int i = 0; i < 16 * 16; ++i) {  // the fragment of mma_16816
      const int row = i / 16, k = i % 16;
      const uint32_t* registers = argument<Product>(row % 8 * 4 + k % 8 / 2).a_registers;
      a.push_back(p.number(registers[row / 8 + k / 8 * 2] >> 16 * (k % 2)));
    }
  } else {
    for_pieces(p.decode_a(), warp.index % 4 * 16, 16, check);
  }
  for_pieces(p.decode_b(), 0, p.columns, check);
  // All four warps of the warpgroup run the same products in the same order.
  auto& products = warp.block->products[warp.index / 4];
  const Signature signature{p.what, p.a, p.b, p.add};
  if (warp.multiplied == products.size())
    products.push_back(signature);
  else if (products[warp.multiplied] != signature)
    fail("the warps of a warpgroup run different products: ", words(signature), "; ",
         words(products[warp.multiplied]));
  ++warp.multiplied;
  const size_t accumulator = begin_accumulator(p.columns / 2);
  warp.products.add([p, accumulator, a] { complete_product(p, accumulator, a); });
}

inline void wgmma_begin() {
  together("wgmma_begin", nullptr, [] { ++current->warp->fences; });
}
inline void wgmma_commit() {
  together("wgmma_commit", nullptr, [] {
    Lane& lane = *current;
    lane.warp->products.commit();
    // In random order some happen at once: operands that had not come yet are seen.
    if (lane.machine->random && lane.machine->draw(2) == 0) lane.warp->products.wait(0);
  });
}
// Else the products happen here, as late as they may: operands overwritten too early are seen.
template <int Pending>
void wgmma_wait() {
  together("wgmma_wait", nullptr, [] { current->warp->products.wait(Pending); });
}
template <int Count>
void wgmma_hold(float (&)[Count]) {}

template <class T, int Columns, bool TransposeA, bool TransposeB>
struct Wgmma {
  static_assert(Columns == 64 || Columns == 128 || Columns == 256, "as common/hopper.cuh");
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, half>, "two-byte operands");

  static void run(float (&c)[Columns / 2], uint64_t a, uint64_t b, int add) {
    run_product(c, nullptr, a, b, add);
  }
  static void run(float (&c)[Columns / 2], const uint32_t (&a)[4], uint64_t b, int add) {
    static_assert(!TransposeA, "registers have one layout");
    run_product(c, a, 0, b, add);
  }

 private:
  static void run_product(float* c, const uint32_t* a_registers, uint64_t a, uint64_t b, int add) {
    static const std::string name = text("Wgmma<", std::is_same_v<T, half> ? "half" : "bf16", ", ",
                                         Columns, ", ", TransposeA, ", ", TransposeB, ">");
    Product mine{name.c_str(), Columns, TransposeA, TransposeB, std::is_same_v<T, half>, c,
                 a_registers,  a,       b,          add};
    together(mine.what, &mine, [&mine] { begin_product(mine); });
  }
};

}  // namespace fastproto::cuda::emulator
