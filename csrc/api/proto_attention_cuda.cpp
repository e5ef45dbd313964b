// SPDX-License-Identifier: Apache-2.0
// proto_attention on CUDA: check, allocate, plan, launch. Nothing here reads a tensor's values,
// which would be to wait for the device: kernels answer those that make no sense with NaN.
//
// With FASTPROTO_EMULATE the same for CPU tensors, as ops of another library, on the emulated
// kernels (python_tests/support/emulator.py).
#ifndef FASTPROTO_EMULATE
#include <cuda_runtime.h>
#endif

#include <cstdlib>
#include <mutex>
#include <optional>
#include <tuple>

#include "../cuda/kernels.h"
#include "../cuda/sm90/backward.h"
#include "checks.h"
#include "device.h"
#include "layout.h"
#include "schemas.h"

namespace fastproto::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "proto_attention";

// ---------------------------------------------------------------- the device

struct Chip {
  int capability, multiprocessors, shared_memory;
};

#ifdef FASTPROTO_EMULATE

// What the emulation pretends to be: an H200, or a chip of the capability that is asked for.
Chip chip_of(const Tensor&) {
  const char* asked = std::getenv("FASTPROTO_EMULATE_CAPABILITY");
  const int capability = asked != nullptr ? std::atoi(asked) : 90;
  return capability == 90 ? Chip{90, 132, 227 * 1024} : Chip{capability, 108, 163 * 1024};
}

#else

Chip chip_of(const Tensor& tensor) {
  constexpr int kMost = 64;
  static std::once_flag once[kMost];
  static Chip chips[kMost];
  const int device = tensor.get_device_index();
  FP_CHECK(device >= 0 && device < kMost, "found device ", device, "; allowed: 0 to ", kMost - 1,
           ".");
  std::call_once(once[device], [device] {
    const auto ask = [device](cudaDeviceAttr attribute) {
      int value = 0;
      const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
      FP_CHECK(error == cudaSuccess, "device ", device, ": ", cudaGetErrorString(error), ".");
      return value;
    };
    chips[device] = {
        10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor),
        ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  });
  return chips[device];
}

#endif

