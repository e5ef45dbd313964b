// SPDX-License-Identifier: Apache-2.0
// Every function of common/hopper.cuh on the CPU, with the rules of the PTX ISA that each follows.
// Included by primitives.h.
#pragma once

#include "cuda.h"

namespace fastproto::cuda {

// ---------------------------------------------------------------- clusters

inline int cluster_rank() { return emulator::self().block->rank; }
inline void sync_cluster() {
  if (!emulator::collect("sync_cluster", nullptr)) return;
  emulator::Machine& machine = *emulator::current->machine;
  int alive = 0;
  for (int b = 0; b < machine.cluster; ++b) alive += machine.blocks[size_t(b)].alive_threads;
  emulator::meet(machine.cluster_meeting, alive, true, "sync_cluster", 0);
}

// Addresses of the cluster's window: the rank + 1 from bit 24 up, then the offset in its block.
inline uint32_t peer_address(const void* p, int rank) {
  emulator::Lane& lane = emulator::self();
  if (rank < 0 || rank >= lane.machine->cluster)
    emulator::fail("peer_address: rank %d in a cluster of %d", rank, lane.machine->cluster);
  return emulator::shared_offset("peer_address", p, 1, 1) | uint32_t(rank + 1) << 24;
}

namespace emulator {

inline uint8_t* peer_memory(const char* what, uint32_t address, int bytes) {
  interrupt();
  const Machine& machine = *self().machine;
  const int rank = int(address >> 24) - 1, offset = int(address & 0xffffffu);
  if (rank < 0 || rank >= machine.cluster) fail("%s: %#x is not a peer_address", what, address);
  const Block& block = machine.blocks[size_t(rank)];
  if (offset + bytes > block.shared_bytes)
    fail("%s: %d is past the shared memory of block %d", what, offset, block.index);
  if (offset % bytes != 0) fail("%s: address %d is not a multiple of %d", what, offset, bytes);
  // The programming guide, "Distributed Shared Memory": the blocks must have started (one
  // sync_cluster tells), and must not have exited.
  if (&block != current->block && machine.cluster_meeting.completed == 0)
    fail("%s: block %d may not have started yet: no sync_cluster before", what, block.index);
  if (block.alive_threads == 0) fail("%s: block %d has ended", what, block.index);
  return block.shared + offset;
}

}  // namespace emulator

inline void store_peer(uint32_t address, uint32_t x) {
  memcpy(emulator::peer_memory("store_peer", address, 4), &x, 4);
}
inline void store_peer(uint32_t address, const Vector16& v) {
  memcpy(emulator::peer_memory("store_peer", address, 16), v.x, 16);
}
inline uint32_t load_peer(uint32_t address) {
  uint32_t x;
  memcpy(&x, emulator::peer_memory("load_peer", address, 4), 4);
  return x;
}
inline Vector16 load_peer_16(uint32_t address) {
  Vector16 v;
  memcpy(v.x, emulator::peer_memory("load_peer_16", address, 16), 16);
  return v;
}

// ---------------------------------------------------------------- numbers

// Products of two numbers of 11 bits are exact in float: one rounding.
template <class T>
uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  float a0, a1, b0, b1;
  unpack<T>(a, &a0, &a1);
  unpack<T>(b, &b0, &b1);
  return pack<T>(a0 * b0, a1 * b1);
}

// ---------------------------------------------------------------- registers

template <int N>
void registers_more() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg");
}
template <int N>
void registers_fewer() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg");
}

// ---------------------------------------------------------------- mbarriers

struct Barrier {
  uint64_t state;
};

namespace emulator {

// PTX ISA "Contents of the mbarrier object": the phase, the arrivals it still waits for, the
// arrivals of the next phase, and the tx-count (bytes announced less bytes come, which may be below
// zero while arrivals are awaited). Bit 63 is set in memory that was never written.
struct BarrierState {
  static constexpr int kMaxCount = (1 << 20) - 1;  // of arrivals and of bytes
  int phase, pending, count, bytes;

