#pragma once

#include "mlx_fused/backend/cpu/product.h"

namespace mlx_fused::cpu {

// The product of one left operand with the right ones of all outputs, in our own register blocks. Each right
// operand is read once per 512 rows of the left one, and converted to float32 block by block. Right operands
// must have unit rows.
void panels_product(const View& left, const std::vector<Output>& outputs);

}  // namespace mlx_fused::cpu
