#pragma once

#include "mlx/backend/metal/device.h"

namespace mlx_fused::metal {

// Our kernels: the metallib beside the extension, or else its source there, compiled by the device.
MTL::Library* library(mlx::core::metal::Device& device);

}  // namespace mlx_fused::metal
