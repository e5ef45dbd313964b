// SPDX-License-Identifier: Apache-2.0
// Packing of prototypes on CUDA: check, allocate, fill the parameter struct, launch. With
// FASTPROTO_EMULATE the same on CPU tensors, for tests.
#include <limits>
#include <tuple>

#include "../cuda/pack.h"
#include "checks.h"
#include "device.h"
#include "layout.h"
#include "schemas.h"

#define FP_PACK_CHECK(condition, ...) STD_TORCH_CHECK(condition, kOp, ": ", __VA_ARGS__)

namespace fastproto {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "extract_prototypes";

DType pack_dtype(const Tensor& t) {
  const std::optional<DType> dtype = dtype_of(t);
  FP_PACK_CHECK(dtype.has_value() && *dtype != DType::kFloat64,
                "features: found another dtype; allowed: float32, bfloat16, float16.");
  return *dtype;
}

// Sizes of the problem, from the features' and the shares [E, K, C]; 32 bits hold all that follows.
cuda::PackShape pack_shape(int64_t episodes, int64_t ways, int64_t shots, int64_t pixels,
                           int64_t dim) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  FP_PACK_CHECK(episodes >= 1 && ways >= 1 && shots >= 1 && pixels >= 1 && dim >= 1,
                "features: found no element; allowed: at least one.");
  const int64_t bags = episodes * ways, cells = shots * pixels;
  FP_PACK_CHECK(bags * (cells + 1) <= kMost, "masks: found ", bags, " bags of ", cells + 1,
                " candidates; allowed: at most ", kMost, " candidates.");
  FP_PACK_CHECK(dim <= kMost && cuda::pack_blocks(bags, shots, pixels, dim) <= kMost,
                "features: found ", dim, " channels of so many cells; allowed: fewer.");
  return {int32_t(bags), int32_t(ways), int32_t(shots), int32_t(pixels), int32_t(dim)};
}

