#pragma once

#include "mlx_fused/backend/cpu/product.h"

namespace mlx_fused::cpu {

// Applies bias, adapters, alpha, activation and residual to the sums of products sums[i * ld + j] of a tile,
// in place, and stores the result in the output. `t` is some rows of `task`, the tile of a thread's task,
// which does the same rows of a gate and of what it gates one after the other.
void apply_epilogue(const Output& output, const Tile& task, const Tile& t, float* sums, int64_t ld);

}  // namespace mlx_fused::cpu
