#pragma once

#include "mlx_fused/backend/cpu/kernels.h"

namespace mlx_fused::cpu::MLX_FUSED_ISA {

// See kernels.h.
float largest(const float* x, int64_t n);
float exponentials(float* x, int64_t n, float shift);
void softmax_grad(float* scores, float* grads, int64_t n, float log_sum, float delta);
void weighted_sum(
    const float* weights,
    int64_t ld,
    int64_t m,
    Type type,
    const void* rows,
    int64_t ld_rows,
    int64_t n,
    int64_t k,
    float* to,
    int64_t ld_to);

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
