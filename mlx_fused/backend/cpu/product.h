#pragma once

#include <optional>
#include <vector>

#include "mlx_fused/backend/cpu/operand.h"

namespace mlx_fused::cpu {

// left [rows, rank] times right [rank, cols], both float32.
struct LowRank {
  View left, right;
};

// out[i, j] = residual[i, j] + alpha (sum over p of dot(row i of left[p], row j of right[p]) + bias[j] + the
// low-rank products). All of a projection's products have this form once their operands are seen transposed
// or not.
struct Output {
  std::vector<Operand> right;
  View out;
  std::optional<View> bias = {};
  std::vector<LowRank> low_rank = {};
  Epilogue epilogue = {};
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
