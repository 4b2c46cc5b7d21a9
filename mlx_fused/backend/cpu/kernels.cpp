#include "mlx_fused/backend/cpu/kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

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
    std::string name = text ? text : "";
    if (name.empty() || name == "amx") {
      return Isa::amx;
    }
    if (name != "baseline" && name != "avx2" && name != "avx512") {
      throw std::invalid_argument(
          "MLX_FUSED_MAX_ISA must be 'baseline', 'avx2', 'avx512' or 'amx' but got '" + name + "'.");
    }
    return name == "baseline" ? Isa::baseline : name == "avx2" ? Isa::avx2 : Isa::avx512;
  }();
  return isa <= best;
}

const Kernels& kernels() {
#ifdef __x86_64__
  // The features that -march=x86-64-v3 and v4 imply, as far as every compiler has names for them.
  static const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  static const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512vl");
  return v4 && allowed(Isa::avx512) ? avx512::table
         : v3 && allowed(Isa::avx2) ? avx2::table
                                    : baseline::table;
#else
  return baseline::table;
#endif
}

}  // namespace mlx_fused::cpu
