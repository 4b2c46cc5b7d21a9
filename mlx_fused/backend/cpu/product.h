#pragma once

#include <optional>
#include <span>
#include <vector>

#include "mlx_fused/backend/cpu/operand.h"

namespace mlx_fused::cpu {

// left [rows, rank] times right [rank, cols], both float32.
struct LowRank {
  View left, right;
};

// out[i, j] = residual[i, j] + alpha * (the sum over p of dot(row i of left[p], row j of right[p]) + bias[j]
// + element (i, j) of the low-rank products). The left operands are given once for several outputs. Forward
// and gradients all have this form, with operands transposed where needed.
struct Output {
  std::vector<Operand> right;
  View out;
  std::optional<View> pre = {};  // where what the activation is of is kept
  bool is_gate = false;          // has no place of its own, but the next output is multiplied with it
  std::optional<View> bias = {};
  std::vector<LowRank> low_rank = {};
  Epilogue epilogue = {};
  Reduction reduction = {};
};

// A tile of an output, or of a gate and of the output that it gates, computed by one thread.
struct Task {
  std::span<const Output> outputs;
  Tile tile;
};

// How many tasks a product is split into at least, if it is large enough: several for every thread.
int64_t wanted_tasks();

// Splits the outputs into tiles of at most `rows` rows and of min_cols to max_cols columns, chosen so that
// every thread gets several; of max_cols where they are summed.
std::vector<Task> split(const std::vector<Output>& outputs, int64_t rows, int64_t min_cols, int64_t max_cols);

// Computes every output. left[p] is multiplied with right[p] of each of them.
void product(std::vector<View> left, std::vector<Output> outputs);

}  // namespace mlx_fused::cpu
