#pragma once

#include "mlx_fused/backend/cpu/product.h"

namespace mlx_fused::cpu {

// The product of one left operand, in our own register blocks. The right ones are read once for every 512
// rows of the left, and converted block by block; that is fast where they have unit stride along their rows.
void panels_product(const View& left, const std::vector<Output>& outputs);

}  // namespace mlx_fused::cpu
