#pragma once

#include "mlx_fused/backend/cpu/product.h"

namespace mlx_fused::cpu {

// The product of one left operand, in our own register blocks. The right ones must have unit stride along
// their rows: they are read once for every 512 rows of the left, and never packed.
void panels_product(const View& left, const std::vector<Output>& outputs);

}  // namespace mlx_fused::cpu
