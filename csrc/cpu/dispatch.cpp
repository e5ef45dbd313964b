// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

namespace fastproto::cpu {

// Each from instantiate.cpp, compiled once for every level.
extern const InstructionSet kBaseline;
#if defined(FASTPROTO_X86)
extern const InstructionSet kAvx2, kAvx512;
extern const Kernels kAvx512Bf16, kAmx;  // bfloat16's, where the rest is AVX-512's
#endif

const InstructionSet& instruction_set([[maybe_unused]] Level level) {
#if defined(FASTPROTO_X86)
  if (level >= Level::kAvx512) return kAvx512;
  if (level == Level::kAvx2) return kAvx2;
#endif
  return kBaseline;
}

const Kernels& kernels(Level level, DType dtype) {
#if defined(FASTPROTO_X86)
  if (dtype == DType::kBFloat16 && level == Level::kAmx) return kAmx;
  if (dtype == DType::kBFloat16 && level == Level::kAvx512Bf16) return kAvx512Bf16;
#endif
  return instruction_set(level).kernels[int(dtype)];
}

}  // namespace fastproto::cpu
