#pragma once

#include "mlx/backend/metal/device.h"
#include "mlx_fused/backend/metal/kernel.h"

namespace mlx_fused::metal {

// One of our kernels, from the metallib beside the extension, or else from the source there, compiled by the
// device for weights of one format. Threads may call it at once.
MTL::ComputePipelineState* pipeline(mlx::core::metal::Device& device, const Kernel& kernel);

}  // namespace mlx_fused::metal
