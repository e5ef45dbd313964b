// SPDX-License-Identifier: Apache-2.0
// Runs a grid on the CPU, every thread of it as a fiber. One operating-system thread runs one
// cluster of blocks at a time; a fiber runs until it waits for something, then the next one of its
// warp does, and when none of them can, another warp. So a warp runs as far ahead of the others as
// the barriers let it: a missing barrier is a wrong result. With a seed the order is random instead
// (FASTPROTO_EMULATE_SEED in the environment, or set_seed), and so is when asynchronous copies
// happen.
//
// Shared memory starts as NaN (0xFF), and so does what an asynchronous copy will write.
#pragma once

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "fiber.h"
#include "proxies.h"

namespace fastproto::cuda::emulator {

constexpr int kWarpThreads = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarpThreads;
constexpr int kMaxCluster = 8;  // the portable bound
constexpr int kMaxSharedBytes = 227 << 10;
constexpr int kMarginBytes = 4096;  // around shared memory; nothing may write there
constexpr int kNamedBarriers = 16;
constexpr uint8_t kPoison = 0xFF;

// What a group of asynchronous operations of one thread consists of; `Operation` is in primitives.h
// or hopper.h. Oldest first.
template <class Operation>
class Groups {
 public:
  void add(const Operation& operation) { operations_.push_back(operation); }
  void commit() { ends_.push_back(operations_.size()); }
  bool empty() const { return operations_.empty(); }
  void clear() {
    operations_.clear();
    ends_.clear();
  }
  // Completes all groups but the latest `pending`.
  template <class Complete>
  void wait(int pending, const Complete& complete) {
    if (ends_.size() <= size_t(pending)) return;
    const size_t groups = ends_.size() - size_t(pending), end = ends_[groups - 1];
    for (size_t i = 0; i < end; ++i) complete(operations_[i]);
    operations_.erase(operations_.begin(), operations_.begin() + std::ptrdiff_t(end));
    ends_.erase(ends_.begin(), ends_.begin() + std::ptrdiff_t(groups));
    for (size_t& other : ends_) other -= end;
  }

 private:
  std::vector<Operation> operations_;
  std::vector<size_t> ends_;
};

struct CopyAsync {
  uint8_t* to;
  const uint8_t* from;
  int valid;
};

// A tensor map, as make_tensor_map packs it.
struct BoxMap {
  static constexpr uint32_t kMagic = 0x70616d74;
  uint32_t magic;
  int32_t rank;
  uint8_t* data;
  uint64_t sizes[5], strides[5];  // elements; bytes
  uint32_t box[5];
};

struct Block;

struct BoxCopy {
  BoxMap map;
  Block* block;
  uint32_t shared;   // offsets into the block's shared memory
  uint32_t barrier;  // loads only
  int64_t at[5];
  uint64_t due;  // the step from which on a load may happen
};

// Products of a warpgroup under way, as one of its warps sees them.
struct Accumulator {
  float* lanes[kWarpThreads];  // where each lane keeps its numbers
  int count;                   // of a lane
  std::vector<float> values;   // [lane][count]
  int products = 0;            // under way
  int64_t fence = -1;          // wgmma_begin's count when the last product ended
};
struct Product {
  int accumulator;
  int columns;
  bool is_half, a_in_registers, transpose_a, transpose_b, add;
  uint64_t a, b;  // descriptors
  uint32_t a_registers[kWarpThreads][4];
};

struct Warp;
struct Machine;

struct Lane {
  Context context;
  uint8_t* stack = nullptr;
  Machine* machine = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int thread = 0;  // of the block
  int lane = 0;    // of the warp
  bool ended = false;
  // What it waits for, while it does.
  const char* waits = nullptr;
  int detail[2] = {};
  Groups<CopyAsync> copies;
  Groups<BoxCopy> stores;
};

struct Warp {
  Block* block = nullptr;
  int index = 0;  // of the block
  Lane* lanes = nullptr;
  uint32_t runnable = 0;
  uint32_t alive = 0;
  // The operation of all lanes that some have come to.
  const char* operation = nullptr;
  int arrived = 0;
  void* arguments[kWarpThreads] = {};
  // wgmma
  int64_t fences = 0;
  size_t signatures = 0;
  std::vector<Accumulator> accumulators;
  Groups<Product> products;
};

// bar.sync, barrier.cluster: counts threads, always whole warps.
struct Meeting {
  int expected = 0;
  int arrived = 0;
  int completed = 0;
  std::vector<Warp*> waiting;

