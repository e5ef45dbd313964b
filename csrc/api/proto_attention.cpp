// SPDX-License-Identifier: Apache-2.0
// proto_attention on the CPU: check, allocate, fill the parameter struct, share out the tasks.
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

// A dense [..., C, H, W] tensor as a stack of maps.
Maps maps_of(const Tensor& t, bool channels_last) {
  const int64_t n = t.dim(), channels = t.size(n - 3), pixels = t.size(n - 2) * t.size(n - 1);
  return {t.data_ptr(), channels_last ? 1 : pixels, channels_last ? channels : 1,
          channels * pixels};
}

struct Checked {
  ProtoAttnShape shape;
  DType dtype;
  bool channels_last;
  Tensor feat;
  Tensor protos;
  Tensor offsets;

  Features features() const {
    const int64_t pixel = pixel_stride(feat, channels_last ? feat.size(2) : 1);
    return {feat.data_ptr(), feat.stride(0), feat.stride(1), channels_last ? 1 : feat.stride(2),
            pixel};
  }
  Bags bags() const { return {protos.data_ptr(), static_cast<const int32_t*>(offsets.data_ptr())}; }
};

double temperature_of(const std::optional<Tensor>& tensor, double number, const Tensor& feat) {
  double t = number;
  if (tensor.has_value()) {
    check_temperature_tensor(*tensor, feat);
    t = tensor->scalar_type() == ScalarType::Double
            ? *static_cast<const double*>(tensor->data_ptr())
            : double(*static_cast<const float*>(tensor->data_ptr()));
  }
  FP_CHECK(t > 0, "temperature: found ", t, "; allowed: a number above 0.");
  return t;
}

Checked check(const Tensor& feat, const Tensor& protos, const Tensor& offsets,
              const std::optional<Tensor>& temperature_tensor, double temperature, double eps,
              bool concat) {
  check_inputs(feat, protos, offsets, eps);
  const int64_t episodes = feat.size(0), bags = offsets.size(0) - 1;
  Checked c;
  const std::optional<DType> dtype = dtype_of(feat);
  FP_CHECK(dtype.has_value(),
           "feat: found another dtype; allowed: float32, bfloat16, float16, float64.");
  c.dtype = *dtype;
  c.channels_last = is_channels_last(feat);
  c.feat = is_walkable(feat, c.channels_last) ? feat : dense(feat, c.channels_last);
  c.protos = dense(protos, false);
  c.offsets = dense(offsets, false);
  const int32_t* starts = static_cast<const int32_t*>(c.offsets.data_ptr());
  FP_CHECK(starts[0] == 0, "offsets: found ", starts[0], " first; allowed: 0.");
  for (int64_t i = 0; i < bags; ++i)
    FP_CHECK(starts[i] <= starts[i + 1], "offsets: found ", starts[i], " before ", starts[i + 1],
             " at position ", i, "; allowed: numbers that never fall.");
  FP_CHECK(starts[bags] <= protos.size(0), "offsets: found ", starts[bags],
           " last; allowed: at most the rows of protos, ", protos.size(0), ".");
  c.shape = {episodes,
             feat.size(1),
             bags / episodes,
             feat.size(2),
             feat.size(3) * feat.size(4),
             protos.size(0),
             concat,
             temperature_of(temperature_tensor, temperature, feat),
             eps};
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
  TaskQueue queue{0, tasks, grain};
  const int64_t runs = (tasks + grain - 1) / grain;
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), runs);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) worker(queue, worker_memory().at_least(scratch_bytes));
  });
}

// Bytes of a number in the kernels' panels.
int64_t item_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

ScalarType accumulate_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor, Tensor> proto_attention_fwd(Tensor feat, Tensor protos, Tensor offsets,
                                                       std::optional<Tensor> temperature_tensor,
                                                       double temperature, double eps, bool concat,
                                                       bool save_for_backward, bool /*tf32*/) {
  const Checked c = check(feat, protos, offsets, temperature_tensor, temperature, eps, concat);
  const ProtoAttnShape& s = c.shape;
  const int64_t height = feat.size(3), width = feat.size(4);
  Tensor out =
      new_maps(feat, {s.episodes, s.queries, s.ways, concat ? 2 * s.dim : s.dim, height, width},
               c.channels_last);
  Tensor agg = save_for_backward
                   ? new_maps(feat, {s.episodes, s.queries, s.ways, s.dim, height, width},
                              c.channels_last, accumulate_type(c.dtype))
                   : torch::stable::new_empty(feat, {0}, accumulate_type(c.dtype));
  Tensor stats = torch::stable::new_empty(
      feat,
      save_for_backward ? std::vector<int64_t>{s.episodes, s.queries, s.ways, 3, s.pixels}
                        : std::vector<int64_t>{0},
      accumulate_type(c.dtype));

  ProtoAttnFwdParams p{s, c.features(), c.bags(), maps_of(out, c.channels_last), {}, nullptr};
  if (save_for_backward) {
    p.agg = maps_of(agg, c.channels_last);
    p.stats = stats.data_ptr();
  }
  const int64_t images = s.episodes * s.queries, threads = torch::stable::get_num_threads();
  const cpu::Tiling tiling = cpu::plan_forward(s, threads, item_bytes(c.dtype));
  const int64_t tiles = images * tiling.tiles(s);
  if (tiles * s.ways > 0) {
    const auto& table = cpu::kernels(cpu::current_level());
    // All classes of a tile in a row reuse its panels; shared out singly when tiles are few.
    const int64_t grain = tiles >= 2 * threads ? s.ways : 1;
    int64_t scratch = table.forward_scratch(c.dtype, s, tiling);
    // One piece for both passes: the heap would keep a smaller one beside it.
    if (save_for_backward)
      scratch = std::max(
          scratch, table.backward_scratch(c.dtype, s, cpu::plan_backward(s, item_bytes(c.dtype))));
    run_tasks(tiles * s.ways, grain, scratch, [&](TaskQueue& queue, void* memory) {
      table.forward(c.dtype, p, tiling, queue, memory);
    });
  }
  return {out, agg, stats};
}

