#pragma once

#include "mlx/array.h"
#include "mlx/utils.h"
#include "mlx_fused/fused_primitive.h"
#include "mlx_fused/layout.h"

// The operations written in public MLX ops: what they mean, and what runs where no kernel of ours does.
namespace mlx_fused::composed {

namespace mx = mlx::core;

Arrays qkv_projection(const Arrays& inputs, const QKVLayout& layout, mx::StreamOrDevice s);

Arrays qkv_projection_grad(const Arrays& inputs, const QKVGradLayout& layout, mx::StreamOrDevice s);

Arrays output_projection(const Arrays& inputs, const OutputLayout& layout, mx::StreamOrDevice s);

Arrays output_projection_grad(const Arrays& inputs, const OutputGradLayout& layout, mx::StreamOrDevice s);

}  // namespace mlx_fused::composed
