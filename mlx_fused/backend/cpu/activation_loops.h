#pragma once

#include "mlx_fused/backend/cpu/kernels.h"

namespace mlx_fused::cpu::MLX_FUSED_ISA {

// See kernels.h.
void activate(const Activation& a, float* x, int64_t n);
void derive(const Activation& a, const float* x, float* y, float* dy, int64_t n);

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
