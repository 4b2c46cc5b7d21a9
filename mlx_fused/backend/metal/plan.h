#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "metal/params.h"
#include "mlx_fused/call.h"

// What a call would encode on a GPU, as plain data: built and tested on every platform, encoded on macOS.
namespace mlx_fused::metal {

// The shape and strides, in elements, of one of a call's arrays.
struct Tensor {
  int array;  // its number: the inputs first, then the outputs
  std::vector<int64_t> shape, strides;
};

struct Binding {
  int index;  // of the kernel's buffer
  int array;  // -1 - i for the plan's temporary i
  bool is_output;
};

using Extent = std::array<uint32_t, 3>;

struct Launch {
  std::string kernel;
  std::string format = "dense";  // kernels for one format of weights are compiled apart from the others
  std::vector<std::pair<ConstantIndex, bool>> constants;
  std::vector<Binding> buffers;
  ProjectionParams params;
  Extent grid, threadgroup;  // the grid counts threadgroups
};

struct Plan {
  std::vector<Launch> launches;      // each may read what those before it wrote
  std::vector<int64_t> temporaries;  // the sizes, in bytes, of arrays between them
};

// The inputs are those of the call's slots; there is an output for each segment.
Plan plan_projection(
    const Call& call,
    const std::string& dtype,
    const std::vector<Tensor>& inputs,
    const std::vector<Tensor>& outputs);

// The outputs are the gradients wanted.
Plan plan_gradients(
    const GradCall& call,
    const std::string& dtype,
    const std::vector<Tensor>& inputs,
    const std::vector<Tensor>& outputs);

}  // namespace mlx_fused::metal
