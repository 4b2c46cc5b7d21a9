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

// For a GPU of so many cores. The inputs are those of the call's slots; there is an output for each segment
// or, with an activation, one of that and, if they are to be kept, those of what it is of.
Plan plan_projection(
    const Call& call,
    DType dtype,
    int cores,
    const std::vector<Tensor>& inputs,
    const std::vector<Tensor>& outputs);

// The constants by which kernels know an activation.
void set_activation(Constants& constants, const Activation& activation);

// Of `pre`, which is y, or gate and up: [batch, rows, features].
Plan plan_activation(
    const Activation& activation, DType dtype, const std::vector<Tensor>& pre, const Tensor& output);

// The outputs are the gradients of `pre`, which lie alike.
Plan plan_activation_grad(
    const Activation& activation,
    DType dtype,
    const Tensor& cotangent,
    const std::vector<Tensor>& pre,
    const std::vector<Tensor>& outputs);

// The outputs are the gradients wanted.
Plan plan_gradients(
    const GradCall& call,
    DType dtype,
    int cores,
    const std::vector<Tensor>& inputs,
    const std::vector<Tensor>& outputs);

}  // namespace mlx_fused::metal
