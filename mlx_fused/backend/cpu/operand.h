#pragma once

#include <optional>
#include <variant>

#include "mlx_fused/backend/cpu/view.h"

namespace mlx_fused::cpu {

// The transpose of a quantized matrix; that of a view is a view.
struct TransposedQuantized {
  Quantized matrix;
};

// The right operand of a product.
using Operand = std::variant<View, Quantized, TransposedQuantized>;

Operand operand(const Weight& weight);
Operand transposed(const Weight& weight);

// Whether the rows lie in memory one by one, packed.
bool has_unit_rows(const Operand& o);

// to[i * ld + j] = element (row + i, col + j), in float32, of an operand with unit rows.
void load(const Operand& o, const Tile& t, float* to, int64_t ld);

// A matrix as BLAS takes it.
struct BlasMatrix {
  const float* data;
  int ld;
  bool transposed;
};

// The tile where it lies, if BLAS can read it there.
std::optional<BlasMatrix> in_place(const Operand& o, const Tile& t);

// The tile where it lies, or else converted into memory at to.
BlasMatrix blas_matrix(const Operand& o, const Tile& t, float* to);

}  // namespace mlx_fused::cpu
