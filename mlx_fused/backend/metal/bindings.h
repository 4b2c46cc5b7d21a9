#pragma once

#include <algorithm>
#include <vector>

#include "mlx_fused/backend/metal/plan.h"

namespace mlx_fused::metal {

// Every buffer of a kernel must be bound, at an offset that suits its type. For a tensor that is missing, or
// empty, the output is: it begins its memory, so it suits them all.
class Bindings {
 public:
  explicit Bindings(const Tensor& output) : output_(output) {
    buffers.reserve(buffer_count);
  }

  void add(int index, const Tensor* tensor, bool is_output = false) {
    buffers.push_back({index, (tensor && !is_empty(*tensor) ? *tensor : output_).array, is_output});
  }

  // Three, whatever the number of segments.
  void add_segments(int index, const Parts& parts, bool is_output = false) {
    for (size_t i = 0; i < 3; ++i) {
      add(index + i, parts[std::min(i, parts.size() - 1)], is_output);
    }
  }

  std::vector<Binding> buffers;

 private:
  const Tensor& output_;
};

}  // namespace mlx_fused::metal
