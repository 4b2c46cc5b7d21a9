#pragma once

#include "mlx_fused/backend/cpu/kernels.h"

namespace mlx_fused::cpu::MLX_FUSED_ISA {

// See BFloat16Kernels.
void pair_rows(const uint16_t* a, const uint16_t* b, float* to, int64_t n);
void softmax_pairs(float* scores, int64_t n, int64_t cols, float* largest, float* sums);
void softmax_grad_pairs(
    float* scores,
    float* grads,
    float* pairs,
    int64_t n,
    int64_t cols,
    const Shares& shares,
    const float* deltas);

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