  static BarrierState load(const Block& block, uint32_t offset) {
    uint64_t x;
    memcpy(&x, block.shared + offset, 8);
    return {int(x & 1), int(x >> 1 & kMaxCount), int(x >> 21 & kMaxCount),
            int(x >> 41 & 0x1fffff) - (1 << 20)};
  }
  void store(Block& block, uint32_t offset) const {
    const uint64_t x = uint64_t(phase) | uint64_t(pending) << 1 | uint64_t(count) << 21 |
                       uint64_t(bytes + (1 << 20)) << 41;
    memcpy(block.shared + offset, &x, 8);
  }
};

inline uint32_t barrier_offset(const char* what, const Barrier* barrier) {
  const uint32_t offset = shared_offset(what, barrier, 8, 8);
  for (uint32_t other : current->block->barriers)
    if (other == offset) return offset;
  fail("%s: no barrier_init of the barrier at %u", what, offset);
}
inline std::string barrier_text(const Block& block, uint32_t offset) {
  const BarrierState state = BarrierState::load(block, offset);
  return text("its phase has parity %d, misses %d of %d arrivals and %d bytes", state.phase,
              state.pending, state.count, state.bytes);
}
inline std::string end_barriers(const Block& block) {
  for (uint32_t offset : block.barriers)
    if (BarrierState::load(block, offset).bytes != 0)
      return text("block %d ended with the barrier at %u in the middle of a phase: ", block.index,
                  offset) +
             barrier_text(block, offset);
  return "";
}

// "Phase completion": both counts are zero; the next phase expects the initial count.
inline void update_barrier(Block& block, uint32_t offset, BarrierState state) {
  if (state.pending == 0 && state.bytes == 0) {
    state.phase ^= 1;
    state.pending = state.count;
    auto& waiters = block.barrier_waiters;
    for (size_t i = 0; i < waiters.size();) {
      if (uint32_t(waiters[i]->detail[0]) == offset) {
        wake(*waiters[i]);
        waiters[i] = waiters.back();
        waiters.pop_back();
      } else {
        ++i;
      }
    }
  }
  state.store(block, offset);
}
inline void add_bytes(const char* what, BarrierState& state, uint32_t offset, int bytes) {
  state.bytes += bytes;
  if (state.bytes > BarrierState::kMaxCount || state.bytes < -BarrierState::kMaxCount)
    fail("%s: the barrier at %u counts up to %d bytes", what, offset, BarrierState::kMaxCount);
}
inline void arrive(const char* what, Barrier* barrier, int bytes) {
  interrupt();
  const uint32_t offset = barrier_offset(what, barrier);
  Block& block = *current->block;
  BarrierState state = BarrierState::load(block, offset);
  if (state.pending == 0)
    fail("%s: one arrival more than the %d of the barrier at %u", what, state.count, offset);
  // "expect-tx" comes before the arrival.
  add_bytes(what, state, offset, bytes);
  --state.pending;
  update_barrier(block, offset, state);
}

}  // namespace emulator

inline void barrier_init(Barrier* barrier, int count) {
  const uint32_t offset = emulator::shared_offset("barrier_init", barrier, 8, 8);
  if (count < 1 || count > emulator::BarrierState::kMaxCount)
    emulator::fail("barrier_init: count %d", count);
  emulator::Block& block = *emulator::current->block;
  for (uint32_t other : block.barriers)
    if (other == offset) emulator::fail("barrier_init: a second one of the barrier at %u", offset);
  block.barriers.push_back(offset);
  block.unfenced_inits.push_back(emulator::current->thread);
  emulator::BarrierState{0, count, count, 0}.store(block, offset);
}
inline void barrier_init_fence() {
  auto& inits = emulator::self().block->unfenced_inits;
  inits.erase(std::remove(inits.begin(), inits.end(), emulator::current->thread), inits.end());
}
inline void barrier_arrive(Barrier* barrier) { emulator::arrive("barrier_arrive", barrier, 0); }
inline void barrier_arrive_expect(Barrier* barrier, int bytes) {
  if (bytes < 0 || bytes > emulator::BarrierState::kMaxCount)
    emulator::fail("barrier_arrive_expect: %d bytes", bytes);
  emulator::arrive("barrier_arrive_expect", barrier, bytes);
}
// mbarrier.try_wait.parity: "the phase parity indicates the parity of either the current phase or
// the immediately preceding phase": true for the preceding one alone. So it is looked at again
// before going on: a waiter that sleeps through two phases stays.
inline void barrier_wait(Barrier* barrier, int parity) {
  using emulator::BarrierState;
  emulator::interrupt();
  const uint32_t offset = emulator::barrier_offset("barrier_wait", barrier);
  if (parity != 0 && parity != 1) emulator::fail("barrier_wait: parity %d", parity);
  emulator::Lane& lane = *emulator::current;
  while (BarrierState::load(*lane.block, offset).phase == parity) {
    lane.block->barrier_waiters.push_back(&lane);
    emulator::suspend(lane, "barrier_wait", int(offset), parity);
  }
}

