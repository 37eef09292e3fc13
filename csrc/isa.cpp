#include "isa.h"

#if LATENTKV_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace latentkv {

#if LATENTKV_X86
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
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
                          __builtin_cpu_supports("avx512vbmi");
  switch (isa) {
    case Isa::amx:
      return avx512bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_tiles();
    case Isa::avx512bf16: return avx512bf16;
    case Isa::avx512: return avx512;
    case Isa::avx2: return avx2;
    case Isa::portable: return true;
  }
#endif
  return isa == Isa::portable;
}

}  // namespace latentkv