// See schemas.h.
std::tuple<Tensor, Tensor, Tensor, Tensor> pack_prototypes(Tensor features, Tensor share,
                                                           double threshold, bool append_global) {
  FP_PACK_CHECK(features.dim() == 5, "features: found ", features.dim(),
                " dimensions; allowed: 5, [E, S, D, h, w].");
  FP_PACK_CHECK(share.dim() == 3 && share.scalar_type() == ScalarType::Float,
                "share: found another dtype or number of dimensions; allowed: float32 [E, K, C].");
  FP_PACK_CHECK(is_same_device(features, share),
                "share: found another device than that of the features; allowed: the same.");
  const int64_t episodes = features.size(0), shots = features.size(1), dim = features.size(2);
  const int64_t pixels = features.size(3) * features.size(4), ways = share.size(1);
  FP_PACK_CHECK(share.size(0) == episodes && share.size(2) == shots * pixels,
                "share: found other sizes than the features'; allowed: [E, K, S*h*w].");
  const DType dtype = pack_dtype(features);
  const cuda::PackShape shape = pack_shape(episodes, ways, shots, pixels, dim);

  const Tensor maps = pixels_are_one_dim(features, pixel_stride(features, 1))
                          ? features
                          : dense(features, is_channels_last(features));
  const Tensor shares = dense(share, false);
  const int64_t bags = episodes * ways, candidates = shots * pixels + 1;
  Tensor protos = torch::stable::new_empty(features, {bags * candidates, dim});
  Tensor offsets = torch::stable::new_empty(share, {bags + 1}, ScalarType::Int);
  Tensor position = torch::stable::new_empty(share, {bags, candidates}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(share, {bags}, ScalarType::Int);
  Tensor mass = torch::stable::new_empty(share, {bags});
  cuda::PackParams p = {};
  p.shape = shape;
  p.features = maps.data_ptr();
  p.episode = maps.stride(0);
  p.shot = maps.stride(1);
  p.channel = maps.stride(2);
  p.pixel = pixel_stride(maps, 1);
  p.share = static_cast<const float*>(shares.data_ptr());
  p.threshold = float(threshold);
  p.append_global = append_global ? 1 : 0;
  p.position = static_cast<int32_t*>(position.data_ptr());
  p.counts = static_cast<int32_t*>(counts.data_ptr());
  p.mass = static_cast<float*>(mass.data_ptr());
  p.protos = protos.data_ptr();
  p.offsets = static_cast<int32_t*>(offsets.data_ptr());
  const cuda::OnDevice device(features);
  cuda::check_launch(cuda::launch_pack(p, dtype, device.stream()), kOp, "pack");
  return {protos, offsets, position, mass};
}

Tensor pack_prototypes_bwd(Tensor grad_protos, Tensor share, Tensor position, Tensor mass,
                           Tensor offsets, int64_t height, int64_t width, bool channels_last) {
  FP_PACK_CHECK(grad_protos.dim() == 2 && share.dim() == 3 && position.dim() == 2,
                "grad_protos, share, position: found other numbers of dimensions; allowed: those "
                "of the forward.");
  const int64_t episodes = share.size(0), ways = share.size(1), cells = share.size(2);
  const int64_t bags = episodes * ways, pixels = height * width;
  FP_PACK_CHECK(pixels >= 1 && cells % pixels == 0, "height, width: found ", height, " x ", width,
                "; allowed: those of the features, of ", cells, " cells.");
  FP_PACK_CHECK(grad_protos.size(0) == bags * (cells + 1) && position.size(0) == bags &&
                    position.size(1) == cells + 1 && mass.numel() == bags &&
                    offsets.numel() == bags + 1,
                "grad_protos, position, mass, offsets: found other sizes; allowed: those of the "
                "forward.");
  FP_PACK_CHECK(
      share.scalar_type() == ScalarType::Float && mass.scalar_type() == ScalarType::Float &&
          position.scalar_type() == ScalarType::Int && offsets.scalar_type() == ScalarType::Int,
      "share, position, mass, offsets: found other dtypes; allowed: those of the "
      "forward.");
  FP_PACK_CHECK(
      is_same_device(grad_protos, share) && is_same_device(grad_protos, position) &&
          is_same_device(grad_protos, mass) && is_same_device(grad_protos, offsets),
      "grad_protos, share, position, mass, offsets: found several devices; allowed: one.");
  const DType dtype = pack_dtype(grad_protos);
  const int64_t shots = cells / pixels, dim = grad_protos.size(1);
  const cuda::PackShape shape = pack_shape(episodes, ways, shots, pixels, dim);

  const Tensor grad = dense(grad_protos, false), shares = dense(share, false);
  const Tensor places = dense(position, false), masses = dense(mass, false);
  const Tensor bounds = dense(offsets, false);
  Tensor grad_features =
      new_maps(grad_protos, {episodes, shots, dim, height, width}, channels_last);
  cuda::PackBackwardParams p = {};
  p.shape = shape;
  p.grad_protos = grad.data_ptr();
  p.share = static_cast<const float*>(shares.data_ptr());
  p.position = static_cast<const int32_t*>(places.data_ptr());
  p.mass = static_cast<const float*>(masses.data_ptr());
  p.offsets = static_cast<const int32_t*>(bounds.data_ptr());
  p.grad_features = grad_features.data_ptr();
  p.channels_last = channels_last ? 1 : 0;
  const cuda::OnDevice device(grad_protos);
  cuda::check_launch(cuda::launch_pack_backward(p, dtype, device.stream()), kOp, "pack_backward");
  return grad_features;
}

}  // namespace
}  // namespace fastproto

#ifdef FASTPROTO_EMULATE
STABLE_TORCH_LIBRARY_FRAGMENT(fastproto_emulated, m) {
  m.def(fastproto::kPackPrototypes);
  m.def(fastproto::kPackPrototypesBwd);
}
STABLE_TORCH_LIBRARY_IMPL(fastproto_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastproto, CUDA, m) {
#endif
  m.impl("pack_prototypes", TORCH_BOX(&fastproto::pack_prototypes));
  m.impl("pack_prototypes_bwd", TORCH_BOX(&fastproto::pack_prototypes_bwd));
}
