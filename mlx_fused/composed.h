#pragma once

#include "mlx_fused/layout.h"
#include "mlx_fused/products.h"

// The operations written in MLX's: what they mean, and what runs where no kernel of ours does.
namespace mlx_fused::composed {

Arrays qkv_projection(const Arrays& inputs, const QKVLayout& layout, const Products& products);

Arrays qkv_projection_grad(const Arrays& inputs, const QKVGradLayout& layout, const Products& products);

Arrays output_projection(const Arrays& inputs, const OutputLayout& layout, const Products& products);

Arrays output_projection_grad(const Arrays& inputs, const OutputGradLayout& layout, const Products& products);

}  // namespace mlx_fused::composed
