// SPDX-License-Identifier: Apache-2.0
// The threads of a grid as fibers, and who runs when. One operating-system thread runs one cluster
// of blocks at a time; a fiber runs until it waits for something, then the next one of its warp
// does, and when none of them can, another warp. So a warp runs as far ahead of the others as the
// barriers let it: a missing barrier is a wrong result. With FASTPROTO_EMULATE_SEED the order is
// random instead, and so is when asynchronous copies happen.
//
// Shared memory starts as NaN (0xFF), and so does what an asynchronous copy will write.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "fiber.h"
#include "proxies.h"

namespace fastproto::cuda::emulator {

constexpr int kWarpThreads = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxCluster = 8;  // the portable bound
constexpr int kMaxSharedBytes = 227 << 10;
constexpr int kMarginBytes = 4096;  // around shared memory; nothing may write there
constexpr int kNamedBarriers = 16;
constexpr uint8_t kPoison = 0xFF;

using Operation = std::function<void()>;

// Asynchronous operations in groups, oldest first.
class Groups {
 public:
  void add(Operation operation) { open_.push_back(std::move(operation)); }
  void commit() { groups_.push_back(std::exchange(open_, {})); }
  bool empty() const {
    return open_.empty() && std::all_of(groups_.begin(), groups_.end(),
                                        [](const auto& group) { return group.empty(); });
  }
  // Completes all groups but the latest `pending`.
  void wait(size_t pending) {
    while (groups_.size() > pending) {
      for (const Operation& complete : groups_.front()) complete();
      groups_.erase(groups_.begin());
    }
  }

 private:
  std::vector<Operation> open_;
  std::vector<std::vector<Operation>> groups_;
};

// The accumulator of a warpgroup's products, as one of its warps sees it.
struct Accumulator {
  float* lanes[kWarpThreads];  // where each lane keeps its numbers
  int count;                   // of a lane
  std::vector<float> values;   // [lane][count]
  int products = 0;            // under way
  int64_t fence = -1;          // wgmma_begin's count when the last product ended
};

struct Block;
struct Warp;
struct Machine;

struct Lane {
  Fiber fiber;
  Machine* machine = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int thread = 0;  // of the block
  int lane = 0;    // of the warp
  bool ended = false;
  // What it waits for, while it does.
  const char* waits = nullptr;
  int detail[2] = {};
  Groups copies, stores;
};

struct Warp {
  Block* block = nullptr;
  int index = 0;  // of the block
  Lane* lanes = nullptr;
  uint32_t runnable = ~0u;
  uint32_t alive = ~0u;
  // The operation of all lanes that some have come to.
  const char* operation = nullptr;
  int arrived = 0;
  void* arguments[kWarpThreads] = {};
  uint32_t gathered[kWarpThreads] = {};
  // wgmma
  int64_t fences = 0;
  size_t multiplied = 0;
  std::vector<Accumulator> accumulators;
  Groups products;
};

// bar.sync, barrier.cluster: counts threads, always whole warps.
struct Meeting {
  int expected = 0;
  int arrived = 0;
  int completed = 0;
  std::vector<Warp*> waiting;
};

// What a product multiplies: its type, the descriptors, whether it adds.
using Signature = std::tuple<std::string_view, uint64_t, uint64_t, int>;

struct Block {
  int index = 0;  // of the grid
  int rank = 0;   // of the cluster
  std::vector<uint8_t> memory;
  uint8_t* shared = nullptr;
  int shared_bytes = 0;
  int threads = 0;
  int alive_threads = 0;
  Lane* lanes = nullptr;
  Warp* warps = nullptr;
  Meeting meetings[kNamedBarriers];
  std::vector<uint32_t> barriers;  // offsets of all initialised
  std::vector<Lane*> barrier_waiters;
  std::vector<int> unfenced_inits;  // threads that have run barrier_init and no fence since
  Proxies proxies;                  // started where they are checked
  // What the warps of each warpgroup multiplied, in order; all four must do the same.
  std::vector<Signature> products[kMaxThreads / 128];
};

struct Machine {
  int grid = 0, cluster = 0, threads = 0;
  bool random = false;  // or in the fixed order
  std::minstd_rand generator;
  bool checks_proxies = false;
  Operation body;
  Fiber host;
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  Meeting cluster_meeting;
  uint64_t step = 0;
  std::multimap<uint64_t, Operation> loads;  // by the step from which on they may happen
  std::string error;

  uint32_t draw(uint32_t below) { return uint32_t(generator()) / 8 % below; }
  int alive_threads() const {
    int alive = 0;
    for (const Block& block : blocks) alive += block.alive_threads;
    return alive;
  }
};

// The thread that runs. Null outside of a grid.
inline thread_local Lane* current = nullptr;

inline Lane& self() {
  if (current != nullptr) return *current;
  fputs("fastproto: a function of the emulated GPU was called outside of a grid\n", stderr);
  abort();
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}
// Ends the run, which returns the text. The fibers are left as they are, nothing of them is
// destroyed.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  Lane& lane = self();
  lane.machine->error = text("block ", lane.block->index, ", thread ", lane.thread, ": ", parts...);
  lane.fiber.switch_to(lane.machine->host);
  abort();  // not reached
}

// ---------------------------------------------------------------- who runs

// The first warp from `here` on that can.
inline Lane* first_lane(Machine& machine, Warp* here) {
  const size_t warps = machine.warps.size();
  const size_t start = here != nullptr ? size_t(here - machine.warps.data()) : 0;
  for (size_t i = start; i < start + warps; ++i) {
    Warp& warp = machine.warps[i < warps ? i : i - warps];
    if (warp.runnable != 0) return warp.lanes + __builtin_ctz(warp.runnable);
  }
  return nullptr;
}

