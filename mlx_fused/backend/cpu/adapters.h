#pragma once

#include <vector>

#include "mlx_fused/backend/cpu/view.h"

namespace mlx_fused::cpu {

struct Factor {
  View matrix;  // [depth, rank], float32
  float scale;
};

// scale left matrix for every factor, reading left [rows, depth] once for all of them.
struct FactorProducts {
  View left;
  std::vector<Factor> factors;
};

// The results in float32, in the order of all factors. They are this thread's until its next call.
std::vector<View> multiply(const std::vector<FactorProducts>& all);

}  // namespace mlx_fused::cpu