#ifdef FASTPROTO_SM90
constexpr bool kHasSm90 = true;
#else
constexpr bool kHasSm90 = false;
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
  Chip chip;
  DType dtype;
  bool channels_last;  // all maps of the call
  Tensor feat, protos, offsets;
  Strided feat_strides;
  Problem problem;

  const int32_t* starts() const { return static_cast<const int32_t*>(offsets.data_ptr()); }
  int64_t images() const { return int64_t(problem.episodes) * problem.queries; }
  int64_t maps() const { return images() * problem.ways; }
  bool is_empty() const { return images() * problem.pixels == 0; }

  // `tma_ok`: see Request.
  Plan plan(bool save, bool tma_ok) const {
    const Request request{chip.capability,
                          chip.multiprocessors,
                          chip.shared_memory,
                          dtype,
                          problem.episodes,
                          problem.queries,
                          problem.ways,
                          problem.dim,
                          problem.pixels,
                          problem.total,
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
  Call c;
  c.chip = chip_of(feat);
  c.dtype = dtype_of(feat);
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
  c.feat_strides = strided(c.feat, c.channels_last);
  Problem& p = c.problem;
  p = {};
  p.episodes = int32_t(episodes);
  p.queries = int32_t(queries);
  p.ways = int32_t(ways);
  p.dim = int32_t(dim);
  p.pixels = int32_t(pixels);
  p.total = int32_t(total);
  p.concat = concat;
  // The bound |c| <= 1 instead: float16's smallest number is 6e-8, and a tensor's value is unknown.
  constexpr double kSmallestBounded = 2.0 / 60;
  p.running_max = c.dtype == DType::kFloat16 || temperature_tensor.has_value() ||
                  temperature < kSmallestBounded;
  p.precision = tf32 ? Float32Precision::kTf32 : Float32Precision::kTf32x3;
  p.eps = float(eps);
  p.temperature = float(temperature);
  if (temperature_tensor.has_value()) {
    p.temperature_tensor = temperature_tensor->data_ptr();
    p.temperature_is_double = temperature_tensor->scalar_type() == ScalarType::Double;
  }
  return c;
}

// The flat tensor that the forward leaves for the backward.
struct StatisticsLayout {
  int64_t lse, query, protos;
  explicit StatisticsLayout(const Call& c)
      : lse(c.maps() * c.problem.pixels),
        query(2 * c.images() * c.problem.pixels),
        protos(2 * int64_t(c.problem.total)) {}
  int64_t total() const { return lse + query + protos; }
  Statistics at(const Tensor& stats) const {
    float* data = static_cast<float*>(stats.data_ptr());
    return {data + lse + query, data + lse, data};
  }
};

#ifdef FASTPROTO_SM90
bool is_sm90(Kernel kernel) {
  return kernel == Kernel::kSm90Latency || kernel == Kernel::kSm90Throughput;
}
#define FP_LAUNCH(function, plan, ...) \
  (is_sm90((plan).kernel) ? sm90::function(__VA_ARGS__) : sm80::function(__VA_ARGS__))
#else
#define FP_LAUNCH(function, plan, ...) sm80::function(__VA_ARGS__)
#endif

// ---------------------------------------------------------------- the ops

std::tuple<Tensor, Tensor, Tensor> proto_attention_fwd(Tensor feat, Tensor protos, Tensor offsets,
                                                       std::optional<Tensor> temperature_tensor,
                                                       double temperature, double eps, bool concat,
                                                       bool save_for_backward, bool tf32) {
  const OnDevice device(feat);
  const Call c = prepare(feat, protos, offsets, temperature_tensor, temperature, eps, concat, tf32);
  const Problem& s = c.problem;
  const StatisticsLayout layout(c);

  const auto new_stack = [&](int64_t channels) {
    return new_maps(feat, {s.episodes, s.queries, s.ways, channels, feat.size(3), feat.size(4)},
                    c.channels_last);
  };
  Tensor out = new_stack(concat ? 2 * int64_t(s.dim) : s.dim);
  Tensor agg = save_for_backward ? new_stack(s.dim) : torch::stable::new_empty(feat, {0});
  Tensor stats =
      torch::stable::new_empty(feat, {save_for_backward ? layout.total() : 0}, ScalarType::Float);
  ForwardParams p = {};
  p.problem = s;
  p.feat = c.feat_strides;
  p.protos = c.protos.data_ptr();
  p.offsets = c.starts();
  p.out = dense_maps(out, c.channels_last);
  if (save_for_backward) {
    p.agg = dense_maps(agg, c.channels_last);
    p.statistics = layout.at(stats);
  }
  const Plan plan = c.plan(save_for_backward, sm90::vectors_apply(p));
  const bool has_stats = plan.stats.kernel != Kernel::kNone;
  // Without a backward: room for the prototypes' statistics, dropped on return. The memory is not
  // handed out to another stream before this one is done with it.
  std::optional<Tensor> room;
  if (has_stats && !save_for_backward) {
    room = torch::stable::new_empty(feat, {layout.protos}, ScalarType::Float);
    p.statistics.protos = static_cast<float*>(room->data_ptr());
  }
  void* const stream = device.stream();
  if (has_stats) check_launch(sm80::launch_proto_stats(p, c.dtype, stream), kOp, "proto_stats");
  if (!c.is_empty())
    check_launch(FP_LAUNCH(launch_forward, plan.forward, p, c.dtype, plan.forward, stream), kOp,
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
  const OnDevice device(feat);
  const Call c = prepare(feat, protos, offsets, temperature_tensor, temperature, eps, concat, tf32);
  const Problem& s = c.problem;
  const StatisticsLayout layout(c);
  Tensor grad_feat =
      new_maps(feat, {s.episodes, s.queries, s.dim, feat.size(3), feat.size(4)}, c.channels_last);
  Tensor grad_protos = torch::stable::new_empty(
      protos, needs_protos ? std::vector<int64_t>{s.total, s.dim} : std::vector<int64_t>{0});
  if (c.is_empty()) {  // no pixel: no gradient
    if (needs_protos) torch::stable::zero_(grad_protos);
    return {grad_feat, grad_protos,
            needs_temperature ? torch::stable::new_zeros(*temperature_tensor, {1})
                              : torch::stable::new_empty(feat, {0}, ScalarType::Float)};
  }

  const Tensor grad = walkable(grad_out, c.channels_last);
  const Tensor saved = dense(agg, c.channels_last), statistics = dense(stats, false);
  BackwardParams p = {};
  p.problem = s;
  p.feat = c.feat_strides;
  p.grad_out = strided(grad, c.channels_last);
  p.protos = c.protos.data_ptr();
  p.offsets = c.starts();
  p.statistics = layout.at(statistics);
  p.agg = dense_maps(saved, c.channels_last);
  p.grad_feat = dense_maps(grad_feat, c.channels_last);
  p.grad_protos = needs_protos ? grad_protos.data_ptr() : nullptr;
  const Plan plan =
      c.plan(true, sm90::backward_query_applies(p) && sm90::backward_protos_applies(p));
  const Tensor delta = torch::stable::new_empty(feat, {layout.lse}, ScalarType::Float);
  p.delta = static_cast<float*>(delta.data_ptr());
  std::optional<Tensor> terms;
  if (needs_temperature) {
    const int tiles = plan.backward_query.blocks / plan.backward_query.slices;
    terms = torch::stable::new_empty(feat, {tiles}, ScalarType::Float);
    p.temperature_terms = static_cast<float*>(terms->data_ptr());
  }

  void* const stream = device.stream();
  check_launch(FP_LAUNCH(launch_backward_query, plan.backward_query, p, c.dtype,
                         plan.backward_query, stream),
               kOp, "backward_query");
  if (needs_protos && s.total > 0)
    check_launch(FP_LAUNCH(launch_backward_protos, plan.backward_protos, p, c.dtype,
                           plan.backward_protos, stream),
                 kOp, "backward_protos");
  return {grad_feat, grad_protos,
          needs_temperature ? temperature_gradient(*terms, *temperature_tensor)
                            : torch::stable::new_empty(feat, {0}, ScalarType::Float)};
}

}  // namespace
}  // namespace fastproto::cuda

#ifdef FASTPROTO_EMULATE
STABLE_TORCH_LIBRARY(fastproto_emulated, m) {
  m.def(fastproto::kProtoAttentionFwd);
  m.def(fastproto::kProtoAttentionBwd);
}
STABLE_TORCH_LIBRARY_IMPL(fastproto_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastproto, CUDA, m) {
#endif
  m.impl("proto_attention_fwd", TORCH_BOX(&fastproto::cuda::proto_attention_fwd));
  m.impl("proto_attention_bwd", TORCH_BOX(&fastproto::cuda::proto_attention_bwd));
}
