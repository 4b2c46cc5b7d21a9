#pragma once

#include <vector>

#include "mlx/array.h"
#include "mlx/stream.h"

namespace mlx_fused {

namespace mx = mlx::core;

// Who computes a call: MLX's own ops, or a primitive of ours.
enum class Route { composed, primitive };

// `promoted` is the dtype that MLX's promotion gives each product of the call, and its residual.
Route route(mx::Device device, const std::vector<mx::Dtype>& promoted);

}  // namespace mlx_fused
