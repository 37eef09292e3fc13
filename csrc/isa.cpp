#include "isa.h"

#if LATENTKV_X86
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace latentkv {

#if LATENTKV_X86
// Asked of the CPU itself where Clang before 19 has no name for the feature.
static bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && c >> 29 & 1;
}
static bool has_amx() {
  constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & (BF16 | TILE)) == (BF16 | TILE);
}

// Tiles are 8 KB of state for each thread, which Linux gives to processes that ask for it.
static bool may_use_tiles() {
#if defined(__linux__)
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

bool runs(Isa isa) {
#if LATENTKV_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
                          __builtin_cpu_supports("avx512vbmi");
  switch (isa) {
    case Isa::amx: return avx512bf16 && has_amx() && may_use_tiles();
    case Isa::avx512bf16: return avx512bf16;
    case Isa::avx512: return avx512;
    case Isa::avx2: return avx2;
    case Isa::portable: return true;
  }
#endif
  return isa == Isa::portable;
}

}  // namespace latentkv