// ---------------------------------------------------------------- TMA

struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

namespace emulator {

static_assert(sizeof(BoxMap) <= sizeof(TensorMap) && std::is_trivially_copyable_v<BoxMap>);

// With the demands of cuTensorMapEncodeTiled.
inline const char* make_tensor_map(TensorMap* map, int rank, const void* data,
                                   const uint64_t* sizes, const uint64_t* strides,
                                   const uint32_t* box) {
  if (rank < 1 || rank > 5) return "tensor map: the rank is 1 to 5";
  if (uintptr_t(data) % 16 != 0) return "tensor map: the data must be 16-byte aligned";
  BoxMap m = {};
  m.magic = BoxMap::kMagic;
  m.rank = rank;
  m.data = const_cast<uint8_t*>(static_cast<const uint8_t*>(data));
  for (int d = 0; d < 5; ++d) {
    m.sizes[d] = d < rank ? sizes[d] : 1;
    m.strides[d] = d == 0 ? 2 : d < rank ? strides[d - 1] : 0;
    m.box[d] = d < rank ? box[d] : 1;
    if (m.sizes[d] == 0 || m.sizes[d] > uint64_t(1) << 32) return "tensor map: sizes are 1 to 2^32";
    if (d > 0 && (m.strides[d] % 16 != 0 || m.strides[d] >= uint64_t(1) << 40))
      return "tensor map: strides are multiples of 16 bytes, below 2^40";
    if (d > 0 && m.strides[d] == 0 && m.sizes[d] > 1)  // the manual does not say what that is
      return "tensor map: the stride of a dimension of several elements is 0";
    if (d == 1 && m.sizes[1] > 1 && m.strides[1] < m.sizes[0] * 2)
      return "tensor map: rows overlap";
    if (m.box[d] == 0 || m.box[d] > 256) return "tensor map: a box has 1 to 256 elements a side";
  }
  // Narrower boxes exist, but what they leave between their rows is nowhere written.
  if (m.box[0] != 64) return "tensor map: emulated boxes are 64 numbers (128 bytes) wide";
  memcpy(map->opaque, &m, sizeof m);
  return nullptr;
}

inline BoxCopy box_copy(const char* what, const TensorMap* map, const void* shared,
                        const int64_t (&at)[5], int rank) {
  BoxCopy copy = {};
  memcpy(&copy.map, map->opaque, sizeof copy.map);
  if (copy.map.magic != BoxMap::kMagic) fail("%s: not a tensor map", what);
  if (copy.map.rank != rank)
    fail("%s: %d coordinates, the map has %d dimensions", what, rank, copy.map.rank);
  int rows = 1;
  for (int d = 1; d < 5; ++d) rows *= int(copy.map.box[d]);
  // The pattern of the swizzle repeats every 1024 bytes; a box of whole repetitions starts there.
  copy.shared = shared_offset(what, shared, rows * 128, rows % 8 == 0 ? 1024 : 128);
  copy.block = current->block;
  for (int d = 0; d < 5; ++d) copy.at[d] = at[d];
  return copy;
}

// The 128-byte swizzle ("Swizzling modes"): bits 4 to 6 of the shared address, the 16-byte piece of
// a 128-byte row, XOR bits 7 to 9, the row.
inline uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Calls move(shared, global or null) for the numbers of a box.
template <class Move>
void for_box(const BoxCopy& copy, const Move& move) {
  const BoxMap& m = copy.map;
  uint32_t address = copy.shared;
  uint32_t i[5] = {};
  for (i[4] = 0; i[4] < m.box[4]; ++i[4])
    for (i[3] = 0; i[3] < m.box[3]; ++i[3])
      for (i[2] = 0; i[2] < m.box[2]; ++i[2])
        for (i[1] = 0; i[1] < m.box[1]; ++i[1]) {
          bool inside = true;
          uint8_t* row = m.data;
          for (int d = 1; d < 5; ++d) {
            const int64_t at = copy.at[d] + int64_t(i[d]);
            inside = inside && at >= 0 && at < int64_t(m.sizes[d]);
            if (inside) row += at * int64_t(m.strides[d]);
          }
          for (i[0] = 0; i[0] < m.box[0]; ++i[0], address += 2) {
            const int64_t at = copy.at[0] + int64_t(i[0]);
            const bool in_row = inside && at >= 0 && at < int64_t(m.sizes[0]);
            move(copy.block->shared + swizzle(address), in_row ? row + 2 * at : nullptr);
          }
        }
}
inline int box_bytes(const BoxMap& m) {
  int bytes = 2;
  for (uint32_t side : m.box) bytes *= int(side);
  return bytes;
}

// Called when the copy has been under way for a while.
inline void complete_load(const BoxCopy& copy) {
  for_box(copy, [](uint8_t* shared, const uint8_t* global) {
    if (global != nullptr)
      memcpy(shared, global, 2);
    else
      memset(shared, 0, 2);
  });
  if (copy.block->proxies.started()) copy.block->proxies.written(copy.shared, box_bytes(copy.map));
  // "complete-tx": all bytes of the box count, those outside of the tensor too.
  BarrierState state = BarrierState::load(*copy.block, copy.barrier);
  add_bytes("tma_load", state, copy.barrier, -box_bytes(copy.map));
  update_barrier(*copy.block, copy.barrier, state);
}
inline void load_box(void* to, const TensorMap* map, Barrier* barrier, const int64_t (&at)[5],
                     int rank) {
  interrupt();
  BoxCopy copy = box_copy("tma_load", map, to, at, rank);
  copy.barrier = barrier_offset("tma_load", barrier);
  Machine& machine = *current->machine;
  Block& block = *current->block;
  if (!block.unfenced_inits.empty())
    fail("tma_load: thread %d has run barrier_init and no barrier_init_fence",
         block.unfenced_inits[0]);
  note_writes(*current);
  check_fenced("tma_load", copy.shared, box_bytes(copy.map));
  // Some take much longer than the others: those behind them come first.
  const uint32_t most = machine.random() && machine.draw(8) == 0 ? 1 << 17 : 256;
  copy.due = machine.step + (machine.random() ? machine.draw(most) : 64);
  memset(to, kPoison, size_t(box_bytes(copy.map)));
  if (block.proxies.started()) block.proxies.written(copy.shared, box_bytes(copy.map));
  machine.loads.push_back(copy);
}
inline void store_box(const BoxCopy& copy) {
  for_box(copy, [](const uint8_t* shared, uint8_t* global) {
    if (global != nullptr) memcpy(global, shared, 2);
  });
}

}  // namespace emulator

