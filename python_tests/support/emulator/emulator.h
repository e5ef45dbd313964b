// SPDX-License-Identifier: Apache-2.0
// What csrc/cuda/common/platform.h takes with FASTPROTO_EMULATE instead of instructions and CUDA's
// launch: the same names, run by every thread of a grid on the CPU. Here how a cluster starts,
// ends, or why it does not.
#pragma once

#include <deque>
#include <exception>

#include "wgmma.h"

namespace fastproto::cuda::emulator {

inline std::string what_it_waits_for(const Lane& lane) {
  const Block& block = *lane.block;
  const std::string waits = lane.waits != nullptr ? lane.waits : "nothing";
  if (waits == "barrier_wait")
    return text("barrier_wait(barrier at ", lane.detail[0], ", parity ", lane.detail[1], "; ",
                barrier_text(block, uint32_t(lane.detail[0])), ")");
  if (waits != "sync_some") return waits;
  const Meeting& meeting = block.meetings[lane.detail[0]];
  return text("sync_some(", lane.detail[0], "): ", meeting.arrived, " of ", meeting.expected,
              " came");
}

inline std::string deadlock_text(const Machine& machine) {
  std::string result = "deadlock:";
  for (const Block& block : machine.blocks) {
    std::map<std::string, int> counts;
    int ended = 0;
    for (int t = 0; t < block.threads; ++t) {
      if (block.lanes[t].ended)
        ++ended;
      else
        ++counts[what_it_waits_for(block.lanes[t])];
    }
    if (counts.empty()) continue;
    std::string before = text(" block ", block.index, ": ");
    for (const auto& [waits, count] : counts) {
      result += text(before, count, " threads wait at ", waits);
      before = ", ";
    }
    result += ended > 0 ? text(", ", ended, " have ended;") : ";";
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
  lane.ended = true;
  warp.runnable &= ~(1u << lane.lane);
  warp.alive &= ~(1u << lane.lane);
  --block.alive_threads;
  if (warp.alive != 0) return;
  if (!warp.products.empty()) fail("the warp ended with products under way: wgmma_wait<0>");
  const auto no_longer_wait = [](Meeting& meeting, int alive) {
    if (meeting.arrived > 0 && meeting.arrived >= alive) wake_all(meeting);
  };
  no_longer_wait(block.meetings[0], block.alive_threads);
  no_longer_wait(lane.machine->cluster_meeting, lane.machine->alive_threads());
}

inline void lane_main() {
  Lane* lane = current;
  Machine& machine = *lane->machine;
  Fiber::entered(machine.host);
  try {
    machine.body();
  } catch (const std::exception& error) {
    fail("exception: ", error.what());
  } catch (...) {
    fail("exception");
  }
  lane->block->proxies.note(lane->thread);
  end_lane(*lane);
  Lane* next = next_lane(machine, lane->warp);
  current = next;
  lane->fiber.switch_to(next != nullptr ? next->fiber : machine.host);
  abort();  // not reached
}

inline void start_block(Machine& machine, int rank, int index, int shared_bytes) {
  Block& block = machine.blocks[size_t(rank)];
  block.index = index;
  block.rank = rank;
  block.memory.assign(size_t(shared_bytes + 2 * kMarginBytes + 1024), kPoison);
  const uintptr_t start = uintptr_t(block.memory.data()) + kMarginBytes;
  block.shared = block.memory.data() + kMarginBytes + (1024 - start % 1024) % 1024;
  block.shared_bytes = shared_bytes;
  block.threads = block.alive_threads = machine.threads;
  block.lanes = &machine.lanes[size_t(rank * machine.threads)];
  block.warps = &machine.warps[size_t(rank * machine.threads / kWarpThreads)];
  if (machine.checks_proxies) block.proxies.start(block.shared, shared_bytes);
  for (int w = 0; w < machine.threads / kWarpThreads; ++w) {
    block.warps[w].block = &block;
    block.warps[w].index = w;
    block.warps[w].lanes = block.lanes + w * kWarpThreads;
  }
  thread_local std::deque<Stack> stacks;
  while (stacks.size() < machine.lanes.size()) stacks.emplace_back();
  for (int t = 0; t < machine.threads; ++t) {
    Lane& lane = block.lanes[t];
    lane.machine = &machine;
    lane.block = &block;
    lane.warp = block.warps + t / kWarpThreads;
    lane.thread = t;
    lane.lane = t % kWarpThreads;
    // Stacks that all began at the same place of a page would share few lines of the caches.
    lane.fiber.start(stacks[size_t(rank * machine.threads + t)].bottom(),
                     Stack::kBytes - size_t(t * 13 % 64 * 64), lane_main);
  }
}

inline std::string end_block(const Block& block) {
  for (int i = 1; i <= kMarginBytes; ++i) {
    if (block.shared[-i] != kPoison)
      return text("block ", block.index, " wrote ", i, " bytes before its shared memory");
    const int past = block.shared_bytes + i - 1;
    if (block.shared[past] != kPoison)
      return text("block ", block.index, " wrote at ", past, ", past its ", block.shared_bytes,
                  " bytes of shared memory");
  }
  for (int w = 0; w < block.threads / kWarpThreads; ++w)
    if (block.warps[w].multiplied != block.products[w / 4].size())
      return text("block ", block.index, ": the warps of warpgroup ", w / 4,
                  " ran different numbers of products");
  for (uint32_t offset : block.barriers)
    if (barrier_at(block, offset).bytes != 0)
      return text("block ", block.index, " ended with the barrier at ", offset,
                  " in the middle of a phase: ", barrier_text(block, offset));
  return "";
}

inline std::string run_cluster(Machine& machine, int first_block, int shared_bytes) {
  const size_t lanes = size_t(machine.cluster * machine.threads);
  machine.lanes = std::vector<Lane>(lanes);
  machine.warps = std::vector<Warp>(lanes / kWarpThreads);
  machine.blocks = std::vector<Block>(size_t(machine.cluster));
  machine.cluster_meeting = {};
  machine.loads.clear();
  for (int rank = 0; rank < machine.cluster; ++rank)
    start_block(machine, rank, first_block + rank, shared_bytes);
  current = next_lane(machine, nullptr);
  machine.host.switch_to(current->fiber);
  current = nullptr;
  if (!machine.error.empty()) return machine.error;
  if (machine.alive_threads() > 0) return deadlock_text(machine);
  for (const Block& block : machine.blocks)
    if (const std::string error = end_block(block); !error.empty()) return error;
  return "";
}

inline int64_t setting(const char* name) {
  const char* value = getenv(name);
  return value != nullptr ? atoll(value) : 0;
}

// Runs body() in every thread of `blocks` blocks. Null, or what went wrong (valid until the next
// run in this thread).
inline const char* run(int blocks, int threads, int cluster, int shared_bytes, Operation body) {
  thread_local std::string error;
  if (current != nullptr) return "a grid within a grid";
  error.clear();
  if (blocks < 0 || threads < kWarpThreads || threads > kMaxThreads || threads % kWarpThreads != 0)
    error = text(blocks, " blocks of ", threads, " threads: threads go in warps of 32, up to 1024");
  else if (cluster < 1 || cluster > kMaxCluster || blocks % cluster != 0)
    error = text(blocks, " blocks in clusters of ", cluster, " (up to ", kMaxCluster, ")");
  else if (shared_bytes < 0 || shared_bytes > kMaxSharedBytes)
    error = text(shared_bytes, " bytes of shared memory; there are ", kMaxSharedBytes);
  Machine machine;
  machine.grid = blocks;
  machine.cluster = cluster;
  machine.threads = threads;
  const auto seed = unsigned(setting("FASTPROTO_EMULATE_SEED"));
  machine.random = seed != 0;
  machine.generator.seed(seed * 0x9e3779b9u);
  machine.checks_proxies = setting("FASTPROTO_EMULATE_PROXIES") != 0;
  machine.body = std::move(body);
  for (int block = 0; error.empty() && block < blocks; block += cluster)
    error = run_cluster(machine, block, shared_bytes);
  return error.empty() ? nullptr : error.c_str();
}

}  // namespace fastproto::cuda::emulator

namespace fastproto::cuda {

using namespace emulator;

template <auto Kernel, class... Params>
const char* launch(const Grid& grid, const Params&... params) {
  return run(grid.blocks, grid.threads, grid.cluster, grid.shared_bytes,
             [&] { Kernel(params...); });
}

}  // namespace fastproto::cuda
