#pragma once

#include "mlx_fused/backend/cpu/projection.h"

// The loops on quantized weights; kernels.h documents them.
namespace mlx_fused::cpu::MLX_FUSED_ISA {

void dequantize(const Quantized& w, int64_t row, int64_t col, int64_t n, float* to);
int64_t packed_length(const Quantized& w);
void pack(const Quantized& w, const float* x, float* to);
void packed_dots(
    const float* x, int64_t m, const Quantized& w, int64_t row, int64_t n, float* y, int64_t ldy);

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
