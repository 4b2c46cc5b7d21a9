#pragma once

#include "mlx_fused/backend/cpu/product.h"

namespace mlx_fused::cpu {

// Products of bfloat16 operands on Intel's matrix unit (AMX), which treats subnormal bfloat16 as zero.
bool has_amx();
void amx_product(const std::vector<View>& left, const std::vector<Output>& outputs);

}  // namespace mlx_fused::cpu
