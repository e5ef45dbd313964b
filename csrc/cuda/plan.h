// SPDX-License-Identifier: Apache-2.0
// Which kernels a problem runs with: a pure function of sizes and chip. Of the bags the host knows
// no more than the rows of `protos` and how many bags share them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "../params.h"
#include "sm80/configs.h"
#include "sm90/backward.h"

namespace fastproto::cuda {

enum class Kernel : int { kNone, kSm80Latency, kSm80Throughput, kSm90Latency, kSm90Throughput };

inline const char* kernel_name(Kernel kernel) {
  constexpr const char* kNames[] = {"none", "sm80 latency", "sm80 throughput", "sm90 latency",
                                    "sm90 throughput"};
  return kNames[int(kernel)];
}

// What the choice may depend on.
struct Request {
  int capability;  // 10 * major + minor
  int multiprocessors;
  int shared_memory;  // bytes that a block may have
  DType dtype;
  int64_t episodes, queries, ways, dim, pixels;
  int64_t total;  // rows of `protos`
  bool save;      // whether a backward follows
  bool tma_ok;    // every tensor starts and steps in multiples of 16 bytes, and none is empty
  bool has_sm90;  // whether the library was built for sm_90a
};

// One launch.
struct KernelPlan {
  Kernel kernel = Kernel::kNone;
  int tile_m = 0;  // pixels of a tile
  int tile_n = 0;  // prototypes of a tile
  int dim = 0;     // channels of a tile, D or more
  int slices = 1;  // blocks that share the channels of a tile's result
  int stages = 1;  // tiles of prototypes (of pixels in backward_protos) in flight
  int cluster = 1;
  int blocks = 0;
  int threads = 0;
  int shared_bytes = 0;
};

struct Plan {
  std::string error;  // why there is none; empty: there is
  KernelPlan stats;   // kNone: the forward computes the statistics of prototypes on its way
  KernelPlan forward;
  KernelPlan backward_query;
  KernelPlan backward_protos;
};

namespace planning {

constexpr int64_t kMaxInt = INT32_MAX;
constexpr int item_size(DType dtype) {
#define FP_ROW(name, torch_name, python_name, bytes, ...) \
  if (dtype == DType::name) return bytes;
  FP_DTYPES(FP_ROW)
#undef FP_ROW
  return 0;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// What FASTPROTO_CUDA_KERNELS asks for.
struct Wish {
  bool sm80 = false, sm90 = false, latency = false, throughput = false;
};
inline bool parse(const char* text, Wish* wish) {
  if (text == nullptr || *text == 0) return true;
  const std::string name = text;
  wish->sm80 = name.rfind("sm80", 0) == 0;
  wish->sm90 = name.rfind("sm90", 0) == 0;
  const std::string form = name.size() > 4 ? name.substr(4) : "";
  wish->latency = form == "-latency";
  wish->throughput = form == "-throughput";
  return (wish->sm80 || wish->sm90) && (form.empty() || wish->latency || wish->throughput);
}

// Why the kernels of csrc/cuda/sm90 cannot run; null: they can.
inline const char* why_not_sm90(const Request& r) {
  if (r.capability != 90) return "its instructions are those of capability 9.0 alone";
  if (!r.has_sm90) return "this build has no code for sm_90a";
  if (r.dtype == DType::kFloat32) return "WGMMA cannot transpose float32";
  if (r.shared_memory < sm90::kSharedLimit) return "the chip has too little shared memory";
  if (!r.tma_ok) return "TMA takes rows that start and step in multiples of 16 bytes";
  return nullptr;
}

// Whether a forward computes the statistics of the prototypes itself where they are not given.
inline bool finds_statistics(const Request& r, const KernelPlan& forward) {
  if (r.save || r.dtype == DType::kFloat32) return false;
  return forward.kernel == Kernel::kSm90Latency ||
         (forward.kernel == Kernel::kSm80Latency && forward.slices > 1);
}

// Tiles of `rows` prototypes where the host does not know how large the bags are.
inline int64_t owned_tiles(const Request& r, int rows) {
  return r.total / rows + r.episodes * r.ways + 1;
}

// All slices there can be where that leaves few blocks waiting, or one: a block computes the
// cosines of its tile whichever slice it has.
inline int latency_slices(const Request& r, int64_t tiles, int dim) {
  const int most = sm80::most_slices(dim);
  return tiles * most <= 2 * r.multiprocessors ? most : 1;
}

// A launch in tiles of tile_m pixels and tile_n prototypes, `tiles` of them.
inline KernelPlan sm80_launch(const Request& r, bool small, int tile_m, int tile_n, int64_t tiles,
                              int shared_bytes) {
  KernelPlan plan;
  plan.kernel = small ? Kernel::kSm80Latency : Kernel::kSm80Throughput;
  plan.tile_m = tile_m;
  plan.tile_n = tile_n;
  plan.dim = padded_dim(r.dim);
  plan.slices = small ? latency_slices(r, tiles, plan.dim) : 1;
  plan.blocks = int(tiles * plan.slices);
  plan.threads = sm80::kThreads;
  plan.shared_bytes = shared_bytes;
  return plan;
}

inline KernelPlan plan_sm80_forward(const Request& r, bool small) {
  const int item = item_size(r.dtype), dim = padded_dim(r.dim);
  // 64 rows of float32 would leave no room for prototypes.
  const bool wide = !small && item == 2 && sm80::forward_bytes(item, dim, 64, 1) <= r.shared_memory;
  const int rows = wide ? 64 : 16;
  const int stages = sm80::forward_bytes(item, dim, rows, 2) <= r.shared_memory ? 2 : 1;
  const int64_t tiles = r.episodes * r.queries * r.ways * ceil_div(r.pixels, rows);
  KernelPlan plan = sm80_launch(r, small, rows, sm80::forward_tile_n(item, rows), tiles,
                                sm80::forward_bytes(item, dim, rows, stages));
  plan.stages = stages;
  return plan;
}

// The queries: a block sums over the classes. The prototypes: bag b owns the tiles from
// offsets[b] / tile_n + b on, found on the device.
inline void plan_sm80_backward(const Request& r, bool small, Plan* plan) {
  const int item = item_size(r.dtype), dim = padded_dim(r.dim);
  const int stages = sm80::backward_query_bytes(item, dim, 2) <= r.shared_memory ? 2 : 1;
  plan->backward_query = sm80_launch(r, small, 16, sm80::backward_query_tile_n(item),
                                     r.episodes * r.queries * ceil_div(r.pixels, 16),
                                     sm80::backward_query_bytes(item, dim, stages));
  plan->backward_query.stages = stages;
  const bool tall =
      !small && item == 2 && sm80::backward_protos_bytes(item, dim, 32) <= r.shared_memory;
  const int rows = tall ? 32 : 16;
  plan->backward_protos =
      sm80_launch(r, small, sm80::backward_protos_pixels(item), rows, owned_tiles(r, rows),
                  sm80::backward_protos_bytes(item, dim, rows));
}

inline KernelPlan plan_sm90_forward(const Request& r, bool small) {
  const int64_t maps = r.episodes * r.queries * r.ways;
  KernelPlan plan;
  plan.dim = padded_dim(r.dim);
  if (small) {
    plan.kernel = Kernel::kSm90Latency;
    plan.tile_m = 16;
    plan.cluster = plan.slices = sm90::forward_latency_cluster(plan.dim);
    plan.tile_n = 32 * plan.cluster;
    plan.threads = sm90::forward_latency_threads(plan.dim);
    plan.shared_bytes = sm90::forward_latency_bytes(plan.dim);
    plan.blocks = int(maps * ceil_div(r.pixels, plan.tile_m) * plan.slices);
  } else {
    plan.kernel = Kernel::kSm90Throughput;
    plan.tile_m = plan.tile_n = 64;
    plan.stages = sm90::forward_stages(plan.dim);
    plan.threads = sm90::forward_threads();
    plan.shared_bytes = sm90::forward_bytes(plan.dim);
    // Blocks take turns at the tiles.
    plan.blocks = int(std::min<int64_t>(maps * ceil_div(r.pixels, 64), r.multiprocessors));
  }
  return plan;
}

// Blocks that take turns at the tiles one accumulator sums over, where the chip is not full
// without. A cluster stays within a group of multiprocessors, most of which have a multiple of 8.
inline void spread(const Request& r, int64_t turns, KernelPlan* plan) {
  while (plan->cluster < 8 && 2 * plan->cluster <= turns &&
         2 * plan->blocks <= r.multiprocessors / 8 * 8) {
    plan->cluster *= 2;
    plan->blocks *= 2;
  }
}

inline void plan_sm90_backward(const Request& r, bool spreads, Plan* plan) {
  KernelPlan& query = plan->backward_query;
  query.kernel = Kernel::kSm90Throughput;
  query.dim = padded_dim(r.dim);
  query.tile_m = query.tile_n = 64;
  static_assert(sm90::kBackwardQueryPixels == 64 && sm90::kBackwardProtosRows == 64);
  query.threads = sm90::backward_threads();
  KernelPlan& protos = plan->backward_protos = query;
  query.shared_bytes = sm90::backward_query_bytes(query.dim);
  query.blocks = int(r.episodes * r.queries * ceil_div(r.pixels, 64));
  protos.shared_bytes = sm90::backward_protos_bytes(protos.dim);
  protos.blocks = int(owned_tiles(r, 64));
  if (!spreads) return;
  // What the host knows of the bags: their rows on average.
  spread(r, ceil_div(ceil_div(r.total, r.episodes * r.ways), 64), &query);
  spread(r, r.queries * ceil_div(r.pixels, 64), &protos);
}

// Why nothing of csrc/cuda runs the problem; empty: something does.
inline std::string why_not(const Request& r) {
  if (r.dtype == DType::kFloat64)
    return "feat: found float64; allowed on CUDA: float32, bfloat16, float16";
  if (r.capability < 80)
    return sentence("the GPU: found capability ", r.capability / 10, ".", r.capability % 10,
                    "; allowed: 8.0 and newer");
  if (r.dim > kMaxDim) return sentence("feat: D = ", r.dim, " is above ", kMaxDim);
  const int64_t maps = r.episodes * r.queries * r.ways;
  if (2 * r.dim * r.pixels > kMaxInt)
    return sentence("feat: found ", r.dim, " x ", r.pixels, " values per image; allowed: at most ",
                    kMaxInt / 2);
  if (r.total * r.dim > kMaxInt || 2 * r.total > kMaxInt)  // two statistics each
    return sentence("protos: found ", r.total, " x ", r.dim, " values; allowed: at most ", kMaxInt,
                    ", of at most ", kMaxInt / 2, " prototypes");
  // A block for 16 pixels or prototypes and a slice of 64 channels, at the most.
  if (maps * ceil_div(r.pixels, 16) > kMaxInt / 8 || owned_tiles(r, 16) > kMaxInt / 8)
    return sentence("feat, protos: found ", maps, " maps of ", r.pixels, " pixels, ", r.total,
                    " prototypes; allowed: at most ", kMaxInt / 8, " tiles of 16");
  return "";
}

}  // namespace planning

// The plan of a problem. `wanted` is FASTPROTO_CUDA_KERNELS, null where it is not set. Sentences
// that say why go to `reasons`, where given.
inline Plan make_plan(const Request& r, const char* wanted = nullptr,
                      std::vector<std::string>* reasons = nullptr) {
  using namespace planning;
  Plan plan;
  const auto say = [&](const auto&... parts) {
    if (reasons != nullptr) reasons->push_back(sentence(parts...));
  };
  plan.error = why_not(r);
  if (!plan.error.empty()) return plan;
  Wish wish;
  if (!parse(wanted, &wish)) {
    plan.error = sentence("FASTPROTO_CUDA_KERNELS: found '", wanted, "'; allowed: sm80, ",
                          "sm80-latency, sm80-throughput, sm90, sm90-latency, sm90-throughput");
    return plan;
  }

  // The family.
  const char* reason = why_not_sm90(r);
  if (wish.sm90 && reason != nullptr) {
    plan.error =
        sentence("FASTPROTO_CUDA_KERNELS: found '", wanted, "', which cannot run here: ", reason,
                 "; allowed: sm80, sm80-latency, sm80-throughput");
    return plan;
  }
  const bool sm90 = reason == nullptr && !wish.sm80;
  if (wish.sm80)
    say("not sm90: FASTPROTO_CUDA_KERNELS asks for sm80.");
  else if (reason != nullptr)
    say("not sm90: ", reason, ".");
  else
    say("sm90: half types on capability 9.0, in steps of 16 bytes.");

  // Throughput or latency. Of sm90 the latency kernel pays as long as it has a multiprocessor for
  // every block (measured on an H200, benchmarks/results).
  int64_t blocks = r.episodes * r.queries * r.ways * ceil_div(r.pixels, 64);
  if (sm90) {
    plan.forward = plan_sm90_forward(r, true);
    blocks = plan.forward.blocks;
  }
  const bool few = sm90 ? blocks <= r.multiprocessors : blocks < r.multiprocessors;
  const bool small = wish.latency || (few && !wish.throughput);
  if (wish.latency || wish.throughput)
    say(small ? "latency" : "throughput", ": FASTPROTO_CUDA_KERNELS asks for it.");
  else if (sm90)
    say(few ? "latency: its " : "throughput: latency's ", blocks, " blocks are ",
        few ? "no more" : "more", " than the ", r.multiprocessors, " multiprocessors.");
  else
    say(few ? "latency: " : "throughput: ", blocks, " tiles of 64 pixels are ",
        few ? "fewer than the " : "enough for the ", r.multiprocessors, " multiprocessors.");

  if (sm90) {
    if (!small) plan.forward = plan_sm90_forward(r, false);
  } else {
    plan.forward = plan_sm80_forward(r, small);
    if (!small && plan.forward.tile_m == 16)
      say("forward: 16 pixels a block: 64 leave no room for prototypes in ", r.shared_memory,
          " bytes.");
    if (small && plan.forward.slices == 1)
      say("forward: all channels in one block: slices of 64 would be more than ",
          2 * r.multiprocessors, " blocks.");
    if (plan.forward.stages == 1) say("forward: one tile of prototypes at a time: two do not fit.");
  }

  // Statistics of the prototypes: the latency kernels find them on their way, where a block sees
  // whole rows and nobody needs them later.
  if (finds_statistics(r, plan.forward)) {
    say("stats: none: the forward finds them on its way, which spares a launch.");
  } else if (r.total == 0) {
    say("stats: none: there are no prototypes.");
  } else {
    plan.stats.kernel = Kernel::kSm80Throughput;
    plan.stats.tile_n = 8;  // a warp each
    plan.stats.threads = 256;
    plan.stats.blocks = int(ceil_div(r.total, 8));
    say("stats: ", r.save ? "the backward reads them." : "the forward needs them beforehand.");
  }

  // The families leave and read the same statistics.
  if (sm90) {
    plan_sm90_backward(r, !wish.throughput, &plan);
    if (r.save && plan.backward_query.cluster + plan.backward_protos.cluster > 2)
      say("backward: clusters share a tile: one block each would leave multiprocessors idle.");
  } else
    plan_sm80_backward(r, small, &plan);

  for (const KernelPlan* one : {&plan.forward, &plan.backward_query, &plan.backward_protos}) {
    if (one->shared_bytes <= r.shared_memory || (one != &plan.forward && !r.save)) continue;
    plan.error =
        sentence("feat: the kernel for ", padded_dim(r.dim), " channels takes ", one->shared_bytes,
                 " bytes of shared memory in this dtype; the GPU has ", r.shared_memory);
  }
  return plan;
}

}  // namespace fastproto::cuda