inline void prefetch_map(const TensorMap*) {}
inline void fence_async() {
  emulator::Lane& lane = emulator::self();
  if (lane.block->proxies.started()) lane.block->proxies.fence(lane.thread);
}

inline void tma_load(void* to, const TensorMap* map, Barrier* barrier, int x, int y) {
  emulator::load_box(to, map, barrier, {x, y, 0, 0, 0}, 2);
}
inline void tma_load(void* to, const TensorMap* map, Barrier* barrier, int x, int y, int z) {
  emulator::load_box(to, map, barrier, {x, y, z, 0, 0}, 3);
}
inline void tma_load(void* to, const TensorMap* map, Barrier* barrier, int x, int y, int z, int w) {
  emulator::load_box(to, map, barrier, {x, y, z, w, 0}, 4);
}
inline void tma_load(void* to, const TensorMap* map, Barrier* barrier, int x, int y, int z, int w,
                     int v) {
  emulator::load_box(to, map, barrier, {x, y, z, w, v}, 5);
}
// Shared memory is read when a wait completes the group: what overwrites it before is seen.
inline void tma_store(const TensorMap* map, const void* from, int x, int y, int z) {
  emulator::interrupt();
  const emulator::BoxCopy copy = emulator::box_copy("tma_store", map, from, {x, y, z, 0, 0}, 3);
  emulator::note_writes(*emulator::current);
  emulator::check_fenced("tma_store", copy.shared, emulator::box_bytes(copy.map));
  emulator::self().stores.add(copy);
}
inline void tma_store_commit() { emulator::self().stores.commit(); }
template <int Pending>
void tma_store_wait() {
  emulator::interrupt();
  emulator::self().stores.wait(Pending, emulator::store_box);
}

