// SPDX-License-Identifier: Apache-2.0
// fastproto._C: facts about the build and this CPU. No torch header, no tensors, no arithmetic.
#include <pybind11/pybind11.h>

#include "../cpu/kernels.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and CPU feature level of fastproto's native code.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = FASTPROTO_COMPILER;
        info["built_with_torch"] = FASTPROTO_TORCH_VERSION;
        info["stable_abi"] = FASTPROTO_STABLE_ABI;
        info["cuda_compiler"] = FASTPROTO_CUDA_COMPILER;
        info["cuda_architectures"] = FASTPROTO_CUDA_ARCHS;
        return info;
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
        const fastproto::ProtoAttnShape shape{1, images, ways, dim, pixels, 0, true, 1, 1};
        const auto tiling = fastproto::cpu::plan_forward(shape, threads, item);
        return py::make_tuple(tiling.width, tiling.strips, images * ways * tiling.tiles(shape));
      },
      py::arg("images"), py::arg("ways"), py::arg("dim"), py::arg("pixels"), py::arg("threads"),
      py::arg("item") = 4,
      "How the forward is cut on the CPU: (pixels of a strip, strips of a task, tasks). `item` is "
      "the bytes of a number in the panels, 8 for float64.");
}