// Runs one pass of the backward over all tasks.
void run_backward(const cpu::KernelTable& table, DType dtype, const ProtoAttnBwdParams& p,
                  cpu::BackwardPass pass, int64_t tasks, int64_t scratch) {
  std::vector<int32_t> done(size_t(tasks), 0);
  pass.done = done.data();
  run_tasks(tasks, 1, scratch,
            [&](TaskQueue& queue, void* memory) { table.backward(dtype, p, pass, queue, memory); });
}

std::tuple<Tensor, Tensor, Tensor> proto_attention_bwd(Tensor grad_out, Tensor feat, Tensor protos,
                                                       Tensor offsets,
                                                       std::optional<Tensor> temperature_tensor,
                                                       Tensor agg, Tensor stats, double temperature,
                                                       double eps, bool concat, bool needs_protos,
                                                       bool needs_temperature, bool /*tf32*/) {
  const Checked c = check(feat, protos, offsets, temperature_tensor, temperature, eps, concat);
  const ProtoAttnShape& s = c.shape;
  check_rank(grad_out, "grad_out", 6, "[E, Q, K, 2D or D, H, W]");
  check_rank(agg, "agg", 6,
             "[E, Q, K, D, H, W]: the forward must be called with save_for_backward");
  FP_CHECK(grad_out.scalar_type() == feat.scalar_type() &&
               agg.scalar_type() == accumulate_type(c.dtype) &&
               stats.scalar_type() == accumulate_type(c.dtype),
           "grad_out, agg, stats: found another dtype; allowed: those of the forward.");
  const int64_t maps = s.episodes * s.queries * s.ways;
  FP_CHECK(grad_out.numel() == maps * s.pixels * s.dim * (concat ? 2 : 1) &&
               agg.numel() == maps * s.pixels * s.dim && stats.numel() == 3 * maps * s.pixels,
           "grad_out, agg, stats: found other sizes; allowed: those of the forward.");
  const Tensor grad = dense(grad_out, c.channels_last);
  const Tensor saved = dense(agg, c.channels_last);

  Tensor grad_feat =
      new_maps(feat, {s.episodes, s.queries, s.dim, feat.size(3), feat.size(4)}, c.channels_last);
  Tensor grad_protos = torch::stable::new_empty(
      protos, needs_protos ? std::vector<int64_t>{s.total, s.dim} : std::vector<int64_t>{0});
  Tensor grad_temperature = needs_temperature
                                ? torch::stable::new_zeros(*temperature_tensor, {1})
                                : torch::stable::new_empty(feat, {0}, accumulate_type(c.dtype));

  const cpu::Tiling tiling = cpu::plan_backward(s, item_bytes(c.dtype));
  const int64_t tasks = s.episodes * s.queries * tiling.tiles(s);
  std::vector<double> parts(needs_temperature ? size_t(tasks) : 0);
  const ProtoAttnBwdParams p{s,
                             c.features(),
                             c.bags(),
                             maps_of(grad, c.channels_last),
                             maps_of(saved, c.channels_last),
                             stats.data_ptr(),
                             maps_of(grad_feat, c.channels_last),
                             needs_protos ? grad_protos.data_ptr() : nullptr,
                             needs_temperature ? parts.data() : nullptr};
  // Rows past the last bag are unused capacity.
  const int64_t bags = s.episodes * s.ways;
  const int64_t used = tasks > 0 ? static_cast<const int32_t*>(c.offsets.data_ptr())[bags] : 0;
  if (needs_protos && used < s.total) {
    Tensor unused = torch::stable::narrow(grad_protos, 0, used, s.total - used);
    torch::stable::zero_(unused);
  }
  if (tasks > 0) {
    const auto& table = cpu::kernels(cpu::current_level());
    const int64_t scratch = table.backward_scratch(c.dtype, s, tiling);
    const int64_t item = item_bytes(c.dtype), row = s.dim * item;
    // Sums of half types need a wider buffer; where that outgrows its limit, groups of prototypes
    // get passes of their own.
    constexpr int64_t kMostSums = int64_t(4) << 20;
    const bool in_place = int64_t(grad_protos.element_size()) == item;
    const int64_t rows = in_place ? used : std::min(used, std::max<int64_t>(kMostSums / row, 64));
    const int64_t chunk = needs_protos ? rows : 0;
    std::vector<char> along(size_t(chunk * item)), sums(size_t(in_place ? 0 : chunk * row));
    void* target = in_place ? grad_protos.data_ptr() : sums.data();
    cpu::BackwardPass pass{tiling, true,         0,      chunk == used ? used : 0,
                           target, along.data(), nullptr};
    run_backward(table, c.dtype, p, pass, tasks, scratch);
    pass.want_feat = false;
    for (pass.begin = pass.end; chunk > 0 && pass.begin < used; pass.begin = pass.end) {
      pass.end = std::min(pass.begin + chunk, used);
      run_backward(table, c.dtype, p, pass, tasks, scratch);
    }
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
