#pragma once

#include "mlx_fused/call.h"
#include "mlx_fused/products.h"

// Calls in MLX's own operations: what they mean, and what runs where no kernel of ours does.
namespace mlx_fused::composed {

Arrays project(const Arrays& inputs, const Call& call, const Products& products);

Arrays project_grad(const Arrays& inputs, const GradCall& call, const Products& products);

}  // namespace mlx_fused::composed
