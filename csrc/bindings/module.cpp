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
      "Instruction set the CPU kernels use here: 'baseline', 'avx2' or 'avx512'.");
}
