#pragma once

#include "mlx_fused/backend/cpu/kernels.h"

namespace mlx_fused::cpu::MLX_FUSED_ISA {

// See kernels.h.
float largest(const float* x, int64_t n);
float exponentials(float* x, int64_t n, float shift);
void mask_scores(const float* mask, float* scores, int64_t n);
void softmax(float* scores, int64_t n, int64_t cols, float* largest, float* sums);
void softmax_grad(
    float* scores, float* grads, int64_t n, int64_t cols, const Shares& shares, const float* deltas);
void transpose(const float* from, int64_t rows, int64_t cols, int64_t ld, float* to, int64_t ld_to);
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
