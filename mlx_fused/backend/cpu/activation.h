#pragma once

#include <vector>

#include "mlx_fused/backend/cpu/projection.h"

namespace mlx_fused::cpu {

// out = the activation of `pre`, which is y, or gate and up.
void activate(const std::vector<View>& pre, const View& out, const Activation& activation);

// d_pre = the gradients of `pre` where `cotangent` is that of the activation.
void activate_grad(
    const View& cotangent,
    const std::vector<View>& pre,
    const std::vector<View>& d_pre,
    const Activation& activation);

// up = what a gated activation multiplies with.
void clip_up(const Activation& activation, float* up, int64_t n);

}  // namespace mlx_fused::cpu
