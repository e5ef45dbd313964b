// SPDX-License-Identifier: Apache-2.0
// Which instruction set this CPU has and this process uses.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastproto::cpu {
namespace {

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
#endif
    default:
      return false;
  }
}

Level choose_level() {
  constexpr Level kAll[] = {Level::kAvx512, Level::kAvx2, Level::kBaseline};
  const char* wanted = std::getenv("FASTPROTO_CPU_LEVEL");
  for (Level level : kAll) {
    if (wanted == nullptr || *wanted == 0) {
      if (supported(level)) return level;
    } else if (std::strcmp(wanted, level_name(level)) == 0) {
      if (supported(level)) return level;
      throw std::runtime_error(std::string("FASTPROTO_CPU_LEVEL: found ") + wanted +
                               "; allowed: a level this CPU and this build have.");
    }
  }
  throw std::runtime_error(std::string("FASTPROTO_CPU_LEVEL: found ") + wanted +
                           "; allowed: baseline, avx2, avx512.");
}

}  // namespace

const char* level_name(Level level) {
  switch (level) {
    case Level::kAvx512:
      return "avx512";
    case Level::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

Level current_level() {
  static const Level level = choose_level();
  return level;
}

}  // namespace fastproto::cpu
