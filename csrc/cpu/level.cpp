// SPDX-License-Identifier: Apache-2.0
// Which instruction set this CPU has and this process uses.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#if defined(FASTPROTO_X86)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace fastproto::cpu {
namespace {

#if defined(FASTPROTO_X86)
// A bit of leaf 7 of cpuid; __builtin_cpu_supports knows the newer ones only in newer compilers.
bool has_bit(unsigned subleaf, char which, int bit) {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx) == 0) return false;
  return ((which == 'a' ? eax : edx) >> bit & 1u) != 0;
}

// The tiles are 8 KiB of state per thread: Linux hands them out on request.
bool may_use_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool supported(Level level) {
  switch (level) {
    case Level::kBaseline:
      return true;
#if defined(FASTPROTO_X86)
    case Level::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Level::kAvx512:
      return supported(Level::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Level::kAvx512Bf16:
      return supported(Level::kAvx512) && has_bit(1, 'a', 5);
    case Level::kAmx:  // tiles and their bfloat16 product
      return supported(Level::kAvx512Bf16) && has_bit(0, 'd', 24) && has_bit(0, 'd', 22) &&
             may_use_tiles();
#endif
    default:
      return false;
  }
}

Level choose_level() {
  const char* wanted = std::getenv("FASTPROTO_CPU_LEVEL");
  if (wanted != nullptr && *wanted == 0) wanted = nullptr;
  for (int i = int(Level::kAmx); i >= 0; --i) {
    const Level level = Level(i);
    if (wanted != nullptr && std::strcmp(wanted, level_name(level)) != 0) continue;
    if (supported(level)) return level;
  }
  throw std::runtime_error(std::string("FASTPROTO_CPU_LEVEL: found ") + wanted +
                           "; allowed: baseline, avx2, avx512, avx512bf16 or amx, if this CPU and "
                           "this build have it.");
}

}  // namespace

const char* level_name(Level level) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512bf16", "amx"};
  return kNames[int(level)];
}

Level current_level() {
  static const Level level = choose_level();
  return level;
}

}  // namespace fastproto::cpu
