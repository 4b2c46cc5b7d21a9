#pragma once

#include <optional>
#include <variant>

#include "mlx_fused/backend/cpu/view.h"

namespace mlx_fused::cpu {

// The transpose of a quantized matrix. (The transpose of a View is just another View.)
struct TransposedQuantized {
  Quantized matrix;
};

// The right operand of a product.
using Operand = std::variant<View, Quantized, TransposedQuantized>;

Operand operand(const Weight& weight);
Operand transposed(const Weight& weight);

// Whether rows have unit stride and do not cross from one batch or head into another.
bool has_unit_rows(const Operand& o);

// to[i * ld + j] = element (t.row + i, t.col + j), in float32. The operand must not be a TransposedQuantized.
void load(const Operand& o, const Tile& t, float* to, int64_t ld);

// Loads the tile, or its transpose if its columns are what lies together in memory, to rows without gaps at
// `to`. Returns whether it is the transpose.
bool load_either(const Operand& o, const Tile& t, float* to);

// A matrix as BLAS takes it; ld is its leading dimension.
struct BlasMatrix {
  const float* data;
  int ld;
  bool transposed;
};

// The tile in its own memory, without a copy, if BLAS can read it there.
std::optional<BlasMatrix> blas_view(const Operand& o, const Tile& t);

// The same, or else a copy of the tile in the memory at `to`.
BlasMatrix blas_matrix(const Operand& o, const Tile& t, float* to);

}  // namespace mlx_fused::cpu
