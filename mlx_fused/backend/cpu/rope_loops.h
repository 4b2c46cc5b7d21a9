#pragma once

#include <cstdint>

namespace mlx_fused::cpu::MLX_FUSED_ISA {

// See kernels.h.
void circle(const double* turns, double place, int64_t n, float* cosines, float* sines);
void rotate(float* x, int64_t pairs, bool neighbours, const float* cosines, const float* sines);

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
