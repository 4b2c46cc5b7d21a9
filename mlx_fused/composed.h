#pragma once

#include "mlx_fused/call.h"
#include "mlx_fused/products.h"

// Calls written in MLX's own operations. This defines what a call means, and runs where we have no kernel.
namespace mlx_fused::composed {

Arrays project(const Arrays& inputs, const Call& call, const Products& products);

Arrays project_grad(const Arrays& inputs, const GradCall& call, const Products& products);

}  // namespace mlx_fused::composed
