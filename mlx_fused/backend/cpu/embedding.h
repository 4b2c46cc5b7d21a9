#pragma once

#include "mlx_fused/backend/cpu/projection.h"

namespace mlx_fused::cpu {

// Row i of out = row places[i] of the table, counted from its end if negative. Throws where there is none.
// Rounds as MLX does: an affine product with a scale, and its sum with a bias.
void embed(const Quantized& table, const int64_t* places, const View& out);

}  // namespace mlx_fused::cpu
