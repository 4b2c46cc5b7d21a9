#pragma once

#include <optional>

#include "mlx_fused/call.h"
#include "mlx_fused/routing.h"

namespace mlx_fused {

// What routing looks at, of a call's arrays in the order of its slots.
Workload workload(const Arrays& inputs, const Call& call, const Slots& slots);

// The same of a gradient.
Workload workload(const Arrays& inputs, const GradCall& call);

// The dtype of the input as the layers get it.
mx::Dtype norm_type(const Arrays& inputs, const Call& call);

// The number of input features, from whichever array the gradient reads; nullopt if none of them tells.
std::optional<int> in_features(const Operands& operands, const Call& forward);

}  // namespace mlx_fused
