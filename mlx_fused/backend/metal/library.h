#pragma once

#include <string>

#include "mlx/backend/metal/device.h"

namespace mlx_fused::metal {

// Our kernels: the metallib beside the extension, or else the source there, compiled by the device for
// weights of one format.
MTL::Library* library(mlx::core::metal::Device& device, const std::string& format);

}  // namespace mlx_fused::metal
