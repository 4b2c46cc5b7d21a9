#pragma once

#include <optional>
#include <string>

#include "mlx/utils.h"
#include "mlx_fused/arguments.h"

namespace mlx_fused {

// residual + alpha * layer(x): [B, S, H] from x [B, S, K]. `route` is "composed", "fused" or unset, as in
// choose_route.
mx::array output_projection(
    const mx::array& x,
    const Linear& layer,
    const mx::array& residual,
    float alpha,
    bool exact,
    const std::optional<std::string>& route,
    mx::StreamOrDevice s);

// The gradients of x, weight and, if has_bias, bias.
Arrays output_projection_bwd(
    const mx::array& d_output,
    const mx::array& x,
    const mx::array& weight,
    bool has_bias,
    const std::optional<std::string>& route,
    mx::StreamOrDevice s);

}  // namespace mlx_fused