  void reset() {
    arrived = completed = 0;
    waiting.clear();
  }
};

struct Block {
  int index = 0;  // of the grid
  int rank = 0;   // of the cluster
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* shared = nullptr;
  int shared_bytes = 0;
  int threads = 0;
  int alive_threads = 0;
  Lane* lanes = nullptr;
  Warp* warps = nullptr;
  Meeting meetings[kNamedBarriers];
  std::vector<uint32_t> barriers;  // offsets of all initialised
  std::vector<Lane*> barrier_waiters;
  Proxies proxies;                  // started where they are checked
  std::vector<int> unfenced_inits;  // threads that have run barrier_init and no fence since
  // What the warps of each warpgroup multiplied, in order; all four must do the same.
  std::vector<std::string> products[kMaxWarps / 4];
};

inline std::atomic<int64_t>& seed_setting() {
  static std::atomic<int64_t> seed{-1};
  return seed;
}
// The order of the runs that follow: 0 the fixed one, above it a random one, below it what the
// environment says.
inline void set_seed(int64_t seed) { seed_setting().store(seed); }

inline std::atomic<int>& proxies_setting() {
  static std::atomic<int> setting{-1};
  return setting;
}
// Whether the runs that follow check proxies: 1 or 0; below it what the environment says.
inline void set_proxies(int setting) { proxies_setting().store(setting); }

// The thread that runs. Null outside of a grid.
inline thread_local Lane* current = nullptr;

struct Machine {
  Context host;
  std::unique_ptr<Lane[]> lanes;
  std::unique_ptr<Warp[]> warps;
  std::unique_ptr<Block[]> blocks;
  int lane_capacity = 0;
  int cluster = 0, threads = 0, grid = 0, warp_count = 0;
  Meeting cluster_meeting;
  uint64_t step = 0;
  uint64_t random_state = 0;  // 0: the fixed order
  bool checks_proxies = false;
  std::vector<BoxCopy> loads;
  std::string error;
  void (*body)(void*) = nullptr;
  void* body_data = nullptr;

  ~Machine() {
    for (int i = 0; i < lane_capacity; ++i)
      if (lanes[size_t(i)].stack != nullptr) free_stack(lanes[size_t(i)].stack);
  }

