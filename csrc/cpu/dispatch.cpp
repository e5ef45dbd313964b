// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

namespace fastproto::cpu {

extern const KernelTable kBaselineKernels;
#if defined(FASTPROTO_X86)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx512Bf16Kernels;
extern const KernelTable kAmxKernels;
#endif

const KernelTable& kernels(Level level) {
  switch (level) {
#if defined(FASTPROTO_X86)
    case Level::kAmx:
      return kAmxKernels;
    case Level::kAvx512Bf16:
      return kAvx512Bf16Kernels;
    case Level::kAvx512:
      return kAvx512Kernels;
    case Level::kAvx2:
      return kAvx2Kernels;
#endif
    default:
      return kBaselineKernels;
  }
}

}  // namespace fastproto::cpu
