// SPDX-License-Identifier: Apache-2.0
// proto_attention on CUDA: check, allocate, plan, launch. Nothing here reads a tensor's values,
// which would be to wait for the device: kernels answer those that make no sense with NaN.
//
// Compiled for GPUs, and for their emulation (python_tests/support/emulator): as ops of CPU
// tensors.
#include <cstdlib>
#include <optional>
#include <tuple>

#include "../cuda/kernels.h"
#include "../cuda/sm90/backward.h"
#include "checks.h"
#include "device.h"
#include "layout.h"

namespace fastproto::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "proto_attention";

#ifdef FASTPROTO_SM90
constexpr bool kHasSm90 = true;
#define FP_LAUNCHER(plan, name)                                                                   \
  ((plan).kernel == Kernel::kSm90Latency || (plan).kernel == Kernel::kSm90Throughput ? sm90::name \
                                                                                     : sm80::name)
#else
constexpr bool kHasSm90 = false;
#define FP_LAUNCHER(plan, name) sm80::name
#endif

// ---------------------------------------------------------------- arguments

// Maps [..., C, H, W] in memory that the kernels can walk: themselves where they are, else a copy.
// An image must lie within 32-bit offsets.
Tensor walkable(const Tensor& maps, bool channels_last) {
  const int64_t n = maps.dim(), channels = maps.size(n - 3);
  const int64_t pixels = maps.size(n - 2) * maps.size(n - 1);
  if (maps.numel() == 0) return maps;
  const int64_t reach = (channels - 1) * maps.stride(n - 3) + (pixels - 1) * pixel_stride(maps, 1);
  return is_walkable(maps, channels_last) && reach <= INT32_MAX ? maps : dense(maps, channels_last);
}

// What both ops make of their arguments.
struct Call {
  OnDevice device;
  Chip chip;
  DType dtype;
  bool channels_last;  // all maps of the call
  Tensor feat, protos, offsets;
  Problem problem;

  explicit Call(const Tensor& tensor) : device(tensor) {}

  int64_t images() const { return int64_t(problem.episodes) * problem.queries; }
  bool is_empty() const { return images() * problem.pixels == 0; }

  // The flat tensor that the forward leaves for the backward: lse, query, protos.
  int64_t lse_size() const { return images() * problem.ways * problem.pixels; }
  int64_t protos_size() const { return 2 * int64_t(problem.total); }
  int64_t statistics_size() const {
    return lse_size() + 2 * images() * problem.pixels + protos_size();
  }
  Statistics statistics_at(const Tensor& stats) const {
    float* data = static_cast<float*>(stats.data_ptr());
    return {data + statistics_size() - protos_size(), data + lse_size(), data};
  }
  // New maps [E, Q, K, channels, H, W].
  Tensor new_stack(int64_t channels) const {
    return new_maps(
        feat,
        {problem.episodes, problem.queries, problem.ways, channels, feat.size(3), feat.size(4)},
        channels_last);
  }
  Tensor new_floats(int64_t count) const {
    return torch::stable::new_empty(feat, {count}, ScalarType::Float);
  }

  // What both passes are told alike.
  template <class Params>
  Params params() const {
    Params p = {};
    p.problem = problem;
    p.feat = strided(feat, channels_last);
    p.protos = protos.data_ptr();
    p.offsets = static_cast<const int32_t*>(offsets.data_ptr());
    return p;
  }
  // `tma_ok`: see Request.
  Plan plan(bool save, bool tma_ok) const {
    const Problem& p = problem;
    const Request request{chip.capability,
                          chip.multiprocessors,
                          chip.shared_memory,
                          dtype,
                          p.episodes,
                          p.queries,
                          p.ways,
                          p.dim,
                          p.pixels,
                          p.total,
                          save,
                          tma_ok,
                          kHasSm90};
    const Plan plan = make_plan(request, std::getenv("FASTPROTO_CUDA_KERNELS"));
    FP_CHECK(plan.error.empty(), plan.error, ".");
    return plan;
  }
};

