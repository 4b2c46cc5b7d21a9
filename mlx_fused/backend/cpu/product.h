#pragma once

#include <optional>
#include <vector>

#include "mlx_fused/backend/cpu/view.h"

namespace mlx_fused::cpu {

// out[i, j] = sum over p of dot(row i of left[p], row j of right[p]) + bias[j] + residual[i, j]. All three of
// a projection's products have this form once their operands are seen transposed or not.
struct Output {
  std::vector<View> right;
  std::optional<View> bias, residual;
  View out;
};

// Computes every output with the one left operand.
void product(std::vector<View> left, std::vector<Output> outputs);

} // namespace mlx_fused::cpu