  bool random() const { return random_state != 0; }
  uint32_t draw(uint32_t below) {  // xorshift64*
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return uint32_t(((random_state * 0x2545f4914f6cdd1dull) >> 32) * below >> 32);
  }
};

#if defined(__GNUC__)
#define FP_EMULATOR_PRINTF __attribute__((format(printf, 1, 2)))
#else
#define FP_EMULATOR_PRINTF
#endif

inline std::string text_of(const char* format, va_list arguments) {
  char buffer[400];
  vsnprintf(buffer, sizeof buffer, format, arguments);
  return buffer;
}
FP_EMULATOR_PRINTF inline std::string text(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string result = text_of(format, arguments);
  va_end(arguments);
  return result;
}

// Ends the run: run() returns the text. The fibers are left as they are, nothing of them is
// destroyed.
[[noreturn]] FP_EMULATOR_PRINTF inline void fail(const char* format, ...) {
  Lane* lane = current;
  if (lane == nullptr) {
    fputs("fastproto: a function of the emulated GPU was called outside of a grid\n", stderr);
    abort();
  }
  va_list arguments;
  va_start(arguments, format);
  Machine& machine = *lane->machine;
  machine.error = text("block %d, thread %d: ", lane->block->index, lane->thread);
  machine.error += text_of(format, arguments);
  va_end(arguments);
  lane->context.switch_to(machine.host);
  abort();  // not reached
}

inline void complete_load(const BoxCopy& copy);  // hopper.h

// Loads whose time has come. With `any` time passes until there is one.
inline void progress_loads(Machine& machine, bool any) {
  auto& loads = machine.loads;
  if (any) {
    uint64_t next = loads[0].due;
    for (const BoxCopy& load : loads) next = load.due < next ? load.due : next;
    if (next > machine.step) machine.step = next;
  }
  for (size_t i = 0; i < loads.size();) {
    if (loads[i].due > machine.step) {
      ++i;
      continue;
    }
    const BoxCopy copy = loads[i];
    loads.erase(loads.begin() + std::ptrdiff_t(i));
    complete_load(copy);
  }
}

inline Lane* lowest(Warp& warp) { return warp.lanes + __builtin_ctz(warp.runnable); }

inline Lane* random_lane(Machine& machine, Warp* here) {
  Warp* warp = here;
  if (warp == nullptr || warp->runnable == 0 || machine.draw(8) == 0) {
    int count = 0;
    for (int w = 0; w < machine.warp_count; ++w) count += machine.warps[size_t(w)].runnable != 0;
    if (count == 0) return nullptr;
    int skip = int(machine.draw(uint32_t(count)));
    for (int w = 0; w < machine.warp_count; ++w) {
      warp = &machine.warps[size_t(w)];
      if (warp->runnable != 0 && skip-- == 0) break;
    }
  }
  const uint32_t first = machine.draw(kWarpThreads), high = warp->runnable & (~0u << first);
  return warp->lanes + __builtin_ctz(high != 0 ? high : warp->runnable);
}

// The lane to run next; null: none can.
inline Lane* next_lane(Machine& machine, Warp* here) {
  ++machine.step;
  if (!machine.loads.empty()) progress_loads(machine, false);
  for (;;) {
    if (machine.random()) {
      if (Lane* lane = random_lane(machine, here)) return lane;
    } else {
      if (here != nullptr && here->runnable != 0) return lowest(*here);
      const int start = here != nullptr ? int(here - machine.warps.get()) : 0;
      for (int i = 0; i < machine.warp_count; ++i) {
        const int next =
            start + i < machine.warp_count ? start + i : start + i - machine.warp_count;
        if (machine.warps[size_t(next)].runnable != 0) return lowest(machine.warps[size_t(next)]);
      }
    }
    if (machine.loads.empty()) return nullptr;
    progress_loads(machine, true);
  }
}

inline void note_writes(const Lane& lane) {
  if (lane.block->proxies.started()) lane.block->proxies.note(lane.thread);
}
// TMA or WGMMA is about to use these bytes of the block's shared memory.
inline void check_fenced(const char* what, uint32_t offset, int bytes) {
  const Block& block = *current->block;
  if (!block.proxies.started()) return;
  const int writer = block.proxies.unfenced(offset, bytes);
  if (writer != Proxies::kNobody)
    fail("%s: thread %d wrote to the %d bytes of shared memory at %u and has run no fence_async",
         what, writer, bytes, offset);
}

// Lets others run, until somebody makes this lane runnable.
inline void run_others(Lane& lane) {
  Machine& machine = *lane.machine;
  note_writes(lane);
  Lane* next = next_lane(machine, lane.warp);
  if (next == &lane) return;
  current = next;
  lane.context.switch_to(next != nullptr ? next->context : machine.host);
}
inline void suspend(Lane& lane, const char* waits, int detail0 = 0, int detail1 = 0) {
  lane.waits = waits;
  lane.detail[0] = detail0;
  lane.detail[1] = detail1;
  lane.warp->runnable &= ~(1u << lane.lane);
  run_others(lane);
  lane.waits = nullptr;
}
inline void wake(Lane& lane) { lane.warp->runnable |= 1u << lane.lane; }

// In random order: a place where another lane may run first.
inline void interrupt() {
  if (current->machine->random()) run_others(*current);
}

inline Lane& self() {
  if (current == nullptr) fail("no grid");
  return *current;
}

// ---------------------------------------------------------------- operations of a whole warp

// All lanes call it; the last one gets true, does the work on all their arguments and then calls
// release (or waits itself: the others go on when the warp is woken).
inline bool collect(const char* operation, void* arguments) {
  Lane& lane = self();
  Warp& warp = *lane.warp;
  if (warp.arrived == 0) {
    warp.operation = operation;
  } else if (warp.operation != operation && strcmp(warp.operation, operation) != 0) {
    fail("lanes of a warp call different operations: %s here, %s before", operation,
         warp.operation);
  }
  warp.arguments[lane.lane] = arguments;
  if (++warp.arrived < kWarpThreads) {
    suspend(lane, operation);
    return false;
  }
  warp.arrived = 0;
  return true;
}
inline void wake(Warp& warp) { warp.runnable |= warp.alive; }
inline void release() {
  wake(*current->warp);
  interrupt();
}
// The arguments of lane `index`, in the last lane.
template <class T>
T& argument(int index) {
  return *static_cast<T*>(current->warp->arguments[index]);
}

// The last lane of a warp: its warp comes to a meeting, and waits there if it has to.
inline void wake_all(Meeting& meeting) {
  meeting.arrived = 0;
  ++meeting.completed;
  for (Warp* warp : meeting.waiting) wake(*warp);
  meeting.waiting.clear();
}
inline void meet(Meeting& meeting, int expected, bool waits, const char* what, int id) {
  Warp& warp = *current->warp;
  meeting.arrived += kWarpThreads;
  meeting.expected = expected;
  if (meeting.arrived >= expected) {
    wake_all(meeting);
    release();
  } else if (waits) {
    meeting.waiting.push_back(&warp);
    for (int i = 0; i < kWarpThreads; ++i) {
      warp.lanes[i].waits = what;
      warp.lanes[i].detail[0] = id;
    }
    suspend(*current, what, id);
  } else {
    release();
  }
}

// ---------------------------------------------------------------- shared memory

// The offset of p in the block's shared memory, where `bytes` there are the block's.
inline uint32_t shared_offset(const char* what, const void* p, int bytes, int alignment) {
  const Block& block = *self().block;
  const std::ptrdiff_t offset = static_cast<const uint8_t*>(p) - block.shared;
  if (offset < 0 || offset + bytes > block.shared_bytes)
    fail("%s: %d bytes at %lld are not in the block's %d bytes of shared memory", what, bytes,
         static_cast<long long>(offset), block.shared_bytes);
  if (offset % alignment != 0)
    fail("%s: shared address %lld is not a multiple of %d", what, static_cast<long long>(offset),
         alignment);
  return uint32_t(offset);
}

// ---------------------------------------------------------------- running

inline std::string barrier_text(const Block& block, uint32_t offset);  // hopper.h

inline std::string deadlock_text(const Machine& machine) {
  std::string result = "deadlock:";
  for (int b = 0; b < machine.cluster; ++b) {
    const Block& block = machine.blocks[size_t(b)];
    std::map<std::tuple<std::string, int, int>, int> counts;
    int ended = 0;
    for (int t = 0; t < block.threads; ++t) {
      const Lane& lane = block.lanes[t];
      if (lane.ended)
        ++ended;
      else
        ++counts[{lane.waits != nullptr ? lane.waits : "nothing", lane.detail[0], lane.detail[1]}];
    }
    if (counts.empty()) continue;
    result += text(" block %d:", block.index);
    bool first = true;
    for (const auto& [key, count] : counts) {
      const auto& [waits, detail0, detail1] = key;
      result += text("%s %d threads wait at %s", first ? "" : ",", count, waits.c_str());
      first = false;
      if (waits == "barrier_wait") {
        result += text("(barrier at %d, parity %d; ", detail0, detail1);
        result += barrier_text(block, uint32_t(detail0)) + ")";
      } else if (waits == "sync_some") {
        const Meeting& meeting = block.meetings[detail0];
        result += text("(%d): %d of %d came", detail0, meeting.arrived, meeting.expected);
      }
    }
    if (ended > 0) result += text(", %d have ended", ended);
    result += ";";
  }
  result.back() = '.';
  return result;
}

// A thread has run: those it was expected by need no longer wait for it. (The programming guide:
// barriers of a block and of a cluster count the threads that have not exited.)
inline void end_lane(Lane& lane) {
  if (!lane.stores.empty())
    fail("the thread ended with tma_store under way: tma_store_commit and tma_store_wait<0> it");
  Warp& warp = *lane.warp;
  Block& block = *lane.block;
  Machine& machine = *lane.machine;
  lane.ended = true;
  warp.runnable &= ~(1u << lane.lane);
  warp.alive &= ~(1u << lane.lane);
  --block.alive_threads;
  if (warp.alive != 0) return;
  if (!warp.products.empty()) fail("the warp ended with products under way: wgmma_wait<0>");
  Meeting& all = block.meetings[0];
  if (all.arrived > 0 && all.arrived >= block.alive_threads) wake_all(all);
  int alive = 0;
  for (int b = 0; b < machine.cluster; ++b) alive += machine.blocks[size_t(b)].alive_threads;
  Meeting& clusters = machine.cluster_meeting;
  if (clusters.arrived > 0 && clusters.arrived >= alive) wake_all(clusters);
}

inline void lane_main() {
  Lane* lane = current;
  Machine& machine = *lane->machine;
  Context::entered(machine.host);
  try {
    machine.body(machine.body_data);
  } catch (const std::exception& error) {
    fail("exception: %s", error.what());
  } catch (...) {
    fail("exception");
  }
  note_writes(*lane);
  end_lane(*lane);
  Lane* next = next_lane(machine, lane->warp);
  current = next;
  lane->context.switch_to(next != nullptr ? next->context : machine.host);
  abort();  // not reached
}

inline bool reserve(Machine& machine, int cluster, int threads) {
  const int lanes = cluster * threads;
  if (lanes > machine.lane_capacity) {
    std::unique_ptr<Lane[]> more(new Lane[size_t(lanes)]);
    for (int i = 0; i < machine.lane_capacity; ++i)
      more[size_t(i)].stack = std::exchange(machine.lanes[size_t(i)].stack, nullptr);
    machine.lanes = std::move(more);
    machine.warps.reset(new Warp[size_t(lanes / kWarpThreads)]);
    machine.lane_capacity = lanes;
    for (int i = 0; i < lanes; ++i) {
      uint8_t*& stack = machine.lanes[size_t(i)].stack;
      if (stack == nullptr && (stack = new_stack()) == nullptr) return false;
    }
  }
  if (machine.blocks == nullptr) machine.blocks.reset(new Block[kMaxCluster]);
  for (int b = 0; b < cluster; ++b) {
    Block& block = machine.blocks[size_t(b)];
    if (block.memory != nullptr) continue;
    block.memory.reset(new uint8_t[kMaxSharedBytes + 2 * kMarginBytes + 1024]);
    const uintptr_t start = uintptr_t(block.memory.get()) + kMarginBytes;
    block.shared = block.memory.get() + kMarginBytes + ((1024 - start % 1024) % 1024);
  }
  return true;
}

inline void start_block(Machine& machine, int rank, int index, int shared_bytes) {
  Block& block = machine.blocks[size_t(rank)];
  const int threads = machine.threads, warps = threads / kWarpThreads;
  block.index = index;
  block.rank = rank;
  block.shared_bytes = shared_bytes;
  block.threads = block.alive_threads = threads;
  block.lanes = &machine.lanes[size_t(rank * threads)];
  block.warps = &machine.warps[size_t(rank * warps)];
  for (Meeting& meeting : block.meetings) meeting.reset();
  block.barriers.clear();
  block.barrier_waiters.clear();
  for (auto& list : block.products) list.clear();
  memset(block.shared - kMarginBytes, kPoison, size_t(shared_bytes + 2 * kMarginBytes));
  block.unfenced_inits.clear();
  block.proxies.stop();
  if (machine.checks_proxies) block.proxies.start(block.shared, shared_bytes);
  for (int w = 0; w < warps; ++w) {
    Warp& warp = block.warps[w];
    warp.block = &block;
    warp.index = w;
    warp.lanes = block.lanes + w * kWarpThreads;
    warp.runnable = warp.alive = ~0u;
    warp.arrived = 0;
    warp.fences = 0;
    warp.signatures = 0;
    warp.accumulators.clear();
    warp.products.clear();
  }
  for (int t = 0; t < threads; ++t) {
    Lane& lane = block.lanes[t];
    lane.machine = &machine;
    lane.block = &block;
    lane.warp = block.warps + t / kWarpThreads;
    lane.thread = t;
    lane.lane = t % kWarpThreads;
    lane.ended = false;
    lane.waits = nullptr;
    lane.copies.clear();
    lane.stores.clear();
    // Stacks that all began at the same place of a page would share few lines of the caches.
    uint8_t* bottom = lane.stack + kGuardBytes;
    lane.context.start(bottom, bottom + kStackBytes - t * 13 % 64 * 64, lane_main);
  }
}

inline std::string end_barriers(const Block& block);  // hopper.h

inline std::string end_block(const Machine& machine, const Block& block) {
  for (int i = 1; i <= kMarginBytes; ++i) {
    if (block.shared[-i] != kPoison)
      return text("block %d wrote %d bytes before its shared memory", block.index, i);
    const int past = block.shared_bytes + i - 1;
    if (block.shared[past] != kPoison)
      return text("block %d wrote at %d, past its %d bytes of shared memory", block.index, past,
                  block.shared_bytes);
  }
  for (int w = 0; w < machine.threads / kWarpThreads; ++w)
    if (block.warps[w].signatures != block.products[w / 4].size())
      return text("block %d: the warps of warpgroup %d ran different numbers of products",
                  block.index, w / 4);
  return end_barriers(block);
}

inline std::string run_cluster(Machine& machine, int first_block, int shared_bytes) {
  for (int rank = 0; rank < machine.cluster; ++rank)
    start_block(machine, rank, first_block + rank, shared_bytes);
  machine.cluster_meeting.reset();
  machine.loads.clear();
  machine.error.clear();
  Lane* first = next_lane(machine, nullptr);
  current = first;
  machine.host.switch_to(first->context);
  current = nullptr;
  if (!machine.error.empty()) return machine.error;
  for (int i = 0; i < machine.cluster * machine.threads; ++i)
    if (!machine.lanes[size_t(i)].ended) return deadlock_text(machine);
  for (int rank = 0; rank < machine.cluster; ++rank) {
    const std::string error = end_block(machine, machine.blocks[size_t(rank)]);
    if (!error.empty()) return error;
  }
  return "";
}

inline const char* run_grid(int blocks, int threads, int cluster, int shared_bytes,
                            void (*body)(void*), void* data) {
  thread_local Machine machine;
  thread_local std::string error;
  if (current != nullptr) return "a grid within a grid";
  if (blocks < 0 || threads < kWarpThreads || threads > kMaxThreads || threads % kWarpThreads != 0)
    error = text("%d blocks of %d threads: threads go in warps of 32, up to 1024", blocks, threads);
  else if (cluster < 1 || cluster > kMaxCluster || blocks % cluster != 0)
    error = text("%d blocks in clusters of %d (up to %d)", blocks, cluster, kMaxCluster);
  else if (shared_bytes < 0 || shared_bytes > kMaxSharedBytes)
    error = text("%d bytes of shared memory; there are %d", shared_bytes, kMaxSharedBytes);
  else if (!reserve(machine, cluster, threads))
    error = "no memory for the stacks";
  else
    error.clear();
  machine.grid = blocks;
  machine.cluster = cluster;
  machine.threads = threads;
  machine.warp_count = cluster * threads / kWarpThreads;
  int64_t seed = seed_setting().load();
  if (seed < 0) {
    const char* setting = getenv("FASTPROTO_EMULATE_SEED");
    seed = setting != nullptr ? atoll(setting) : 0;
  }
  machine.random_state = uint64_t(seed) * 0x9e3779b97f4a7c15ull;
  int proxies = proxies_setting().load();
  if (proxies < 0) {
    const char* setting = getenv("FASTPROTO_EMULATE_PROXIES");
    proxies = setting != nullptr ? atoi(setting) : 0;
  }
  machine.checks_proxies = proxies != 0;
  machine.body = body;
  machine.body_data = data;
  for (int block = 0; error.empty() && block < blocks; block += cluster)
    error = run_cluster(machine, block, shared_bytes);
  return error.empty() ? nullptr : error.c_str();
}

// Runs body() in every thread of `blocks` blocks. Null, or what went wrong (valid until the next
// run in this thread).
template <class Body>
const char* run(int blocks, int threads, int cluster, int shared_bytes, const Body& body) {
  return run_grid(
      blocks, threads, cluster, shared_bytes,
      [](void* data) { (*static_cast<const Body*>(data))(); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace fastproto::cuda::emulator
