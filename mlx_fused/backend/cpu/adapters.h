#pragma once

#include <vector>

#include "mlx_fused/backend/cpu/view.h"

namespace mlx_fused::cpu {

// A matrix of an adapter (A, or the transpose of B) and the factor its product is scaled by.
struct AdapterMatrix {
  View matrix;  // [depth, rank], float32
  float scale;
};

// The products scale * left * matrix of one left operand, [rows, depth], which is read once for all matrices.
struct AdapterProducts {
  View left;
  std::vector<AdapterMatrix> matrices;
};

// Computes all products in float32 and returns them in order. They lie in this thread's scratch memory, so
// they are valid until the thread's next call.
std::vector<View> adapter_products(const std::vector<AdapterProducts>& all);

}  // namespace mlx_fused::cpu
