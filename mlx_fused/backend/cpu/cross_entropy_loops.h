#pragma once

#include "mlx_fused/backend/cpu/kernels.h"

namespace mlx_fused::cpu::MLX_FUSED_ISA {

// See kernels.h.
void softcap(float* x, int64_t n, float cap);
void cross_entropy_grad(float* x, int64_t n, float factor, float log_sum, float shift, float cap);

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
