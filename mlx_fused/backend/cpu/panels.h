#pragma once

#include "mlx_fused/backend/cpu/product.h"

namespace mlx_fused::cpu {

// The products in our own register blocks. Each right operand is read once per 528 rows of the left one, and
// converted to float32 block by block.
void panels_product(const std::vector<View>& left, const std::vector<Output>& outputs);

}  // namespace mlx_fused::cpu
