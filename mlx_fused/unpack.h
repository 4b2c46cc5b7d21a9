#pragma once

#include <vector>

#include "mlx_fused/call.h"

namespace mlx_fused {

// The segments' rows of a packed array, `features` of each, as views. Their gradients are packed again by a copy.
Arrays unpack(const mx::array& packed, const std::vector<int>& features, mx::Stream stream);

}  // namespace mlx_fused
