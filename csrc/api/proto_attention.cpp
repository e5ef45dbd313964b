// SPDX-License-Identifier: Apache-2.0
// proto_attention on the CPU: check, allocate, fill the parameter struct, share out the tasks.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"
#include "checks.h"
#include "layout.h"

namespace fastproto {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What both ops make of their arguments.
struct Call {
  cpu::Problem problem;
  DType dtype;
  bool channels_last;  // all maps of the call
  Tensor feat, protos, offsets;

  const cpu::Kernels& kernels() const { return cpu::kernels(cpu::current_level(), dtype); }
  const int32_t* starts() const { return static_cast<const int32_t*>(offsets.data_ptr()); }
  int64_t images() const { return problem.episodes * problem.queries; }
  // Of a number in the kernels' panels: its bytes and type.
  int64_t item() const { return dtype == DType::kFloat64 ? 8 : 4; }
  ScalarType wide() const { return item() == 8 ? ScalarType::Double : ScalarType::Float; }
  // New [E, Q, K, channels, H, W].
  Tensor stack(int64_t channels, std::optional<ScalarType> dtype = std::nullopt) const {
    return new_maps(
        feat,
        {problem.episodes, problem.queries, problem.ways, channels, feat.size(3), feat.size(4)},
        channels_last, dtype);
  }
};

Call prepare(const Tensor& feat, const Tensor& protos, const Tensor& offsets,
             const std::optional<Tensor>& temperature_tensor, double temperature, double eps,
             bool concat) {
  Call c;
  c.dtype = dtype_of(feat);
  c.channels_last = is_channels_last(feat);
  c.feat = is_walkable(feat, c.channels_last) ? feat : dense(feat, c.channels_last);
  c.protos = dense(protos, false);
  c.offsets = dense(offsets, false);
  const int64_t episodes = feat.size(0), bags = offsets.size(0) - 1;
  const int32_t* starts = c.starts();
  FP_CHECK(starts[0] == 0 && std::is_sorted(starts, starts + bags + 1), "offsets: found ",
           starts[0],
           " first, or numbers that fall; allowed: 0 first, and numbers that never fall.");
  FP_CHECK(starts[bags] <= protos.size(0), "offsets: found ", starts[bags],
           " last; allowed: at most the rows of protos, ", protos.size(0), ".");
  if (temperature_tensor.has_value())
    temperature = temperature_tensor->scalar_type() == ScalarType::Double
                      ? *static_cast<const double*>(temperature_tensor->data_ptr())
                      : double(*static_cast<const float*>(temperature_tensor->data_ptr()));
  FP_CHECK(temperature > 0, "temperature: found ", temperature, "; allowed: a number above 0.");
  c.problem = {
      episodes,       feat.size(1), bags / episodes, feat.size(2), feat.size(3) * feat.size(4),
      protos.size(0), concat,       temperature,     eps};
  return c;
}

// Scratch memory of one worker. Kept per thread: fresh pages cost more than a small problem.
class WorkerMemory {
 public:
  void* at_least(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();  // before the next is taken: a thread never holds both
      memory_.reset(std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64));
      FP_CHECK(memory_ != nullptr, "found no memory for ", bytes, " bytes of scratch.");
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t size_ = 0;
};

// The calling thread's, for every pass: in run_tasks itself each would have its own.
WorkerMemory& worker_memory() {
  static thread_local WorkerMemory memory;
  return memory;
}

// Runs `worker(queue, scratch)` on as many threads as there are tasks for.
template <class Worker>
void run_tasks(int64_t tasks, int64_t grain, int64_t scratch_bytes, const Worker& worker) {
  cpu::TaskQueue queue{0, tasks, grain};
  const int64_t runs = (tasks + grain - 1) / grain;
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), runs);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) worker(queue, worker_memory().at_least(scratch_bytes));
  });
}

std::tuple<Tensor, Tensor, Tensor> proto_attention_fwd(Tensor feat, Tensor protos, Tensor offsets,
                                                       std::optional<Tensor> temperature_tensor,
                                                       double temperature, double eps, bool concat,
                                                       bool save_for_backward, bool /*tf32*/) {
  const Call c = prepare(feat, protos, offsets, temperature_tensor, temperature, eps, concat);
  const cpu::Problem& s = c.problem;
  Tensor out = c.stack(concat ? 2 * s.dim : s.dim), agg, stats;
  cpu::ForwardParams p{s,          strided(c.feat, c.channels_last), c.protos.data_ptr(),
                       c.starts(), dense_maps(out, c.channels_last), {},
                       nullptr};
  if (save_for_backward) {
    agg = c.stack(s.dim, c.wide());
    stats = torch::stable::new_empty(feat, {s.episodes, s.queries, s.ways, 3, s.pixels}, c.wide());
    p.agg = dense_maps(agg, c.channels_last);
    p.stats = stats.data_ptr();
  } else {
    agg = torch::stable::new_empty(feat, {0}, c.wide());
    stats = torch::stable::new_empty(feat, {0}, c.wide());
  }
  const int64_t threads = torch::stable::get_num_threads();
  const cpu::Tiling tiling = cpu::plan_forward(s, threads, c.item());
  const int64_t tiles = c.images() * tiling.tiles(s);
  if (tiles * s.ways == 0) return {out, agg, stats};
  const cpu::Kernels& kernels = c.kernels();
  // All classes of a tile in a row reuse its panels; shared out singly when tiles are few.
  const int64_t grain = tiles >= 2 * threads ? s.ways : 1;
  int64_t scratch = kernels.forward_scratch(s, tiling);
  // One piece for both passes: the heap would keep a smaller one beside it.
  if (save_for_backward)
    scratch = std::max(scratch, kernels.backward_scratch(s, cpu::plan_backward(s, c.item())));
  run_tasks(tiles * s.ways, grain, scratch, [&](cpu::TaskQueue& queue, void* memory) {
    kernels.forward(p, tiling, queue, memory);
  });
  return {out, agg, stats};
}