inline Lane* random_lane(Machine& machine, Warp* warp) {
  if (warp == nullptr || warp->runnable == 0 || machine.draw(8) == 0) {
    std::vector<Warp*> runnable;
    for (Warp& other : machine.warps)
      if (other.runnable != 0) runnable.push_back(&other);
    if (runnable.empty()) return nullptr;
    warp = runnable[machine.draw(uint32_t(runnable.size()))];
  }
  const uint32_t from = warp->runnable & (~0u << machine.draw(kWarpThreads));
  return warp->lanes + __builtin_ctz(from != 0 ? from : warp->runnable);
}

// The lane to run next; null: none can.
inline Lane* next_lane(Machine& machine, Warp* here) {
  auto& loads = machine.loads;
  for (++machine.step;; machine.step = loads.begin()->first) {  // time passes until the next load
    while (!loads.empty() && loads.begin()->first <= machine.step)
      loads.extract(loads.begin()).mapped()();
    Lane* lane = machine.random ? random_lane(machine, here) : first_lane(machine, here);
    if (lane != nullptr || loads.empty()) return lane;
  }
}

// TMA or WGMMA is about to use these bytes of the block's shared memory.
inline void check_fenced(const char* what, uint32_t offset, int bytes) {
  const int writer = current->block->proxies.unfenced(offset, bytes);
  if (writer != Proxies::kNobody)
    fail(what, ": thread ", writer, " wrote to the ", bytes, " bytes of shared memory at ", offset,
         " and has run no fence_async");
}

// Lets others run, until somebody makes this lane runnable.
inline void run_others(Lane& lane) {
  Machine& machine = *lane.machine;
  lane.block->proxies.note(lane.thread);
  Lane* next = next_lane(machine, lane.warp);
  if (next == &lane) return;
  current = next;
  lane.fiber.switch_to(next != nullptr ? next->fiber : machine.host);
}
inline void suspend(Lane& lane, const char* waits, int detail0 = 0, int detail1 = 0) {
  lane.waits = waits;
  lane.detail[0] = detail0;
  lane.detail[1] = detail1;
  lane.warp->runnable &= ~(1u << lane.lane);
  run_others(lane);
  lane.waits = nullptr;
}

// In random order: a place where another lane may run first.
inline void interrupt() {
  if (self().machine->random) run_others(*current);
}

// ---------------------------------------------------------------- operations of a whole warp

// The arguments of lane `index`, in the last lane.
template <class T>
T& argument(int index) {
  return *static_cast<T*>(current->warp->arguments[index]);
}

inline void wake(Warp& warp) { warp.runnable |= warp.alive; }

// All lanes call it; the last one gets true, does the work on all their arguments and then calls
// release (or waits itself: the others go on when the warp is woken).
inline bool collect(const char* operation, void* arguments) {
  Lane& lane = self();
  Warp& warp = *lane.warp;
  if (warp.arrived == 0)
    warp.operation = operation;
  else if (warp.operation != operation && strcmp(warp.operation, operation) != 0)
    fail("lanes of a warp call different operations: ", operation, " here, ", warp.operation,
         " before");
  warp.arguments[lane.lane] = arguments;
  if (++warp.arrived < kWarpThreads) {
    suspend(lane, operation);
    return false;
  }
  warp.arrived = 0;
  return true;
}
inline void release() {
  wake(*current->warp);
  interrupt();
}
template <class Work>
void together(const char* operation, void* arguments, const Work& work) {
  if (!collect(operation, arguments)) return;
  work();
  release();
}

// The x of every lane, until the warp's next operation.
inline const uint32_t* gather(const char* operation, uint32_t x) {
  together(operation, &x, [] {
    for (int i = 0; i < kWarpThreads; ++i) current->warp->gathered[i] = argument<uint32_t>(i);
  });
  return current->warp->gathered;
}

inline void wake_all(Meeting& meeting) {
  meeting.arrived = 0;
  ++meeting.completed;
  for (Warp* warp : std::exchange(meeting.waiting, {})) wake(*warp);
}
// The last lane of a warp: its warp comes to a meeting, and waits there if it has to.
inline void meet(Meeting& meeting, int expected, bool waits, const char* what, int id) {
  Warp& warp = *current->warp;
  meeting.arrived += kWarpThreads;
  meeting.expected = expected;
  if (meeting.arrived >= expected) wake_all(meeting);
  if (meeting.arrived == 0 || !waits) return release();
  meeting.waiting.push_back(&warp);
  for (int i = 0; i < kWarpThreads; ++i) {
    warp.lanes[i].waits = what;
    warp.lanes[i].detail[0] = id;
  }
  suspend(*current, what, id);
}

// All that have not ended meet.
inline void sync_all(const char* what, Meeting& meeting, int alive) {
  if (collect(what, nullptr)) meet(meeting, alive, true, what, 0);
}

// ---------------------------------------------------------------- shared memory

// The offset of p in the block's shared memory, where `bytes` there are the block's.
inline uint32_t shared_offset(const char* what, const void* p, int bytes, int alignment) {
  const Block& block = *self().block;
  const std::ptrdiff_t offset = static_cast<const uint8_t*>(p) - block.shared;
  if (offset < 0 || offset + bytes > block.shared_bytes)
    fail(what, ": ", bytes, " bytes at ", offset, " are not in the block's ", block.shared_bytes,
         " bytes of shared memory");
  if (offset % alignment != 0)
    fail(what, ": shared address ", offset, " is not a multiple of ", alignment);
  return uint32_t(offset);
}

}  // namespace fastproto::cuda::emulator
