// SPDX-License-Identifier: Apache-2.0
// Every schema of the library in one place. Shapes as in fastproto/functional.py.
#include "schemas.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastproto, m) {
  m.def(fastproto::kProtoAttentionFwd);
  m.def(fastproto::kProtoAttentionBwd);
  // `rounds` rounds of float32 multiply-adds on registers, on each of torch's threads; `operations`
  // (one float64) receives how many floating-point operations that was. For benchmarks.
  m.def("fma_loop(Tensor(a!) operations, int rounds) -> ()");
  // The template op of csrc/template: see CONTRIBUTING.md.
  m.def("null(Tensor input) -> Tensor");
}
