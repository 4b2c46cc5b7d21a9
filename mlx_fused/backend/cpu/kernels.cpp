#include "mlx_fused/backend/cpu/kernels.h"

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

const Kernels& kernels() {
#ifdef __x86_64__
  static const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has_avx512 ? avx512::table : has_avx2 ? avx2::table : baseline::table;
#else
  return baseline::table;
#endif
}

}  // namespace mlx_fused::cpu
