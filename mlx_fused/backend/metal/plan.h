#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "metal/params.h"
#include "mlx_fused/backend/metal/kernel.h"
#include "mlx_fused/backend/metal/layout.h"
#include "mlx_fused/call.h"

// What a call would encode on a GPU, as plain data: built and tested on every platform, encoded on macOS.
namespace mlx_fused::metal {

struct Binding {
  int index;  // of the kernel's buffer
  int array;  // as a tensor's
  bool is_output;
};

using Extent = std::array<uint32_t, 3>;

struct Launch {
  Kernel kernel;
  std::vector<Binding> buffers;
  ProjectionParams params;
  Extent grid, threadgroup;  // the grid counts threadgroups
};

struct Plan {
  std::vector<Launch> launches;      // each may read what those before it wrote
  std::vector<int64_t> temporaries;  // the sizes, in bytes, of arrays between them
};

// For a GPU of so many cores. The inputs are those of the call's slots; there is an output for each segment.
Plan plan_projection(
    const Call& call,
    DType dtype,
    int cores,
    const std::vector<Tensor>& inputs,
    const std::vector<Tensor>& outputs);

// The outputs are the gradients wanted.
Plan plan_gradients(
    const GradCall& call,
    DType dtype,
    int cores,
    const std::vector<Tensor>& inputs,
    const std::vector<Tensor>& outputs);

}  // namespace mlx_fused::metal