// ---------------------------------------------------------------- WGMMA

inline uint64_t matrix_descriptor(const void* start, int leading, int stride) {
  return (uint64_t(shared_address(start) & 0x3ffff) >> 4) | (uint64_t(leading >> 4) << 16) |
         (uint64_t(stride >> 4) << 32) | (uint64_t(1) << 62);
}

namespace emulator {

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
    fail("Wgmma: the descriptor of %s is not one of matrix_descriptor", name);
  // K-major operands may start within the first row of the pattern: K advances there.
  if (mn_major ? o.start % 1024 != 0 : o.start % 1024 > 96 || o.start % 32 != 0)
    fail("Wgmma: %s starts at %u, not at %s1024", name, o.start,
         mn_major ? "a multiple of " : "0, 32, 64 or 96 past a multiple of ");
  if (o.stride == 0 || o.stride % 1024 != 0)
    fail("Wgmma: the stride of %s is %u, no multiple of 1024", name, o.stride);
  if (mn_major && mn > 64 && (o.leading == 0 || o.leading % 1024 != 0))
    fail("Wgmma: the leading offset of %s is %u, no multiple of 1024", name, o.leading);
  if (int(o.address(mn - 1, 15)) + 2 > current->block->shared_bytes)
    fail("Wgmma: %s reaches past the block's shared memory", name);
  return o;
}

inline double number(uint16_t bits, bool is_half) {
  return double(is_half ? to_float(half{bits}) : to_float(bf16{bits}));
}
// Pieces of 16 bytes, which stay together whatever the swizzle, of rows first to first + count - 1
// (along M or N): to(row - first, k, offset).
template <class To>
void for_pieces(const Operand& operand, int first, int count, const To& to) {
  for (int k = 0; k < 16; k += operand.mn_major ? 1 : 8)
    for (int row = 0; row < count; row += operand.mn_major ? 8 : 1)
      to(row, k, swizzle(operand.address(first + row, k)));
}
// Their numbers: to(row - first, k, number).
template <class To>
void read_operand(const Operand& operand, int first, int count, bool is_half, const To& to) {
  const uint8_t* shared = current->block->shared;
  for_pieces(operand, first, count, [&](int row, int k, uint32_t offset) {
    uint16_t piece[8];
    memcpy(piece, shared + offset, 16);
    for (int i = 0; i < 8; ++i) {
      const double x = number(piece[i], is_half);
      if (operand.mn_major)
        to(row + i, k, x);
      else
        to(row, k + i, x);
    }
  });
}
inline void check_operand(const char* what, const Operand& operand, int first, int count) {
  if (!current->block->proxies.started()) return;
  for_pieces(operand, first, count,
             [what](int, int, uint32_t offset) { check_fenced(what, offset, 16); });
}

