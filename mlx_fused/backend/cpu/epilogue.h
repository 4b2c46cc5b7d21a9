#pragma once

#include "mlx_fused/backend/cpu/product.h"

namespace mlx_fused::cpu {

// Writes a tile of an output, given its sum of products at from[i * ld + j], which this spoils.
void finish(const Output& output, const Tile& t, float* from, int64_t ld);

}  // namespace mlx_fused::cpu