std::tuple<Tensor, Tensor, Tensor> proto_attention_bwd(Tensor grad_out, Tensor feat, Tensor protos,
                                                       Tensor offsets,
                                                       std::optional<Tensor> temperature_tensor,
                                                       Tensor agg, Tensor stats, double temperature,
                                                       double eps, bool concat, bool needs_protos,
                                                       bool needs_temperature, bool /*tf32*/) {
  FP_CHECK(agg.dim() == 6, "agg: found none; allowed: that of a forward with save_for_backward.");
  const Call c = prepare(feat, protos, offsets, temperature_tensor, temperature, eps, concat);
  const cpu::Problem& s = c.problem;
  const Tensor grad = dense(grad_out, c.channels_last), saved = dense(agg, c.channels_last);
  Tensor grad_feat =
      new_maps(feat, {s.episodes, s.queries, s.dim, feat.size(3), feat.size(4)}, c.channels_last);
  Tensor grad_protos = torch::stable::new_empty(
      protos, needs_protos ? std::vector<int64_t>{s.total, s.dim} : std::vector<int64_t>{0});
  Tensor grad_temperature = needs_temperature ? torch::stable::new_zeros(*temperature_tensor, {1})
                                              : torch::stable::new_empty(feat, {0}, c.wide());

  const cpu::Tiling tiling = cpu::plan_backward(s, c.item());
  const int64_t tasks = c.images() * tiling.tiles(s);
  std::vector<double> parts(needs_temperature ? size_t(tasks) : 0);
  const cpu::BackwardParams p{s,
                              strided(c.feat, c.channels_last),
                              c.protos.data_ptr(),
                              c.starts(),
                              dense_maps(grad, c.channels_last),
                              dense_maps(saved, c.channels_last),
                              stats.data_ptr(),
                              dense_maps(grad_feat, c.channels_last),
                              needs_protos ? grad_protos.data_ptr() : nullptr,
                              needs_temperature ? parts.data() : nullptr};
  // Rows past the last bag are unused capacity.
  const int64_t used = tasks > 0 ? c.starts()[s.episodes * s.ways] : 0;
  if (needs_protos && used < s.total) {
    Tensor unused = torch::stable::narrow(grad_protos, 0, used, s.total - used);
    torch::stable::zero_(unused);
  }
  if (tasks == 0) return {grad_feat, grad_protos, grad_temperature};

  const cpu::Kernels& kernels = c.kernels();
  // Sums of half types need a wider buffer; where that outgrows its limit, groups of prototypes
  // get passes of their own.
  constexpr int64_t kMostSums = int64_t(4) << 20;
  const int64_t row = s.dim * c.item();
  const bool in_place = int64_t(grad_protos.element_size()) == c.item();
  const int64_t rows = in_place ? used : std::min(used, std::max<int64_t>(kMostSums / row, 64));
  const int64_t chunk = needs_protos ? rows : 0;
  std::vector<char> along(size_t(chunk * c.item())), sums(size_t(in_place ? 0 : chunk * row));
  std::vector<int32_t> done;
  cpu::BackwardPass pass{tiling,
                         true,
                         0,
                         chunk == used ? used : 0,
                         in_place ? grad_protos.data_ptr() : sums.data(),
                         along.data(),
                         nullptr};
  const auto run = [&] {
    done.assign(size_t(tasks), 0);
    pass.done = done.data();
    run_tasks(
        tasks, 1, kernels.backward_scratch(s, tiling),
        [&](cpu::TaskQueue& queue, void* memory) { kernels.backward(p, pass, queue, memory); });
  };
  run();
  pass.want_feat = false;
  while (chunk > 0 && pass.end < used) {
    pass.begin = pass.end;
    pass.end = std::min(pass.begin + chunk, used);
    run();
  }
  if (needs_temperature) {
    double sum = 0;
    for (double part : parts) sum += part;
    torch::stable::fill_(grad_temperature, sum);
  }
  return {grad_feat, grad_protos, grad_temperature};
}

}  // namespace
}  // namespace fastproto

STABLE_TORCH_LIBRARY_IMPL(fastproto, CPU, m) {
  m.impl("proto_attention_fwd", TORCH_BOX(&fastproto::proto_attention_fwd));
  m.impl("proto_attention_bwd", TORCH_BOX(&fastproto::proto_attention_bwd));
}