// The rows of a product that this warp holds: 16 w to 16 w + 15.
template <int Columns>
void multiply_warp(const Product& p, float* values) {
  constexpr int kCount = Columns / 2;
  const int first_row = current->warp->index % 4 * 16;
  double a[16][16];
  thread_local double b_memory[16][Columns];
  auto& b = b_memory;
  if (p.a_in_registers) {
    for (int lane = 0; lane < kWarpThreads; ++lane)
      for (int r = 0; r < 4; ++r)
        for (int high = 0; high < 2; ++high)
          a[lane / 4 + r % 2 * 8][lane % 4 * 2 + r / 2 * 8 + high] =
              number(uint16_t(p.a_registers[lane][r] >> 16 * high), p.is_half);
  } else {
    const Operand operand = decode("a", p.a, p.transpose_a, 64);
    read_operand(operand, first_row, 16, p.is_half,
                 [&a](int row, int k, double x) { a[row][k] = x; });
  }
  const Operand operand = decode("b", p.b, p.transpose_b, Columns);
  read_operand(operand, 0, Columns, p.is_half, [&b](int j, int k, double x) { b[k][j] = x; });
  if (!p.add)
    for (int i = 0; i < kWarpThreads * kCount; ++i) values[i] = 0;
  float* c[kWarpThreads];
  for (int i = 0; i < kWarpThreads; ++i) c[i] = values + i * kCount;
  multiply(a, b, c);
}

inline void check_untouched(const float* c, int count) {
  for (int i = 0; i < count; ++i)
    if (float_to_bits(c[i]) != ~0u)
      fail("Wgmma: an accumulator was written while a product was under way");
}

// The last lane of a warp. Ends a product: its accumulator gets the numbers when it was the last
// one under way.
inline void complete_product(const Product& p) {
  Warp& warp = *current->warp;
  Accumulator& accumulator = warp.accumulators[size_t(p.accumulator)];
  float* values = accumulator.values.data();
  if (p.columns == 64)
    multiply_warp<64>(p, values);
  else if (p.columns == 128)
    multiply_warp<128>(p, values);
  else
    multiply_warp<256>(p, values);
  if (--accumulator.products > 0) return;
  accumulator.fence = warp.fences;
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    check_untouched(accumulator.lanes[lane], accumulator.count);
    memcpy(accumulator.lanes[lane], values + lane * accumulator.count,
           sizeof(float) * size_t(accumulator.count));
  }
}

struct ProductArguments {
  float* c;
  const uint32_t* a_registers;
  uint64_t a, b;
  int add;
};

// The warp's accumulator that begins at lane 0's `c`; numbers under way read as NaN.
inline int begin_accumulator(int count) {
  Warp& warp = *current->warp;
  size_t index = 0;
  while (index < warp.accumulators.size() &&
         warp.accumulators[index].lanes[0] != argument<ProductArguments>(0).c)
    ++index;
  if (index == warp.accumulators.size()) warp.accumulators.emplace_back();
  Accumulator& x = warp.accumulators[index];
  const size_t bytes = sizeof(float) * size_t(count);
  const bool known = x.count == count && x.values.size() == size_t(count * kWarpThreads);
  if (!known && x.products > 0) fail("Wgmma: an accumulator under way has another size");
  x.count = count;
  x.values.resize(size_t(count * kWarpThreads));
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    float* c = argument<ProductArguments>(lane).c;
    float* values = x.values.data() + lane * count;
    if (x.products > 0) {
      if (x.lanes[lane] != c) fail("Wgmma: lanes of a warp have different accumulators");
      check_untouched(c, count);
    } else {
      if (known && x.fence == warp.fences && x.lanes[lane] == c && memcmp(values, c, bytes) != 0)
        fail("Wgmma: an accumulator was written after the last product, and no wgmma_begin since");
      x.lanes[lane] = c;
      memcpy(values, c, bytes);
      memset(c, kPoison, bytes);
    }
  }
  ++x.products;
  return int(index);
}

