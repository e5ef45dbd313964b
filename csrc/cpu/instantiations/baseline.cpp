// SPDX-License-Identifier: Apache-2.0
#include "../instantiate.h"

namespace fastproto::cpu {
extern const KernelTable kBaselineKernels = make_table();
}  // namespace fastproto::cpu