Call prepare(const Tensor& feat, const Tensor& protos, const Tensor& offsets,
             const std::optional<Tensor>& temperature_tensor, double temperature, double eps,
             bool concat, bool tf32) {
  Call c(feat);
  c.chip = c.device.chip();
  c.dtype = dtype_of(feat);
  const bool has_tensor = temperature_tensor.has_value();
  const int64_t episodes = feat.size(0), queries = feat.size(1), dim = feat.size(2);
  const int64_t ways = (offsets.size(0) - 1) / episodes, pixels = feat.size(3) * feat.size(4);
  const int64_t total = protos.size(0);
  // Before sizes become 32-bit; what fits into a grid is the plan's to say.
  for (const int64_t size : {episodes * queries * ways, dim, pixels, total})
    FP_CHECK(size <= INT32_MAX, "found a size of ", size, "; allowed: at most ", INT32_MAX, ".");

  c.channels_last = is_channels_last(feat);
  c.feat = walkable(feat, c.channels_last);
  c.protos = dense(protos, false);
  c.offsets = dense(offsets, false);
  // The bound |c| <= 1 instead: float16's smallest number is 6e-8, and a tensor's value is unknown.
  constexpr double kSmallestBounded = 2.0 / 60;
  const bool running_max =
      c.dtype == DType::kFloat16 || has_tensor || temperature < kSmallestBounded;
  c.problem = {{int32_t(episodes), int32_t(queries), int32_t(ways), int32_t(dim), int32_t(pixels),
                int32_t(total), concat, float(temperature), float(eps)},
               running_max,
               tf32 ? Float32Precision::kTf32 : Float32Precision::kTf32x3,
               has_tensor ? temperature_tensor->data_ptr() : nullptr,
               has_tensor && temperature_tensor->scalar_type() == ScalarType::Double};
  return c;
}

// ---------------------------------------------------------------- the ops

template <class Params>
void launch(const char* (*launcher)(const Params&, DType, const KernelPlan&, void*),
            const Params& p, const Call& c, const KernelPlan& plan, const char* kernel) {
  check_launch(launcher(p, c.dtype, plan, c.device.stream()), kOp, kernel);
}

std::tuple<Tensor, Tensor, Tensor> proto_attention_fwd(Tensor feat, Tensor protos, Tensor offsets,
                                                       std::optional<Tensor> temperature_tensor,
                                                       double temperature, double eps, bool concat,
                                                       bool save_for_backward, bool tf32) {
  const Call c = prepare(feat, protos, offsets, temperature_tensor, temperature, eps, concat, tf32);
  const int64_t dim = c.problem.dim;
  Tensor out = c.new_stack(concat ? 2 * dim : dim);
  Tensor agg = save_for_backward ? c.new_stack(dim) : torch::stable::new_empty(feat, {0});
  Tensor stats = c.new_floats(save_for_backward ? c.statistics_size() : 0);
  auto p = c.params<ForwardParams>();
  p.out = dense_maps(out, c.channels_last);
  if (save_for_backward) {
    p.agg = dense_maps(agg, c.channels_last);
    p.statistics = c.statistics_at(stats);
  }
  const Plan plan = c.plan(save_for_backward, sm90::vectors_apply(p));
  const bool has_stats = plan.stats.kernel != Kernel::kNone;
  // Without a backward: room for the prototypes' statistics, dropped on return. The memory is not
  // handed out to another stream before this one is done with it.
  std::optional<Tensor> room;
  if (has_stats && !save_for_backward) {
    room = c.new_floats(c.protos_size());
    p.statistics.protos = static_cast<float*>(room->data_ptr());
  }
  if (has_stats)
    check_launch(sm80::launch_proto_stats(p, c.dtype, c.device.stream()), kOp, "proto_stats");
  if (!c.is_empty())
    launch(FP_LAUNCHER(plan.forward, launch_forward), p, c, plan.forward,
           kernel_name(plan.forward.kernel));
  return {out, agg, stats};
}

