// SPDX-License-Identifier: Apache-2.0
#include "../instantiate_bf16.h"

namespace fastproto::cpu {
extern const KernelTable kAvx512Bf16Kernels = make_bf16_table();
}  // namespace fastproto::cpu