inline void run_product(const char* what, Product p, float* c, const uint32_t* a_registers,
                        uint64_t a, uint64_t b, int add) {
  ProductArguments mine{c, a_registers, a, b, add};
  if (!collect(what, &mine)) return;
  Warp& warp = *current->warp;
  if (warp.block->threads % 128 != 0 && warp.index / 4 == warp.block->threads / 128)
    fail("Wgmma: the warp is in no whole warpgroup");
  if (warp.fences == 0) fail("Wgmma: no wgmma_begin before the first product");
  if (add != 0 && add != 1) fail("Wgmma: add is %d", add);
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    const auto& other = argument<ProductArguments>(lane);
    if (other.a != a || other.b != b || other.add != add)
      fail("Wgmma: lanes of a warp have different descriptors");
    if (p.a_in_registers) memcpy(p.a_registers[lane], other.a_registers, 16);
  }
  p.a = a;
  p.b = b;
  p.add = add != 0;
  note_writes(*current);
  if (!p.a_in_registers) {
    const Operand operand = decode("a", a, p.transpose_a, 64);
    check_operand(what, operand, warp.index % 4 * 16, 16);
  }
  check_operand(what, decode("b", b, p.transpose_b, p.columns), 0, p.columns);
  // All four warps of the warpgroup run the same products in the same order.
  auto& products = warp.block->products[warp.index / 4];
  const std::string signature =
      text("%s a %#llx b %#llx add %d", what, static_cast<unsigned long long>(a),
           static_cast<unsigned long long>(b), add);
  if (warp.signatures == products.size())
    products.push_back(signature);
  else if (products[warp.signatures] != signature)
    fail("the warps of a warpgroup run different products: %s, %s", signature.c_str(),
         products[warp.signatures].c_str());
  ++warp.signatures;
  p.accumulator = begin_accumulator(p.columns / 2);
  warp.products.add(p);
  release();
}

}  // namespace emulator

inline void wgmma_begin() {
  if (!emulator::collect("wgmma_begin", nullptr)) return;
  ++emulator::current->warp->fences;
  emulator::release();
}
inline void wgmma_commit() {
  if (!emulator::collect("wgmma_commit", nullptr)) return;
  emulator::Lane& lane = *emulator::current;
  lane.warp->products.commit();
  // In random order some happen at once: operands that had not come yet are seen.
  if (lane.machine->random() && lane.machine->draw(2) == 0)
    lane.warp->products.wait(0, emulator::complete_product);
  emulator::release();
}
// Else the products happen here, as late as they may: operands overwritten too early are seen.
template <int Pending>
void wgmma_wait() {
  if (!emulator::collect("wgmma_wait", nullptr)) return;
  emulator::current->warp->products.wait(Pending, emulator::complete_product);
  emulator::release();
}
template <int Count>
void wgmma_hold(float (&)[Count]) {}

template <class T, int Columns, bool TransposeA, bool TransposeB>
struct Wgmma {
  static_assert(Columns == 64 || Columns == 128 || Columns == 256, "as common/hopper.cuh");
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, half>, "two-byte operands");

  static void run(float (&c)[Columns / 2], uint64_t a, uint64_t b, int add) {
    emulator::run_product(name(), product(false), c, nullptr, a, b, add);
  }
  static void run(float (&c)[Columns / 2], const uint32_t (&a)[4], uint64_t b, int add) {
    static_assert(!TransposeA, "registers have one layout");
    emulator::run_product(name(), product(true), c, a, 0, b, add);
  }

 private:
  static const char* name() {
    static const std::string text =
        emulator::text("Wgmma<%s, %d, %d, %d>", std::is_same_v<T, half> ? "half" : "bf16", Columns,
                       TransposeA, TransposeB);
    return text.c_str();
  }
  static emulator::Product product(bool a_in_registers) {
    emulator::Product p = {};
    p.columns = Columns;
    p.is_half = std::is_same_v<T, half>;
    p.a_in_registers = a_in_registers;
    p.transpose_a = TransposeA;
    p.transpose_b = TransposeB;
    return p;
  }
};

}  // namespace fastproto::cuda