Tensor call_op(const char* op, const char* overload, const Tensor& a,
               const std::optional<Tensor>& b = std::nullopt) {
  using torch::stable::detail::from;
  StableIValue stack[2] = {from(a), b.has_value() ? from(*b) : StableIValue{}};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// -(1/t) sum of dS c, in t's type.
Tensor temperature_gradient(const Tensor& terms, const Tensor& t) {
  const Tensor sum = torch::stable::to(torch::stable::sum(terms), t.scalar_type());
  const Tensor quotient = call_op("aten::div", "Tensor", sum, torch::stable::reshape(t, {1}));
  return call_op("aten::neg", "", quotient);
}

std::tuple<Tensor, Tensor, Tensor> proto_attention_bwd(Tensor grad_out, Tensor feat, Tensor protos,
                                                       Tensor offsets,
                                                       std::optional<Tensor> temperature_tensor,
                                                       Tensor agg, Tensor stats, double temperature,
                                                       double eps, bool concat, bool needs_protos,
                                                       bool needs_temperature, bool tf32) {
  FP_CHECK(agg.dim() == 6, "agg: found none; allowed: that of a forward with save_for_backward.");
  const Call c = prepare(feat, protos, offsets, temperature_tensor, temperature, eps, concat, tf32);
  const Problem& s = c.problem;
  Tensor grad_feat =
      new_maps(feat, {s.episodes, s.queries, s.dim, feat.size(3), feat.size(4)}, c.channels_last);
  Tensor grad_protos = torch::stable::new_empty(
      protos, needs_protos ? std::vector<int64_t>{s.total, s.dim} : std::vector<int64_t>{0});
  Tensor grad_temperature = c.new_floats(0);
  if (c.is_empty()) {  // no pixel: no gradient
    if (needs_protos) torch::stable::zero_(grad_protos);
    if (needs_temperature) grad_temperature = torch::stable::new_zeros(*temperature_tensor, {1});
    return {grad_feat, grad_protos, grad_temperature};
  }

  const Tensor grad = walkable(grad_out, c.channels_last);
  const Tensor saved = dense(agg, c.channels_last), statistics = dense(stats, false);
  const Tensor delta = c.new_floats(c.lse_size());
  auto p = c.params<BackwardParams>();
  p.grad_out = strided(grad, c.channels_last);
  p.statistics = c.statistics_at(statistics);
  p.agg = dense_maps(saved, c.channels_last);
  p.delta = static_cast<float*>(delta.data_ptr());
  p.grad_feat = dense_maps(grad_feat, c.channels_last);
  p.grad_protos = needs_protos ? grad_protos.data_ptr() : nullptr;
  const Plan plan =
      c.plan(true, sm90::backward_query_applies(p) && sm90::backward_protos_applies(p));
  const KernelPlan &query = plan.backward_query, &rows = plan.backward_protos;
  std::optional<Tensor> terms;
  if (needs_temperature) {
    terms = c.new_floats(query.blocks / query.slices);
    p.temperature_terms = static_cast<float*>(terms->data_ptr());
  }
  launch(FP_LAUNCHER(query, launch_backward_query), p, c, query, "backward_query");
  if (needs_protos && s.total > 0)
    launch(FP_LAUNCHER(rows, launch_backward_protos), p, c, rows, "backward_protos");
  if (needs_temperature) grad_temperature = temperature_gradient(*terms, *temperature_tensor);
  return {grad_feat, grad_protos, grad_temperature};
}

}  // namespace
}  // namespace fastproto::cuda

STABLE_TORCH_LIBRARY_IMPL(fastproto, CUDA, m) {
  m.impl("proto_attention_fwd", TORCH_BOX(&fastproto::cuda::proto_attention_fwd));
  m.impl("proto_attention_bwd", TORCH_BOX(&fastproto::cuda::proto_attention_bwd));
}
