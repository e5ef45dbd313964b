// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

namespace fastproto::cpu {

extern const KernelTable kBaselineKernels;
#if defined(FASTPROTO_X86)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
#endif

const KernelTable& kernels(Level level) {
#if defined(FASTPROTO_X86)
  if (level == Level::kAvx512) return kAvx512Kernels;
  if (level == Level::kAvx2) return kAvx2Kernels;
#endif
  (void)level;
  return kBaselineKernels;
}

}  // namespace fastproto::cpu
