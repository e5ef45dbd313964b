// SPDX-License-Identifier: Apache-2.0
// A small kernel for each primitive of the emulated GPU, for test_emulator.py, which calls them by
// ctypes and compares with a plain formula. Each returns the error text of its launch.
#include <stdexcept>

#include "../../../csrc/cuda/common/platform.h"

using namespace fastproto::cuda;

extern "C" {

// ---------------------------------------------------------------- warps, copies, barriers

// from, to: [4][8][8], loaded and stored back; registers: [32][4].
const char* matrices(int transpose, const uint16_t* from, uint32_t* registers, uint16_t* to) {
  return run(1, 32, 1, 1024, [=] {
    uint16_t* row = reinterpret_cast<uint16_t*>(shared_memory()) + lane_index() * 8;
    memcpy(row, from + lane_index() * 8, 16);
    sync_warp();
    uint32_t r[4];
    transpose ? load_matrix<true>(r, row) : load_matrix<false>(r, row);
    memcpy(registers + lane_index() * 4, r, 16);
    transpose ? store_matrix<true>(row + 256, r) : store_matrix<false>(row + 256, r);
    sync_warp();
    memcpy(to + lane_index() * 8, row + 256, 16);
  });
}
const char* shuffles(float* sums, int* first, uint32_t* votes) {
  return run(1, 32, 1, 0, [=] {
    const int lane = lane_index();
    float x = float(lane);
    for (int step = 16; step > 0; step /= 2) x += shuffle_xor(x, step);
    sums[lane] = x + shuffle(float(lane), 7);
    first[lane] = shuffle(100 + lane, 5);
    votes[lane] = ballot(lane % 3 == 0);
  });
}
// from, early (before the wait), late (after it): [64][4].
const char* copies(const float* from, float* early, float* late, int valid) {
  return run(1, 64, 1, 64 * 32, [=] {
    const int at = thread_index() * 4;
    float* mine = reinterpret_cast<float*>(shared_memory()) + 2 * at;
    memset(mine, 0, 32);
    copy_async_16(mine, from + at, valid);
    copy_async_commit();
    copy_async_16(mine + 4, from + at, 16);
    copy_async_commit();
    memcpy(early + at, mine, 16);
    copy_async_wait<1>();
    memcpy(late + at, mine, 16);
    for (int i = 4; i < 8; ++i)  // the second group is under way
      if (mine[i] == mine[i]) late[at] = -1;
    copy_async_wait<0>();
    if (memcmp(mine + 4, from + at, 16) != 0) late[at] = -2;
  });
}
// Warp 0 gives numbers to the others, `rounds` times, through one place for each thread. Broken, 1:
// the reader does not wait; 2: the writer does not; 3: a number of threads is wrong.
const char* pass(float* sums, int rounds, int broken) {
  return run(1, 128, 1, 384, [=] {
    float* memory = reinterpret_cast<float*>(shared_memory());
    constexpr int kFull = 1, kEmpty = 2, kReaders = 96, kAll = 128;
    if (warp_index() == 0) {
      for (int round = 0; round < rounds; ++round) {
        if (broken != 2) sync_some(kEmpty, kAll);
        for (int i = lane_index(); i < kReaders; i += 32) memory[i] = float(round + i);
        arrive_some(kFull, kAll);
      }
      if (broken == 2) sync_some(kEmpty, kAll);
      return;
    }
    float sum = 0;
    arrive_some(kEmpty, broken == 3 ? 160 : kAll);
    for (int round = 0; round < rounds; ++round) {
      broken == 1 ? arrive_some(kFull, kAll) : sync_some(kFull, kAll);
      sum += memory[thread_index() - 32];
      if (broken != 2 && round + 1 < rounds) arrive_some(kEmpty, kAll);
    }
    sums[thread_index()] = sum;
  });
}
// Every thread adds up what all wrote before a barrier (or, where that is skipped, no barrier).
const char* block_sum(int* sums, int blocks, int threads, int cluster, int shared, int skip) {
  return run(blocks, threads, cluster, shared, [=] {
    int* memory = reinterpret_cast<int*>(shared_memory());
    if (thread_index() >= 64) return;  // threads that ended are not waited for
    memory[thread_index()] = thread_index() + block_index();
    if (skip == 0) sync_block();
    int sum = 0;
    for (int i = 0; i < 64; ++i) sum += memory[i];
    sums[block_index() * 64 + thread_index()] = sum;
  });
}
// Clusters of four: everybody writes to everybody. Broken: no barrier, 1 before reading, 2 before
// the end, 3 before the first access.
const char* clusters(int* sums, int blocks, int broken) {  // [2][blocks]
  return run(blocks, 64, 4, 80, [=] {
    constexpr int kRanks = 4;
    uint32_t* inbox = reinterpret_cast<uint32_t*>(shared_memory());
    const int rank = cluster_rank();
    uint32_t* row = inbox + 4 + 4 * rank;  // which the next rank holds
    const int next = (rank + 1) % kRanks, writer = (rank + kRanks - 1) % kRanks;
    if (broken != 3) sync_cluster();  // all have started
    if (thread_index() < kRanks)
      store_peer(peer_address(inbox + rank, thread_index()), uint32_t(block_index() + 1));
    if (thread_index() == 0) {
      const uint32_t x = uint32_t(rank);
      store_peer(peer_address(row, next), Vector16{{x, x + 1, x + 2, x + 3}});
    }
    if (broken != 1) sync_cluster();
    if (thread_index() == 0) {
      sums[block_index()] = int(inbox[0] + inbox[1] + inbox[2] + inbox[3]);
      sums[blocks + block_index()] = int(load_peer(peer_address(row, next))) +
                                     10 * int(inbox[4 + 4 * writer + 3]) +
                                     100 * int(load_peer_16(peer_address(row, next)).x[1]);
    }
    if (broken != 2) sync_cluster();
  });
}

// ---------------------------------------------------------------- TMA

// early, late: the box's shared memory before the barrier and after.
const char* load_box(int rank, const void* data, const uint64_t* sizes, const uint64_t* strides,
                     const uint32_t* box, const int* at, int announced, uint8_t* early,
                     uint8_t* late) {
  TensorMap map;
  const char* error = make_tensor_map(&map, MapType::kFloat16, rank, data, sizes, strides, box);
  if (error != nullptr) return error;
  int bytes = 2;
  for (int d = 0; d < rank; ++d) bytes *= int(box[d]);
  return run(1, 64, 1, bytes + 8, [=] {
    uint8_t* memory = shared_memory();
    Barrier* barrier = reinterpret_cast<Barrier*>(memory + bytes);
    if (thread_index() == 0) {
      barrier_init(barrier, 1);
      barrier_init_fence();
    }
    sync_block();
    if (thread_index() == 0) {
      prefetch_map(&map);
      barrier_arrive_expect(barrier, announced);
      if (rank == 2) tma_load(memory, &map, barrier, at[0], at[1]);
      if (rank == 3) tma_load(memory, &map, barrier, at[0], at[1], at[2]);
      if (rank == 4) tma_load(memory, &map, barrier, at[0], at[1], at[2], at[3]);
      if (rank == 5) tma_load(memory, &map, barrier, at[0], at[1], at[2], at[3], at[4]);
      memcpy(early, memory, size_t(bytes));
    }
    barrier_wait(barrier, 0);
    if (thread_index() == 0) memcpy(late, memory, size_t(bytes));
  });
}
// from: the box as it lies in shared memory. Broken, 1: overwrites it before the wait; 2: does not
// wait; 3: no fence.
const char* store_box(void* data, const uint64_t* sizes, const uint64_t* strides,
                      const uint32_t* box, const int* at, const uint8_t* from, int broken) {
  TensorMap map;
  const char* error = make_tensor_map(&map, MapType::kFloat16, 3, data, sizes, strides, box);
  if (error != nullptr) return error;
  const int bytes = int(2 * box[0] * box[1] * box[2]);
  return run(1, 32, 1, bytes, [=] {
    uint8_t* memory = shared_memory();
    for (int i = thread_index(); i < bytes; i += 32) memory[i] = from[i];
    if (broken != 3) fence_async();
    sync_warp();
    if (thread_index() != 0) return;
    tma_store(&map, memory, at[0], at[1], at[2]);
    tma_store_commit();
    if (broken == 1) memset(memory, 0, size_t(bytes));
    if (broken != 2) tma_store_wait<0>();
    memset(memory, 0, size_t(bytes));
  });
}
// A ring of stages: one warp loads [tiles * 8][64], the others add up columns, twice around and
// more. Broken, 1: the readers do not wait for the bytes; 2: the writer not for the readers.
const char* ring(float* sums, const void* data, int tiles, int broken) {
  constexpr int kStages = 2, kTile = 1024, kReaders = 64;
  TensorMap map;
  const uint64_t sizes[2] = {64, uint64_t(tiles) * 8}, strides[1] = {128};
  const uint32_t box[2] = {64, 8};
  const char* error = make_tensor_map(&map, MapType::kBFloat16, 2, data, sizes, strides, box);
  if (error != nullptr) return error;
  return run(1, 96, 1, kStages * kTile + 64, [=] {
    uint8_t* memory = shared_memory();
    Barrier* full = reinterpret_cast<Barrier*>(memory + kStages * kTile);
    Barrier* empty = full + kStages;
    if (thread_index() == 0) {
      for (int s = 0; s < kStages; ++s) {
        barrier_init(full + s, 1);
        barrier_init(empty + s, kReaders);
      }
      barrier_init_fence();
    }
    sync_block();
    if (warp_index() == 2) {
      for (int tile = 0; lane_index() == 0 && tile < tiles; ++tile) {
        const int stage = tile % kStages, round = tile / kStages;
        if (broken != 2) barrier_wait(empty + stage, (round + 1) % 2);
        barrier_arrive_expect(full + stage, kTile);
        tma_load(memory + stage * kTile, &map, full + stage, 0, tile * 8);
        if (broken == 2) barrier_wait(full + stage, round % 2);
      }
      return;
    }
    float sum = 0;
    const int column = thread_index();
    for (int tile = 0; tile < tiles; ++tile) {
      const int stage = tile % kStages, round = tile / kStages;
      if (broken != 1) barrier_wait(full + stage, round % 2);
      for (int row = 0; row < 8; ++row) {
        bf16 value;
        memcpy(&value,
               memory + stage * kTile + row * 128 + ((column / 8) ^ row) * 16 + column % 8 * 2, 2);
        sum += to_float(value);
      }
      barrier_arrive(empty + stage);
    }
    if (broken == 1 && thread_index() == 0)
      for (int s = 0; s < kStages; ++s) barrier_wait(full + s, (tiles / kStages - 1) % 2);
    sums[column] = sum;
  });
}

// ---------------------------------------------------------------- misuse

const char* misuse(const char* kind, const char* global) {
  constexpr int kBytes = 32768;
  return run(1, 128, 1, kBytes, [=] {
    const auto is = [kind](const char* name) { return strcmp(kind, name) == 0; };
    const int lane = lane_index(), thread = thread_index();
    uint8_t* memory = shared_memory();
    Barrier* barrier = reinterpret_cast<Barrier*>(memory);
    uint32_t r[4] = {};
    if (is("operations")) lane == 3 ? void(ballot(true)) : void(shuffle(1.0f, 0));
    if (is("lane missing") && lane != 3) sync_warp();
    if (is("ldmatrix alignment")) load_matrix<false>(r, memory + 8);
    if (is("ldmatrix outside")) load_matrix<false>(r, memory + kBytes);
    if (is("copy alignment")) copy_async_16(memory + 4, global, 16);
    if (is("copy from")) copy_async_16(memory, global + 4, 16);
    if (is("load alignment")) load_global_16(global + 8);
    if (is("past the end")) memory[kBytes + 17] = 1;
    if (is("before the start")) memory[-1] = 1;
    if (is("barrier id")) sync_some(16, 32);
    if (is("exception")) throw std::runtime_error("thrown");
    if (is("no init")) barrier_wait(barrier, 0);
    if (is("arrivals") && thread == 0) {
      barrier_init(barrier, 1);
      barrier_arrive_expect(barrier, 64);
      barrier_arrive(barrier);
    }
    if (is("barrier")) {
      if (thread == 0) barrier_init(barrier, 2);
      if (thread == 0) barrier_arrive(barrier);
      sync_block();
      barrier_wait(barrier, 0);
    }

    const bool fence = strncmp(kind, "fence", 5) == 0;
    if (!fence && strncmp(kind, "wgmma", 5) != 0) return;
    if (fence) memory[thread * 64] = 1;
    if (is("fence")) fence_async();
    sync_block();
    if (is("fence of another") && thread == 5) fence_async();
    float c[64] = {};
    const uint64_t b = matrix_descriptor(memory, 0, 1024);
    const uint64_t shifted = matrix_descriptor(memory + 128, 1024, 1024);
    if (!is("wgmma begin")) wgmma_begin();
    if (is("wgmma start")) Wgmma<bf16, 128, false, true>::run(c, r, shifted, 0);
    Wgmma<bf16, 128, false, false>::run(c, r, b, is("wgmma warps") && warp_index() == 2);
    if (is("wgmma touched")) c[1] = 0;
    if (is("wgmma touched")) Wgmma<bf16, 128, false, false>::run(c, r, b, 0);
    wgmma_commit();
    if (is("wgmma no wait")) return;
    wgmma_wait<0>();
    if (is("wgmma no begin")) c[1] = 0;
    if (is("wgmma no begin")) Wgmma<bf16, 128, false, false>::run(c, r, b, 0);
  });
}

// ---------------------------------------------------------------- numbers, outside of any grid

const char* numbers(int function, const uint32_t* from, uint32_t* to, int count) {
  using Bits = uint32_t;
  Bits (*const functions[])(Bits) = {
      [](Bits x) { return float_to_bits(to_float(bf16{uint16_t(x)})); },
      [](Bits x) { return float_to_bits(to_float(half{uint16_t(x)})); },
      [](Bits x) { return Bits(from_float<bf16>(bits_to_float(x)).bits); },
      [](Bits x) { return Bits(from_float<half>(bits_to_float(x)).bits); },
      [](Bits x) { return float_to_bits(to_tf32(bits_to_float(x))); },
      [](Bits x) { return float_to_bits(exp2_fast(bits_to_float(x))); },
      [](Bits x) { return float_to_bits(log2_fast(bits_to_float(x))); },
  };
  for (int i = 0; i < count; ++i) to[i] = functions[function](from[i]);
  return nullptr;
}

}  // extern "C"
