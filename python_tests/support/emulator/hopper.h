// SPDX-License-Identifier: Apache-2.0
// The clusters, mbarriers and TMA of csrc/cuda/common/hopper.cuh on the CPU, with the rules of the
// PTX ISA that each follows.
#pragma once

#include "ptx.h"

namespace fastproto::cuda::emulator {

// ---------------------------------------------------------------- clusters

inline int cluster_rank() { return self().block->rank; }
inline void sync_cluster() {
  Machine& machine = *self().machine;
  sync_all("sync_cluster", machine.cluster_meeting, machine.alive_threads());
}

// Addresses of the cluster's window: the rank + 1 from bit 24 up, then the offset in its block.
inline uint32_t peer_address(const void* p, int rank) {
  Lane& lane = self();
  if (rank < 0 || rank >= lane.machine->cluster)
    fail("peer_address: rank ", rank, " in a cluster of ", lane.machine->cluster);
  return shared_offset("peer_address", p, 1, 1) | uint32_t(rank + 1) << 24;
}

inline uint8_t* peer_memory(const char* what, uint32_t address, int bytes) {
  interrupt();
  Machine& machine = *self().machine;
  const int rank = int(address >> 24) - 1, offset = int(address & 0xffffffu);
  if (rank < 0 || rank >= machine.cluster) fail(what, ": ", address, " is not a peer_address");
  Block& block = machine.blocks[size_t(rank)];
  if (offset + bytes > block.shared_bytes)
    fail(what, ": ", offset, " is past the shared memory of block ", block.index);
  if (offset % bytes != 0) fail(what, ": address ", offset, " is not a multiple of ", bytes);
  // The programming guide, "Distributed Shared Memory": the blocks must have started (one
  // sync_cluster tells), and must not have exited.
  if (&block != current->block && machine.cluster_meeting.completed == 0)
    fail(what, ": block ", block.index, " may not have started yet: no sync_cluster before");
  if (block.alive_threads == 0) fail(what, ": block ", block.index, " has ended");
  return block.shared + offset;
}

inline void store_peer(uint32_t address, uint32_t x) {
  memcpy(peer_memory("store_peer", address, 4), &x, 4);
}
inline void store_peer(uint32_t address, const Vector16& v) {
  memcpy(peer_memory("store_peer", address, 16), v.x, 16);
}
inline uint32_t load_peer(uint32_t address) {
  uint32_t x;
  memcpy(&x, peer_memory("load_peer", address, 4), 4);
  return x;
}
inline Vector16 load_peer_16(uint32_t address) {
  Vector16 v;
  memcpy(v.x, peer_memory("load_peer_16", address, 16), 16);
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

constexpr int kMaxCount = (1 << 20) - 1;  // of arrivals and of bytes

// PTX ISA "Contents of the mbarrier object": the phase, the arrivals it still waits for, those of
// the next phase, and the tx-count (bytes announced less bytes come, which may be below zero while
// arrivals are awaited).
struct __attribute__((may_alias)) BarrierState {
  uint64_t phase : 1, pending : 20, count : 20;
  int64_t bytes : 23;
};
static_assert(sizeof(BarrierState) == sizeof(Barrier));

inline BarrierState& barrier_at(const Block& block, uint32_t offset) {
  return *reinterpret_cast<BarrierState*>(block.shared + offset);
}
inline bool is_barrier(const Block& block, uint32_t offset) {
  return std::find(block.barriers.begin(), block.barriers.end(), offset) != block.barriers.end();
}
inline uint32_t barrier_offset(const char* what, const Barrier* barrier) {
  const uint32_t offset = shared_offset(what, barrier, 8, 8);
  if (!is_barrier(*current->block, offset))
    fail(what, ": no barrier_init of the barrier at ", offset);
  return offset;
}
inline std::string barrier_text(const Block& block, uint32_t offset) {
  const BarrierState& state = barrier_at(block, offset);
  return text("its phase has parity ", state.phase, ", misses ", state.pending, " of ", state.count,
              " arrivals and ", state.bytes, " bytes");
}

// Arrivals come, bytes are announced or (below zero) come. "Phase completion": both counts are
// zero; the next phase expects the initial count.
inline void update_barrier(const char* what, Block& block, uint32_t offset, int arrivals,
                           int bytes) {
  BarrierState& state = barrier_at(block, offset);
  if (int(state.pending) < arrivals)
    fail(what, ": one arrival more than the ", state.count, " of the barrier at ", offset);
  if (std::abs(int(state.bytes) + bytes) > kMaxCount)
    fail(what, ": the barrier at ", offset, " counts up to ", kMaxCount, " bytes");
  state.pending -= uint64_t(arrivals);
  state.bytes += bytes;
  if (state.pending != 0 || state.bytes != 0) return;
  state.phase ^= 1;
  state.pending = state.count;
  std::erase_if(block.barrier_waiters, [offset](Lane* waiter) {
    if (uint32_t(waiter->detail[0]) != offset) return false;
    waiter->warp->runnable |= 1u << waiter->lane;
    return true;
  });
}
// "expect-tx" comes before the arrival.
inline void arrive(const char* what, Barrier* barrier, int bytes) {
  interrupt();
  update_barrier(what, *current->block, barrier_offset(what, barrier), 1, bytes);
}

inline void barrier_init(Barrier* barrier, int count) {
  const uint32_t offset = shared_offset("barrier_init", barrier, 8, 8);
  if (count < 1 || count > kMaxCount) fail("barrier_init: count ", count);
  Block& block = *current->block;
  if (is_barrier(block, offset)) fail("barrier_init: a second one of the barrier at ", offset);
  block.barriers.push_back(offset);
  block.unfenced_inits.push_back(current->thread);
  barrier_at(block, offset) = {0, unsigned(count), unsigned(count), 0};
}
inline void barrier_init_fence() { std::erase(self().block->unfenced_inits, current->thread); }
inline void barrier_arrive(Barrier* barrier) { arrive("barrier_arrive", barrier, 0); }
inline void barrier_arrive_expect(Barrier* barrier, int bytes) {
  if (bytes < 0) fail("barrier_arrive_expect: ", bytes, " bytes");
  arrive("barrier_arrive_expect", barrier, bytes);
}
// mbarrier.try_wait.parity: "the phase parity indicates the parity of either the current phase or
// the immediately preceding phase": true for the preceding one alone. So it is looked at again
// before going on: a waiter that sleeps through two phases stays.
inline void barrier_wait(Barrier* barrier, int parity) {
  interrupt();
  const uint32_t offset = barrier_offset("barrier_wait", barrier);
  if (parity != 0 && parity != 1) fail("barrier_wait: parity ", parity);
  Lane& lane = *current;
  while (int(barrier_at(*lane.block, offset).phase) == parity) {
    lane.block->barrier_waiters.push_back(&lane);
    suspend(lane, "barrier_wait", int(offset), parity);
  }
}

// ---------------------------------------------------------------- TMA

// A tensor map, as make_tensor_map packs it.
struct BoxMap {
  static constexpr uint32_t kMagic = 0x70616d74;
  uint32_t magic;
  int32_t rank;
  uint8_t* data;
  uint64_t sizes[5], strides[5];  // elements; bytes
  uint32_t box[5];
};
static_assert(sizeof(BoxMap) <= sizeof(TensorMap) && std::is_trivially_copyable_v<BoxMap>);

// With the demands of cuTensorMapEncodeTiled.
inline const char* make_tensor_map(TensorMap* map, MapType, int rank, const void* data,
                                   const uint64_t* sizes, const uint64_t* strides,
                                   const uint32_t* box) {
  if (rank < 1 || rank > 5) return "tensor map: the rank is 1 to 5";
  if (uintptr_t(data) % 16 != 0) return "tensor map: the data must be 16-byte aligned";
  BoxMap m = {BoxMap::kMagic, rank, static_cast<uint8_t*>(const_cast<void*>(data)), {}, {}, {}};
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

// The 128-byte swizzle ("Swizzling modes"): bits 4 to 6 of the shared address, the 16-byte piece of
// a 128-byte row, XOR bits 7 to 9, the row.
inline uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

struct BoxCopy {
  BoxMap map;
  Block* block;
  int bytes;
  uint32_t shared;  // offset in the block's shared memory
  int at[5] = {};

  template <class... At>
  BoxCopy(const char* what, const TensorMap* tensor_map, const void* memory, At... corner)
      : block(self().block), bytes(2), at{corner...} {
    interrupt();
    memcpy(&map, tensor_map->opaque, sizeof map);
    if (map.magic != BoxMap::kMagic) fail(what, ": not a tensor map");
    if (map.rank != int(sizeof...(At)))
      fail(what, ": ", sizeof...(At), " coordinates, the map has ", map.rank, " dimensions");
    for (uint32_t side : map.box) bytes *= int(side);
    // The pattern of the swizzle repeats every 1024 bytes; a box of whole repetitions starts there.
    shared = shared_offset(what, memory, bytes, bytes % 1024 == 0 ? 1024 : 128);
    block->proxies.note(current->thread);
    check_fenced(what, shared, bytes);
  }

  // Calls move(shared, global or null) for each number.
  template <class Move>
  void for_each(const Move& move) const {
    for (int row = 0; row < bytes / 128; ++row) {
      bool inside = true;
      uint8_t* start = map.data;
      for (int d = 1, rest = row; d < 5; rest /= int(map.box[d++])) {
        const int64_t i = at[d] + rest % int(map.box[d]);
        inside = inside && i >= 0 && i < int64_t(map.sizes[d]);
        start += i * int64_t(map.strides[d]);
      }
      for (int n = 0; n < 64; ++n) {
        const int64_t i = at[0] + n;
        const bool in_row = inside && i >= 0 && i < int64_t(map.sizes[0]);
        move(block->shared + swizzle(shared + uint32_t(row * 128 + n * 2)),
             in_row ? start + 2 * i : nullptr);
      }
    }
  }
};

inline void prefetch_map(const TensorMap*) {}
inline void fence_async() { self().block->proxies.fence(current->thread); }

template <class... At>
void tma_load(void* to, const TensorMap* map, Barrier* barrier, At... at) {
  const BoxCopy copy("tma_load", map, to, at...);
  const uint32_t offset = barrier_offset("tma_load", barrier);
  Machine& machine = *current->machine;
  if (const auto& inits = copy.block->unfenced_inits; !inits.empty())
    fail("tma_load: thread ", inits[0], " has run barrier_init and no barrier_init_fence");
  // Some take much longer than the others: those behind them come first.
  const uint32_t most = machine.random && machine.draw(8) == 0 ? 1 << 17 : 256;
  const uint64_t due = machine.step + (machine.random ? machine.draw(most) : 64);
  memset(to, kPoison, size_t(copy.bytes));
  copy.block->proxies.written(copy.shared, copy.bytes);
  const auto complete = [copy, offset] {
    copy.for_each([](uint8_t* shared, const uint8_t* global) {
      const uint8_t zeros[2] = {};
      memcpy(shared, global != nullptr ? global : zeros, 2);
    });
    copy.block->proxies.written(copy.shared, copy.bytes);
    // "complete-tx": all bytes of the box count, those outside of the tensor too.
    update_barrier("tma_load", *copy.block, offset, 0, -copy.bytes);
  };
  machine.loads.emplace(due, complete);
}
// Shared memory is read when a wait completes the group: what overwrites it before is seen.
inline void tma_store(const TensorMap* map, const void* from, int x, int y, int z) {
  const BoxCopy copy("tma_store", map, from, x, y, z);
  current->stores.add([copy] {
    copy.for_each([](const uint8_t* shared, uint8_t* global) {
      if (global != nullptr) memcpy(global, shared, 2);
    });
  });
}
inline void tma_store_commit() { self().stores.commit(); }
template <int Pending>
void tma_store_wait() {
  interrupt();
  self().stores.wait(Pending);
}

}  // namespace fastproto::cuda::emulator
