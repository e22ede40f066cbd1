// Chooses a table of kernels once, from what the CPU has and what FASTACT_ISA allows.
#include <stdlib.h>
#include <string.h>

#include "../kernels.h"

namespace fastact {
namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace cpu {

#if defined(__x86_64__)
const char* const kLevels[] = {"baseline", "avx2", "avx512"};
const int kLevelCount = 3;

namespace {

const Kernels* const kTables[] = {&baseline::kernels, &avx2::kernels, &avx512::kernels};

// The compiler's runtime asks cpuid what the CPU can do and xgetbv whether the system saves those registers.
int best_level() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c") ||
      !__builtin_cpu_supports("bmi") || !__builtin_cpu_supports("bmi2"))
    return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl"))
    return 1;
  return 2;
}

}  // namespace
#else
const char* const kLevels[] = {"baseline"};
const int kLevelCount = 1;

namespace {
const Kernels* const kTables[] = {&baseline::kernels};
int best_level() { return 0; }
}  // namespace
#endif

namespace {

int level_named(const char* name) {
  int level = kLevelCount;
  while (level-- > 0 && strcmp(name, kLevels[level]) != 0) {
  }
  return level;
}

const Kernels*& active() {
  static const Kernels* table = [] {
    const int best = best_level();
    const char* wanted = getenv("FASTACT_ISA");
    const int level = wanted ? level_named(wanted) : best;
    return kTables[level >= 0 && level < best ? level : best];
  }();
  return table;
}

}  // namespace

const Kernels& kernels() { return *active(); }

bool use_level(const char* name) {
  const int level = level_named(name);
  if (level < 0 || level > best_level()) return false;
  active() = kTables[level];
  return true;
}

}  // namespace cpu
}  // namespace fastact
