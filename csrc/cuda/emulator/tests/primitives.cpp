// SPDX-License-Identifier: Apache-2.0
// Small kernels, one for each primitive, for python_tests/op/cuda/test_emulator.py, which calls
// them by ctypes and compares with a plain formula. Each returns the error text of its launch.
#include <stdexcept>

#include "../../common/launch.h"
#include "../../common/math.cuh"

namespace fastproto::cuda {
namespace {

// ---------------------------------------------------------------- warps

struct MmaParams {
  const void *a, *b;  // [16][K], [K][8]
  float* c;           // [16][8]
  int repeat;
};

template <class T>
FP_KERNEL mma_kernel(FP_GRID_CONSTANT MmaParams p) {
  const int g = lane_index() / 4, i = lane_index() % 4;
  const uint16_t* a = static_cast<const uint16_t*>(p.a);
  const uint16_t* b = static_cast<const uint16_t*>(p.b);
  uint32_t as[4], bs[2];
  for (int r = 0; r < 4; ++r) {
    const uint16_t* pair = a + (g + r % 2 * 8) * 16 + 2 * i + r / 2 * 8;
    as[r] = pair[0] | uint32_t(pair[1]) << 16;
  }
  for (int r = 0; r < 2; ++r) {
    const uint16_t* pair = b + (2 * i + 8 * r) * 8 + g;
    bs[r] = pair[0] | uint32_t(pair[8]) << 16;
  }
  float c[4];
  for (int j = 0; j < 4; ++j) c[j] = p.c[(g + j / 2 * 8) * 8 + 2 * i + j % 2];
  for (int n = 0; n < p.repeat; ++n) mma_16816<T>(c, as, bs[0], bs[1]);
  for (int j = 0; j < 4; ++j) p.c[(g + j / 2 * 8) * 8 + 2 * i + j % 2] = c[j];
}

FP_KERNEL mma_tf32_kernel(FP_GRID_CONSTANT MmaParams p) {
  const int g = lane_index() / 4, i = lane_index() % 4;
  const float* a = static_cast<const float*>(p.a);
  const float* b = static_cast<const float*>(p.b);
  float as[4], bs[2], c[4];
  for (int r = 0; r < 4; ++r) as[r] = a[(g + r % 2 * 8) * 8 + i + r / 2 * 4];
  for (int r = 0; r < 2; ++r) bs[r] = b[(i + 4 * r) * 8 + g];
  for (int j = 0; j < 4; ++j) c[j] = p.c[(g + j / 2 * 8) * 8 + 2 * i + j % 2];
  mma_1688_tf32(c, as, bs[0], bs[1]);
  for (int j = 0; j < 4; ++j) p.c[(g + j / 2 * 8) * 8 + 2 * i + j % 2] = c[j];
}

struct MatrixParams {
  const uint16_t* from;  // [4][8][8]
  uint32_t* registers;   // [32][4]
  uint16_t* to;          // [4][8][8], stored back
};

template <bool Transpose>
FP_KERNEL matrix_kernel(FP_GRID_CONSTANT MatrixParams p) {
  uint16_t* memory = reinterpret_cast<uint16_t*>(shared_memory());
  const int lane = lane_index();
  for (int i = 0; i < 8; ++i) memory[lane * 8 + i] = p.from[lane * 8 + i];
  sync_warp();
  uint32_t r[4];
  load_matrix<Transpose>(r, memory + lane * 8);
  for (int i = 0; i < 4; ++i) p.registers[lane * 4 + i] = r[i];
  store_matrix<Transpose>(memory + 256 + lane * 8, r);
  sync_warp();
  for (int i = 0; i < 8; ++i) p.to[lane * 8 + i] = memory[256 + lane * 8 + i];
}

struct ShuffleParams {
  float* sums;  // [32] by shuffle_xor
  int* first;   // [32] from lane 5
  uint32_t* votes;
};

FP_KERNEL shuffle_kernel(FP_GRID_CONSTANT ShuffleParams p) {
  const int lane = lane_index();
  float x = float(lane);
  for (int step = 16; step > 0; step /= 2) x += shuffle_xor(x, step);
  p.sums[lane] = x + shuffle(float(lane), 7);
  p.first[lane] = shuffle(100 + lane, 5);
  p.votes[lane] = ballot(lane % 3 == 0);
}

// ---------------------------------------------------------------- copies, barriers

struct CopyParams {
  const float* from;  // [threads][4]
  float* early;       // [threads][4] before the wait
  float* late;        // after it
  int valid;
};

FP_KERNEL copy_kernel(FP_GRID_CONSTANT CopyParams p) {
  float* mine = reinterpret_cast<float*>(shared_memory()) + thread_index() * 8;
  const float* from = p.from + thread_index() * 4;
  for (int i = 0; i < 4; ++i) mine[i] = mine[i + 4] = 0;
  copy_async_16(mine, from, p.valid);
  copy_async_commit();
  copy_async_16(mine + 4, from, 16);
  copy_async_commit();
  for (int i = 0; i < 4; ++i) p.early[thread_index() * 4 + i] = mine[i];
  copy_async_wait<1>();
  for (int i = 0; i < 4; ++i) p.late[thread_index() * 4 + i] = mine[i];
  // The second group is under way.
  for (int i = 0; i < 4; ++i)
    if (mine[i + 4] == mine[i + 4]) p.late[thread_index() * 4 + i] = -1;
  copy_async_wait<0>();
  for (int i = 0; i < 4; ++i)
    if (mine[i + 4] != from[i]) p.late[thread_index() * 4 + i] = -2;
}

// Warp 0 gives numbers to the others, `rounds` times, through one place for each thread.
struct PassParams {
  float* sums;  // [threads]
  int rounds;
  int broken;  // 1: the reader does not wait; 2: the writer does not; 3: a number of threads is
               // wrong
};

FP_KERNEL pass_kernel(FP_GRID_CONSTANT PassParams p) {
  float* memory = reinterpret_cast<float*>(shared_memory());
  const int lane = lane_index(), readers = 96;
  constexpr int kFull = 1, kEmpty = 2;
  if (warp_index() == 0) {
    for (int round = 0; round < p.rounds; ++round) {
      if (p.broken != 2) sync_some(kEmpty, 32 + readers);
      for (int i = lane; i < readers; i += 32) memory[i] = float(round + i);
      arrive_some(kFull, 32 + readers);
    }
    if (p.broken == 2) sync_some(kEmpty, 32 + readers);
  } else {
    float sum = 0;
    arrive_some(kEmpty, p.broken == 3 ? 160 : 32 + readers);
    for (int round = 0; round < p.rounds; ++round) {
      if (p.broken == 1)
        arrive_some(kFull, 32 + readers);
      else
        sync_some(kFull, 32 + readers);
      sum += memory[thread_index() - 32];
      if (p.broken != 2 && round + 1 < p.rounds) arrive_some(kEmpty, 32 + readers);
    }
    p.sums[thread_index()] = sum;
  }
}

// Every thread adds up what all wrote before a barrier.
struct BlockParams {
  int* sums;  // [blocks][threads]
  int skip;   // the barrier
};

FP_KERNEL block_kernel(FP_GRID_CONSTANT BlockParams p) {
  int* memory = reinterpret_cast<int*>(shared_memory());
  if (thread_index() >= 64) return;  // threads that ended are not waited for
  memory[thread_index()] = thread_index() + block_index();
  if (p.skip == 0) sync_block();
  int sum = 0;
  for (int i = 0; i < 64; ++i) sum += memory[i];
  p.sums[block_index() * 64 + thread_index()] = sum;
}

// ---------------------------------------------------------------- misuse

struct MisuseParams {
  const char* kind;
  const void* global;
};

constexpr int kMisuseBytes = 32768;

FP_KERNEL misuse_kernel(FP_GRID_CONSTANT MisuseParams p) {
  uint8_t* memory = shared_memory();
  const int lane = lane_index();
  const auto is = [&p](const char* kind) { return strcmp(p.kind, kind) == 0; };
  uint32_t r[4] = {};
  float c[64] = {}, few[32] = {};
  if (is("operations")) {
    if (lane == 3)
      ballot(true);
    else
      shuffle(1.0f, 0);
  } else if (is("lane missing")) {
    if (lane != 3) sync_warp();
  } else if (is("ldmatrix alignment")) {
    load_matrix<false>(r, memory + 8);
  } else if (is("ldmatrix outside")) {
    load_matrix<false>(r, memory + kMisuseBytes);
  } else if (is("copy alignment")) {
    copy_async_16(memory + 4, p.global, 16);
  } else if (is("copy from")) {
    copy_async_16(memory, static_cast<const char*>(p.global) + 4, 16);
  } else if (is("load alignment")) {
    load_global_16(static_cast<const char*>(p.global) + 8);
  } else if (is("past the end")) {
    memory[kMisuseBytes + 17] = 1;
  } else if (is("before the start")) {
    memory[-1] = 1;
  } else if (is("barrier id")) {
    sync_some(16, 32);
  } else if (is("no init")) {
    barrier_wait(reinterpret_cast<Barrier*>(memory), 0);
  } else if (is("arrivals")) {
    Barrier* barrier = reinterpret_cast<Barrier*>(memory);
    if (thread_index() == 0) {
      barrier_init(barrier, 1);
      barrier_arrive_expect(barrier, 64);
      barrier_arrive(barrier);
    }
  } else if (is("barrier")) {
    Barrier* barrier = reinterpret_cast<Barrier*>(memory);
    if (thread_index() == 0) {
      barrier_init(barrier, 2);
      barrier_arrive(barrier);
    }
    sync_block();
    barrier_wait(barrier, 0);
  } else if (is("wgmma begin")) {
    Wgmma<bf16, 128, false, false>::run(c, matrix_descriptor(memory, 0, 1024),
                                        matrix_descriptor(memory, 0, 1024), 0);
  } else if (is("wgmma start")) {
    wgmma_begin();
    Wgmma<bf16, 128, false, true>::run(c, matrix_descriptor(memory, 0, 1024),
                                       matrix_descriptor(memory + 128, 1024, 1024), 0);
  } else if (is("wgmma touched")) {
    wgmma_begin();
    for (int i = 0; i < 2; ++i) {
      Wgmma<bf16, 128, false, false>::run(c, r, matrix_descriptor(memory, 0, 1024), 0);
      c[1] = 0;
    }
  } else if (is("wgmma no begin")) {
    wgmma_begin();
    for (int i = 0; i < 2; ++i) {
      Wgmma<bf16, 128, false, false>::run(c, r, matrix_descriptor(memory, 0, 1024), 0);
      wgmma_commit();
      wgmma_wait<0>();
      c[1] = 0;
    }
  } else if (is("wgmma no wait")) {
    wgmma_begin();
    Wgmma<bf16, 128, false, false>::run(c, r, matrix_descriptor(memory, 0, 1024), 0);
    wgmma_commit();
  } else if (is("wgmma warps")) {
    wgmma_begin();
    Wgmma<bf16, 128, false, false>::run(c, r, matrix_descriptor(memory, 0, 1024),
                                        warp_index() == 2);
    wgmma_commit();
    wgmma_wait<0>();
  } else if (is("fence missing") || is("fence of another") || is("fence")) {
    memory[thread_index() * 64] = 1;
    if (is("fence")) fence_async();
    sync_block();
    if (is("fence of another") && thread_index() == 5) fence_async();
    wgmma_begin();
    Wgmma<bf16, 64, false, false>::run(few, r, matrix_descriptor(memory, 0, 1024), 0);
    wgmma_commit();
    wgmma_wait<0>();
  } else if (is("exception")) {
    throw std::runtime_error("thrown");
  }
}

// ---------------------------------------------------------------- TMA

struct TmaParams {
  TensorMap map;
  int rank, bytes, announced;
  int at[5];
  uint8_t* early;  // the box's shared memory before the barrier
  uint8_t* late;   // and after
};

FP_KERNEL tma_load_kernel(FP_GRID_CONSTANT TmaParams p) {
  uint8_t* memory = shared_memory();
  Barrier* barrier = reinterpret_cast<Barrier*>(memory + p.bytes);
  const int* at = p.at;
  if (thread_index() == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
  }
  sync_block();
  if (thread_index() == 0) {
    prefetch_map(&p.map);
    barrier_arrive_expect(barrier, p.announced);
    if (p.rank == 2) tma_load(memory, &p.map, barrier, at[0], at[1]);
    if (p.rank == 3) tma_load(memory, &p.map, barrier, at[0], at[1], at[2]);
    if (p.rank == 4) tma_load(memory, &p.map, barrier, at[0], at[1], at[2], at[3]);
    if (p.rank == 5) tma_load(memory, &p.map, barrier, at[0], at[1], at[2], at[3], at[4]);
    memcpy(p.early, memory, size_t(p.bytes));
  }
  barrier_wait(barrier, 0);
  if (thread_index() == 0) memcpy(p.late, memory, size_t(p.bytes));
}

struct TmaStoreParams {
  TensorMap map;
  const uint8_t* from;  // the box as it lies in shared memory
  int bytes;
  int at[3];
  int early;  // 1: overwrites it before the wait; 2: does not wait; 3: no fence
};

FP_KERNEL tma_store_kernel(FP_GRID_CONSTANT TmaStoreParams p) {
  uint8_t* memory = shared_memory();
  for (int i = thread_index(); i < p.bytes; i += 32) memory[i] = p.from[i];
  if (p.early != 3) fence_async();
  sync_warp();
  if (thread_index() == 0) {
    tma_store(&p.map, memory, p.at[0], p.at[1], p.at[2]);
    tma_store_commit();
    if (p.early == 1) memset(memory, 0, size_t(p.bytes));
    if (p.early != 2) tma_store_wait<0>();
    memset(memory, 0, size_t(p.bytes));
  }
}

// A ring of stages: one warp loads, the others read, twice around and more.
struct RingParams {
  TensorMap map;  // [tiles * 8][64]
  int tiles;
  float* sums;  // [64] of each column
  int broken;   // 1: the readers do not wait for the bytes; 2: the writer not for the readers
};

FP_KERNEL ring_kernel(FP_GRID_CONSTANT RingParams p) {
  constexpr int kStages = 2, kTile = 1024, kReaders = 64;
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
    if (lane_index() == 0) {
      for (int tile = 0; tile < p.tiles; ++tile) {
        const int stage = tile % kStages, round = tile / kStages;
        if (p.broken != 2) barrier_wait(empty + stage, (round + 1) % 2);
        barrier_arrive_expect(full + stage, kTile);
        tma_load(memory + stage * kTile, &p.map, full + stage, 0, tile * 8);
        if (p.broken == 2) barrier_wait(full + stage, round % 2);
      }
    }
    return;
  }
  float sum = 0;
  const int column = thread_index();
  for (int tile = 0; tile < p.tiles; ++tile) {
    const int stage = tile % kStages, round = tile / kStages;
    if (p.broken != 1) barrier_wait(full + stage, round % 2);
    for (int row = 0; row < 8; ++row) {
      const uint8_t* x = memory + stage * kTile + row * 128 + ((column / 8) ^ row) * 16;
      bf16 value;
      memcpy(&value, x + column % 8 * 2, 2);
      sum += to_float(value);
    }
    barrier_arrive(empty + stage);
  }
  if (p.broken == 1 && thread_index() == 0)
    for (int s = 0; s < kStages; ++s) barrier_wait(full + s, (p.tiles / kStages - 1) % 2);
  p.sums[column] = sum;
}

// ---------------------------------------------------------------- WGMMA

struct WgmmaParams {
  TensorMap a, b;  // boxes of 64 numbers times all rows
  float* c;        // [64][columns]
  int depth;       // a multiple of 64
  int early;       // before the wait: 1 overwrites b, 2 reads c
};

template <class T, int Columns, bool TransposeA, bool TransposeB, bool Registers>
FP_KERNEL wgmma_kernel(FP_GRID_CONSTANT WgmmaParams p) {
  uint8_t* memory = shared_memory();
  // K-major: pieces of 64 along K, [rows][64] each. MN-major: pieces of 64 along M (N), [K][64].
  const int a_bytes = 64 * p.depth * 2, b_bytes = Columns * p.depth * 2;
  uint8_t* a = memory;
  uint8_t* b = memory + a_bytes;
  Barrier* barrier = reinterpret_cast<Barrier*>(b + b_bytes);
  const int warp = warp_index(), g = lane_index() / 4, i = lane_index() % 4;
  if (thread_index() == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
  }
  sync_block();
  if (thread_index() == 0) {
    barrier_arrive_expect(barrier, a_bytes + b_bytes);
    const int a_pieces = TransposeA ? 1 : p.depth / 64;
    const int b_pieces = TransposeB ? Columns / 64 : p.depth / 64;
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
    const uint8_t* a_start = TransposeA ? a + k * 128 : a + k / 64 * (64 * 128) + k % 64 * 2;
    const uint8_t* b_start = TransposeB ? b + k * 128 : b + k / 64 * (Columns * 128) + k % 64 * 2;
    const uint64_t bs = matrix_descriptor(b_start, p.depth * 128, 1024);
    if constexpr (Registers) {
      uint32_t as[4];
      for (int r = 0; r < 4; ++r) {
        uint32_t pair[2];
        for (int j = 0; j < 2; ++j) {
          const int row = warp * 16 + g + r % 2 * 8, column = k % 64 + 2 * i + r / 2 * 8 + j;
          const int at = k / 64 * (64 * 128) + row * 128 + (column / 8 ^ row % 8) * 16;
          uint16_t bits;
          memcpy(&bits, a + at + column % 8 * 2, 2);
          pair[j] = bits;
        }
        as[r] = pair[0] | pair[1] << 16;
      }
      Wgmma<T, Columns, false, TransposeB>::run(c, as, bs, k > 0);
    } else {
      const uint64_t as = matrix_descriptor(a_start, 0, 1024);
      Wgmma<T, Columns, TransposeA, TransposeB>::run(c, as, bs, k > 0);
    }
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

template <class T, int Columns>
const char* wgmma(bool transpose_a, bool transpose_b, bool registers, const WgmmaParams& p) {
  const Grid grid{1, 128, (64 + Columns) * p.depth * 2 + 16};
  if (registers)
    return transpose_b ? launch<&wgmma_kernel<T, Columns, false, true, true>>(grid, p)
                       : launch<&wgmma_kernel<T, Columns, false, false, true>>(grid, p);
  if (transpose_a)
    return transpose_b ? launch<&wgmma_kernel<T, Columns, true, true, false>>(grid, p)
                       : launch<&wgmma_kernel<T, Columns, true, false, false>>(grid, p);
  return transpose_b ? launch<&wgmma_kernel<T, Columns, false, true, false>>(grid, p)
                     : launch<&wgmma_kernel<T, Columns, false, false, false>>(grid, p);
}

// ---------------------------------------------------------------- clusters

struct ClusterParams {
  int* sums;  // [blocks]
  int* pulled;
  int broken;  // no barrier: 1 before reading, 2 before the end, 3 before the first access
};

FP_KERNEL cluster_kernel(FP_GRID_CONSTANT ClusterParams p) {
  constexpr int kRanks = 4;
  uint32_t* inbox = reinterpret_cast<uint32_t*>(shared_memory());
  const int rank = cluster_rank();
  if (p.broken != 3) sync_cluster();  // all have started
  if (thread_index() < kRanks)
    store_peer(peer_address(inbox + rank, thread_index()), uint32_t(block_index() + 1));
  if (thread_index() == 0) {
    const uint32_t x = uint32_t(rank);
    Vector16 v{{x, x + 1, x + 2, x + 3}};
    store_peer(peer_address(inbox + 4 + 4 * rank, (rank + 1) % kRanks), v);
  }
  if (p.broken != 1) sync_cluster();
  if (thread_index() == 0) {
    int sum = 0;
    for (int i = 0; i < kRanks; ++i) sum += int(inbox[i]);
    p.sums[block_index()] = sum;
    const int writer = (rank + kRanks - 1) % kRanks;  // wrote its row here
    const int next = (rank + 1) % kRanks;             // and holds the row that this rank wrote
    p.pulled[block_index()] =
        int(load_peer(peer_address(inbox + 4 + 4 * rank, next))) +
        10 * int(inbox[4 + 4 * writer + 3]) +
        100 * int(load_peer_16(peer_address(inbox + 4 + 4 * rank, next)).x[1]);
  }
  if (p.broken != 2) sync_cluster();
}

}  // namespace
}  // namespace fastproto::cuda

using namespace fastproto::cuda;

extern "C" {

void set_seed(int64_t seed) { emulator::set_seed(seed); }
void set_proxies(int setting) { emulator::set_proxies(setting); }

const char* mma(int type, const void* a, const void* b, float* c, int warps, int repeat) {
  const MmaParams p{a, b, c, repeat};
  const Grid grid{1, 32 * warps, 0};
  return type == 0   ? launch<&mma_kernel<bf16>>(grid, p)
         : type == 1 ? launch<&mma_kernel<half>>(grid, p)
                     : launch<&mma_tf32_kernel>(grid, p);
}
const char* matrices(int transpose, const uint16_t* from, uint32_t* registers, uint16_t* to) {
  const MatrixParams p{from, registers, to};
  const Grid grid{1, 32, 1024};
  return transpose != 0 ? launch<&matrix_kernel<true>>(grid, p)
                        : launch<&matrix_kernel<false>>(grid, p);
}
const char* shuffles(float* sums, int* first, uint32_t* votes) {
  return launch<&shuffle_kernel>(Grid{1, 32, 0}, ShuffleParams{sums, first, votes});
}
const char* copies(const float* from, float* early, float* late, int valid) {
  return launch<&copy_kernel>(Grid{1, 64, 64 * 32}, CopyParams{from, early, late, valid});
}
const char* pass(float* sums, int rounds, int broken) {
  return launch<&pass_kernel>(Grid{1, 128, 384}, PassParams{sums, rounds, broken});
}
const char* block_sum(int* sums, int blocks, int skip) {
  return launch<&block_kernel>(Grid{blocks, 128, 256}, BlockParams{sums, skip});
}
const char* misuse(const char* kind, const void* global) {
  return launch<&misuse_kernel>(Grid{1, 128, kMisuseBytes}, MisuseParams{kind, global});
}
const char* shape(int blocks, int threads, int cluster, int shared_bytes) {
  int sums[64];
  return launch<&block_kernel>(Grid{blocks, threads, shared_bytes, cluster}, BlockParams{sums, 0});
}
const char* load_box(int rank, const void* data, const uint64_t* sizes, const uint64_t* strides,
                     const uint32_t* box, const int* at, int announced, uint8_t* early,
                     uint8_t* late) {
  TmaParams p = {};
  const char* error = make_tensor_map(&p.map, MapType::kFloat16, rank, data, sizes, strides, box);
  if (error != nullptr) return error;
  p.rank = rank;
  p.bytes = 2;
  for (int d = 0; d < rank; ++d) {
    p.at[d] = at[d];
    p.bytes *= int(box[d]);
  }
  p.announced = announced;
  p.early = early;
  p.late = late;
  return launch<&tma_load_kernel>(Grid{1, 64, p.bytes + 8}, p);
}
const char* store_box(void* data, const uint64_t* sizes, const uint64_t* strides,
                      const uint32_t* box, const int* at, const uint8_t* from, int early) {
  TmaStoreParams p = {};
  const char* error = make_tensor_map(&p.map, MapType::kFloat16, 3, data, sizes, strides, box);
  if (error != nullptr) return error;
  p.from = from;
  p.bytes = 2;
  for (int d = 0; d < 3; ++d) {
    p.at[d] = at[d];
    p.bytes *= int(box[d]);
  }
  p.early = early;
  return launch<&tma_store_kernel>(Grid{1, 32, p.bytes}, p);
}
const char* ring(const void* data, int tiles, float* sums, int broken) {
  RingParams p = {};
  const uint64_t sizes[2] = {64, uint64_t(tiles) * 8}, strides[1] = {128};
  const uint32_t box[2] = {64, 8};
  const char* error = make_tensor_map(&p.map, MapType::kBFloat16, 2, data, sizes, strides, box);
  if (error != nullptr) return error;
  p.tiles = tiles;
  p.sums = sums;
  p.broken = broken;
  return launch<&ring_kernel>(Grid{1, 96, 2 * 1024 + 64}, p);
}
// a: [64][depth], or transposed; b: [columns][depth], or (N-major) [depth][columns].
const char* wgmma_product(int is_half, int columns, int transpose_a, int transpose_b, int registers,
                          const void* a, const void* b, float* c, int depth, int early) {
  WgmmaParams p = {};
  p.c = c;
  p.depth = depth;
  p.early = early;
  const auto make = [depth](TensorMap* map, const void* data, int mn, int transpose) {
    const uint64_t sizes[2] = {uint64_t(transpose ? mn : depth), uint64_t(transpose ? depth : mn)};
    const uint64_t strides[1] = {sizes[0] * 2};
    const uint32_t box[2] = {64, uint32_t(sizes[1])};
    return make_tensor_map(map, MapType::kBFloat16, 2, data, sizes, strides, box);
  };
  const char* error = make(&p.a, a, 64, transpose_a);
  if (error == nullptr) error = make(&p.b, b, columns, transpose_b);
  if (error != nullptr) return error;
  const bool ta = transpose_a != 0, tb = transpose_b != 0, rs = registers != 0;
  if (is_half != 0)
    return columns == 64    ? wgmma<half, 64>(ta, tb, rs, p)
           : columns == 128 ? wgmma<half, 128>(ta, tb, rs, p)
                            : wgmma<half, 256>(ta, tb, rs, p);
  return columns == 64    ? wgmma<bf16, 64>(ta, tb, rs, p)
         : columns == 128 ? wgmma<bf16, 128>(ta, tb, rs, p)
                          : wgmma<bf16, 256>(ta, tb, rs, p);
}
const char* clusters(int* sums, int* pulled, int blocks, int broken) {
  return launch<&cluster_kernel>(Grid{blocks, 64, 80, 4}, ClusterParams{sums, pulled, broken});
}

// Numbers, outside of any grid.
const char* from_floats(int type, const float* from, uint16_t* to, int count) {
  for (int i = 0; i < count; ++i)
    to[i] = type == 0 ? from_float<bf16>(from[i]).bits : from_float<half>(from[i]).bits;
  return nullptr;
}
const char* to_floats(int type, const uint16_t* from, float* to, int count) {
  for (int i = 0; i < count; ++i)
    to[i] = type == 0 ? to_float(bf16{from[i]}) : to_float(half{from[i]});
  return nullptr;
}
const char* numbers(int function, const float* from, float* to, int count) {
  for (int i = 0; i < count; ++i)
    to[i] = function == 0   ? to_tf32(from[i])
            : function == 1 ? exp2_fast(from[i])
                            : log2_fast(from[i]);
  return nullptr;
}

}  // extern "C"
