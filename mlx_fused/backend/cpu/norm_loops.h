#pragma once

#include "mlx_fused/backend/cpu/kernels.h"

namespace mlx_fused::cpu::MLX_FUSED_ISA {

// See kernels.h.
void rms_norm(Type type, float* x, int64_t rows, int64_t ld, const float* w, int64_t n, float eps);
void rms_norm_grad(
    const float* x, float* g, int64_t rows, int64_t ld, const float* w, float* dw, int64_t n, float eps);

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
