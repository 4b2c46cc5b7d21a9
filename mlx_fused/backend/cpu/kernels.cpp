#include "mlx_fused/backend/cpu/kernels.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

namespace mlx_fused::cpu {

#ifdef __x86_64__
namespace avx512_bf16 {
extern const BFloat16Kernels bfloat16_table;
}
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
    std::string name = text ? text : "amx";
    constexpr const char* names[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
    auto found = std::ranges::find(names, name.empty() ? "amx" : name);
    if (found == std::end(names)) {
      throw std::invalid_argument(
          "MLX_FUSED_MAX_ISA must be 'baseline', 'avx2', 'avx512', 'avx512_bf16' or 'amx' but got '" + name +
          "'.");
    }
    return static_cast<Isa>(found - names);
  }();
  return isa <= best;
}

#ifdef __x86_64__
namespace {

// The features that -march=x86-64-v3 and v4 imply, as far as every compiler has names for them.
bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}

bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& best = has_v4() && allowed(Isa::avx512) ? avx512::table
                               : has_v3() && allowed(Isa::avx2) ? avx2::table
                                                                : baseline::table;
  return best;
}

const BFloat16Kernels* bfloat16_kernels() {
  static const bool available = has_v4() && __builtin_cpu_supports("avx512bf16") && allowed(Isa::avx512_bf16);
  return available ? &avx512_bf16::bfloat16_table : nullptr;
}
#else
const Kernels& kernels() {
  return baseline::table;
}

const BFloat16Kernels* bfloat16_kernels() {
  return nullptr;
}
#endif

}  // namespace mlx_fused::cpu
