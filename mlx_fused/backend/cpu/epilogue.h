#pragma once

#include "mlx_fused/backend/cpu/product.h"

namespace mlx_fused::cpu {

// Applies bias, adapters, alpha and residual to the sums of products sums[i * ld + j] of a tile, in place,
// and stores the result in the output.
void apply_epilogue(const Output& output, const Tile& t, float* sums, int64_t ld);

}  // namespace mlx_fused::cpu
