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

// A tile of an output for one thread to compute.
struct Task {
  const Output* output;
  Tile tile;
};

// Tiles that cover the outputs: at most rows high, and min_cols to max_cols wide, so that every thread gets a
// few.
std::vector<Task> split(const std::vector<Output>& outputs, int64_t rows, int64_t min_cols, int64_t max_cols);

// Computes every output with the one left operand.
void product(std::vector<View> left, std::vector<Output> outputs);

}  // namespace mlx_fused::cpu
