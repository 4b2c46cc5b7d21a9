#include "mlx_fused/backend/cpu/kernels.h"

#include <cstdlib>
#include <string_view>

namespace mlx_fused::cpu {

#ifdef __x86_64__
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
#endif
namespace baseline {
extern const Kernels table;
}

bool allowed(Isa isa) {
  static const Isa best = [] {
    const char* text = std::getenv("MLX_FUSED_MAX_ISA");
    std::string_view name = text ? text : "amx";
    return name == "baseline" ? Isa::baseline
           : name == "avx2"   ? Isa::avx2
           : name == "avx512" ? Isa::avx512
                              : Isa::amx;
  }();
  return isa <= best;
}

const Kernels& kernels() {
#ifdef __x86_64__
  static const bool has_avx512 = allowed(Isa::avx512) && __builtin_cpu_supports("avx512f") &&
                                 __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                 __builtin_cpu_supports("avx512vl");
  static const bool has_avx2 =
      allowed(Isa::avx2) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has_avx512 ? avx512::table : has_avx2 ? avx2::table : baseline::table;
#else
  return baseline::table;
#endif
}

}  // namespace mlx_fused::cpu
