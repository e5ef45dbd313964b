// SPDX-License-Identifier: Apache-2.0
// fastproto._C: facts about the build, this CPU and the plans, and supervoxels. No torch header, no
// tensors.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/kernels.h"
#include "../cpu/supervoxels.h"
#include "../cuda/plan.h"

namespace py = pybind11;

namespace {

using fastproto::DType;
using namespace fastproto::cuda;
using namespace py::literals;

DType dtype_of(const std::string& wanted) {
#define FP_ROW(name, torch_name, python_name, ...) \
  if (wanted == python_name) return DType::name;
  FP_DTYPES(FP_ROW)
#undef FP_ROW
  return DType::kFloat64;  // which the plan refuses
}

py::dict to_dict(const KernelPlan& plan) {
  return py::dict("kernel"_a = kernel_name(plan.kernel), "tile_m"_a = plan.tile_m,
                  "tile_n"_a = plan.tile_n, "dim"_a = plan.dim, "slices"_a = plan.slices,
                  "stages"_a = plan.stages, "cluster"_a = plan.cluster, "blocks"_a = plan.blocks,
                  "threads"_a = plan.threads, "shared_bytes"_a = plan.shared_bytes);
}

py::dict cuda_plan(int capability, int multiprocessors, int shared_memory, const std::string& dtype,
                   int64_t episodes, int64_t queries, int64_t ways, int64_t dim, int64_t pixels,
                   int64_t total, bool save, bool tma_ok, bool has_sm90,
                   const std::string& kernels) {
  const Request request{
      capability, multiprocessors, shared_memory, dtype_of(dtype), episodes, queries, ways, dim,
      pixels,     total,           save,          tma_ok,          has_sm90};
  std::vector<std::string> reasons;
  const Plan plan = make_plan(request, kernels.c_str(), &reasons);
  if (!plan.error.empty()) throw py::value_error(plan.error);
  return py::dict("stats"_a = to_dict(plan.stats), "forward"_a = to_dict(plan.forward),
                  "backward_query"_a = to_dict(plan.backward_query),
                  "backward_protos"_a = to_dict(plan.backward_protos), "reasons"_a = reasons);
}

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

py::array_t<int32_t> supervoxels(const Array<float>& image, const Array<bool>& mask,
                                 const std::array<double, 3>& spacing, double scale,
                                 const std::vector<int64_t>& min_sizes, double exponent) {
  if (image.ndim() != 3)
    throw py::value_error("image: found " + std::to_string(image.ndim()) +
                          " dimensions; allowed: 3 (z, y, x).");
  const std::array<int64_t, 3> shape{image.shape(0), image.shape(1), image.shape(2)};
  if (mask.ndim() != 3 || !std::equal(shape.begin(), shape.end(), mask.shape()))
    throw py::value_error("mask: found another shape than the image's; allowed: the same shape.");
  py::array_t<int32_t> labels(std::vector<py::ssize_t>{static_cast<py::ssize_t>(min_sizes.size()),
                                                       shape[0], shape[1], shape[2]});
  int32_t* out = labels.mutable_data();
  const float* voxels = image.data();
  const bool* inside = mask.data();
  py::gil_scoped_release release;
  fastproto::cpu::supervoxels({shape, spacing, scale, exponent, min_sizes}, voxels, inside, out);
  return labels;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, CPU feature level and supervoxels of fastproto's native code.";
  m.def(
      "build_info",
      [] {
        return py::dict(
            "compiler"_a = FASTPROTO_COMPILER, "built_with_torch"_a = FASTPROTO_TORCH_VERSION,
            "stable_abi"_a = FASTPROTO_STABLE_ABI, "cuda_compiler"_a = FASTPROTO_CUDA_COMPILER,
            "cuda_architectures"_a = FASTPROTO_CUDA_ARCHS);
      },
      "Compiler, the torch whose headers were used, the stable ABI aimed at, nvcc's version and "
      "the CUDA architectures compiled (both empty without CUDA).");
  m.def(
      "cpu_level", [] { return fastproto::cpu::level_name(fastproto::cpu::current_level()); },
      "Instruction set the CPU kernels use here: 'baseline', 'avx2', 'avx512', 'avx512bf16' or "
      "'amx'.");
  m.def(
      "cpu_forward_plan",
      [](int64_t images, int64_t ways, int64_t dim, int64_t pixels, int64_t threads, int64_t item) {
        const fastproto::cpu::Problem problem{1, images, ways, dim, pixels, 0, true, 1, 1};
        const auto tiling = fastproto::cpu::plan_forward(problem, threads, item);
        return py::make_tuple(tiling.width, tiling.strips, images * ways * tiling.tiles(problem));
      },
      "images"_a, "ways"_a, "dim"_a, "pixels"_a, "threads"_a, "item"_a = 4,
      "How the forward is cut on the CPU: (pixels of a strip, strips of a task, tasks). `item` is "
      "the bytes of a number in the panels, 8 for float64.");
  m.def("cuda_plan", &cuda_plan, py::kw_only(), "capability"_a, "multiprocessors"_a,
        "shared_memory"_a, "dtype"_a, "episodes"_a, "queries"_a, "ways"_a, "dim"_a, "pixels"_a,
        "total"_a, "save"_a = false, "tma_ok"_a = true, "has_sm90"_a = true, "kernels"_a = "",
        "Which CUDA kernels a problem runs with on a chip, and the reasons in sentences. `kernels` "
        "is FASTPROTO_CUDA_KERNELS. Raises ValueError where there is no plan.");
  m.def("supervoxels", &supervoxels, "image"_a, "mask"_a, "spacing"_a, "scale"_a, "min_sizes"_a,
        "exponent"_a = 2.0,
        "Felzenszwalb and Huttenlocher's segmentation in 3-D: int32 [min_sizes, Z, Y, X], "
        "components 1..n for each minimum size (voxels, ascending) and 0 outside the mask. Each "
        "is a union of components of the minimum size before it. An edge's weight is the "
        "difference of intensity times (length / length on a cubic grid) ** exponent. Raises "
        "ValueError for unusable arguments.");
}
