// SPDX-License-Identifier: Apache-2.0
// Every schema of the library in one place. Shapes as in fastproto/functional.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastproto, m) {
  // `temperature_tensor`, where given, takes the place of `temperature` and has a gradient.
  // With save_for_backward `agg` and `stats` are what the backward of the same device needs, else
  // both are empty: on the CPU in the accumulation type agg [E, Q, K, D, H, W] and stats
  // [E, Q, K, 3, H*W] (csrc/cpu/kernels.h); on CUDA agg in the features' type and stats, flat: lse
  // [E*Q*K, H*W], query [E*Q, 2, H*W], protos [2, N_total] (csrc/cuda/params.h).
  // `tf32`: float32 on CUDA may multiply in TF32, PyTorch's setting.
  m.def(
      "proto_attention_fwd(Tensor feat, Tensor protos, Tensor offsets, Tensor? temperature_tensor, "
      "float temperature, float eps, bool concat, bool save_for_backward, bool tf32=False) "
      "-> (Tensor out, Tensor agg, Tensor stats)");
  // grad_protos and grad_temperature are empty unless wanted.
  m.def(
      "proto_attention_bwd(Tensor grad_out, Tensor feat, Tensor protos, Tensor offsets, "
      "Tensor? temperature_tensor, Tensor agg, Tensor stats, float temperature, float eps, "
      "bool concat, bool needs_protos, bool needs_temperature, bool tf32=False) "
      "-> (Tensor grad_feat, Tensor grad_protos, Tensor grad_temperature)");
  // `rounds` rounds of float32 multiply-adds on registers, on each of torch's threads; `operations`
  // (one float64) receives how many floating-point operations that was. For benchmarks.
  m.def("fma_loop(Tensor(a!) operations, int rounds) -> ()");
  // The template op of csrc/template: see CONTRIBUTING.md.
  m.def("null(Tensor input) -> Tensor");
}
