#include "mlx_fused/backend/cpu/epilogue.h"

#include <algorithm>
#include <functional>

#include "mlx_fused/backend/cpu/activation.h"
#include "mlx_fused/backend/cpu/kernels.h"
#include "mlx_fused/backend/cpu/scratch.h"
#include "mlx_fused/backend/cpu/sgemm.h"

namespace mlx_fused::cpu {

namespace {

// Rounds floats to the type and widens them again.
void round(Type type, float* values, int64_t n) {
  constexpr int64_t chunk = 256;  // reasoned, not measured: 512 bytes of stack, which stay in the L1 cache
  uint16_t narrow[chunk];
  if (type == Type::float32) {
    return;
  }
  for (int64_t i = 0; i < n; i += chunk) {
    int64_t size = std::min(chunk, n - i);
    kernels().narrow(type, values + i, narrow, size);
    kernels().widen(type, narrow, values + i, size);
  }
}

// The tile's part of the adapters' sum, in this thread's scratch memory.
float* low_rank_tile(const std::vector<LowRank>& products, const Tile& t) {
  int64_t max_rank = 0;
  for (const LowRank& p : products) {
    max_rank = std::max(max_rank, p.left.cols());
  }
  float* tile = scratch(Holder::epilogue, t.rows * t.cols + max_rank * (t.rows + t.cols));
  float* left_tile = tile + t.rows * t.cols;
  float* right_tile = left_tile + max_rank * t.rows;
  bool accumulate = false;
  for (const LowRank& p : products) {
    int64_t rank = p.left.cols();
    BlasMatrix a = blas_matrix(p.left, {.row = t.row, .rows = t.rows, .col = 0, .cols = rank}, left_tile);
    BlasMatrix b = blas_matrix(p.right, {.row = 0, .rows = rank, .col = t.col, .cols = t.cols}, right_tile);
    sgemm(
        a.transposed,
        b.transposed,
        t.rows,
        t.cols,
        rank,
        a.data,
        a.ld,
        b.data,
        b.ld,
        accumulate,
        tile,
        t.cols);
    accumulate = true;
  }
  return tile;
}

}  // namespace

void apply_epilogue(const Output& output, const Tile& task, const Tile& t, float* sums, int64_t ld) {
  const auto& [residual, alpha, exact, activation] = output.epilogue;
  Type type = exact ? output.out.type : Type::float32;
  bool quantized = !output.right.empty() && std::holds_alternative<Quantized>(output.right[0]);
  float* low_rank = output.low_rank.empty() ? nullptr : low_rank_tile(output.low_rank, t);
  for (int64_t i = 0; i < t.rows; ++i) {
    float* row = sums + i * ld;
    if (output.bias) {
      if (quantized) {
        round(type, row, t.cols);
      }
      add_rows(*output.bias, {.row = 0, .rows = 1, .col = t.col, .cols = t.cols}, row);
    }
    round(type, row, t.cols);
    if (low_rank) {
      float* added = low_rank + i * t.cols;
      round(type, added, t.cols);
      kernels().add(Type::float32, added, row, t.cols);
      round(type, row, t.cols);
    }
    if (alpha != 1) {
      for (int64_t j = 0; j < t.cols; ++j) {
        row[j] *= alpha;
      }
      round(type, row, t.cols);
    }
    if (residual) {
      add_rows(*residual, {.row = t.row + i, .rows = 1, .col = t.col, .cols = t.cols}, row);
    }
  }
  if (output.pre) {
    store(*output.pre, t, sums, ld);
  }
  float* gate =
      activation.gated ? scratch(Holder::gate, task.rows * task.cols) + (t.row - task.row) * t.cols : nullptr;
  for (int64_t i = 0; i < t.rows && activation; ++i) {
    float* row = sums + i * ld;
    if (gate && !output.is_gate) {
      clip_up(activation, row, t.cols);
      round(type, row, t.cols);
      std::transform(row, row + t.cols, gate + i * t.cols, row, std::multiplies());
      continue;
    }
    kernels().activate(activation, row, t.cols);
    round(type, row, t.cols);
    if (gate) {
      std::copy_n(row, t.cols, gate + i * t.cols);
    }
  }
  if (output.reduction.take) {
    output.reduction.take(t, sums, ld);
  } else if (!output.is_gate) {
    store(output.out, t, sums, ld);
  }
}

}  // namespace mlx_fused::cpu
