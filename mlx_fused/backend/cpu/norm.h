#pragma once

#include <optional>

#include "mlx_fused/backend/cpu/projection.h"

namespace mlx_fused::cpu {

// out = x / sqrt(mean(x^2) + eps) for every row, times the weight, [1, cols], if there is one. Rounds to
// out's type before that too.
void rms_norm(const View& x, const std::optional<View>& weight, const View& out, float eps);

// The gradients where `cotangent` is that of the norm: of x and, if wanted, of the weight.
void rms_norm_grad(
    const View& cotangent,
    const View& x,
    const std::optional<View>& weight,
    const View& dx,
    const std::optional<View>& d_weight,
    float eps);

}  // namespace mlx_fused::cpu
