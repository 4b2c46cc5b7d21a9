#pragma once

#include <string>
#include <utility>
#include <vector>

#include "mlx_fused/backend/metal/plan.h"

// How plans are made, launch by launch. Activations and their gradients are [B, heads, S, head_dim].
namespace mlx_fused::metal {

using Tensors = BySlot<Tensor>;
using Parts = std::vector<const Tensor*>;  // of every segment, null where it has none

inline uint32_t ceil_div(int64_t a, int64_t b) {
  return static_cast<uint32_t>((a + b - 1) / b);
}

inline bool is_empty(const Tensor& t) {
  return std::find(t.shape.begin(), t.shape.end(), 0) != t.shape.end();
}

// The batch and row axes of a launch's tensors, those of segments first and without others that there are
// not: one axis of rows wherever all of them allow it, so that tiles are full.
struct Rows {
  int64_t batch, rows;
  std::vector<RowStrides> strides;

  explicit Rows(const Parts& by_segment, const Parts& others = {});
};

// Every buffer that a kernel has is bound: what is not there, or is empty and so has no memory, to the
// output, which always is.
class Bindings {
 public:
  explicit Bindings(const Tensor& output) : output_(output) {}

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

class Planner {
 public:
  // `scales` are what the segments' low-rank products are multiplied by.
  Planner(const Call& call, const std::string& dtype, const Tensors& inputs, std::vector<float> scales)
      : call_(call), dtype_(dtype), inputs_(inputs), scales_(std::move(scales)) {}

  void add_projection(const Parts& outputs);
  void add_input_grad(const Tensor& dx);
  void add_weight_grad(const Tensors& grads);

  // The low-rank product x A (lora_a) or dy B^T (lora_b), scaled, of all adapters side by side, in a
  // temporary that the launches after it read.
  void add_low_rank_product(Role factor);

  // dA = x^T (dy B^T) or dB = (x A)^T dy, of those wanted.
  void add_adapter_grad(Role factor, const Tensors& grads);

  int64_t rank(int segment) const;  // 0 without an adapter
  bool has_adapters() const;

  Plan plan;

 private:
  Parts parts(const Tensors& tensors, Role role) const;
  Parts multiplied_with(Role factor) const;
  ProjectionParams call_params(const Rows& rows, const Parts& by_segment) const;
  void set_adapters(ProjectionParams& params, Role factor, const Parts& factors) const;
  void bind_weights(ProjectionParams& params, Bindings& bindings) const;

  // Adds a launch of the kernel <name>_<dtype>, or of one for weights of a format, <name>_<format>_<dtype>.
  void launch(const std::string& name, Launch launch);
  void launch_on_weights(const std::string& name, Launch launch);

  const Call& call_;
  const std::string& dtype_;
  const Tensors& inputs_;
  const std::vector<float> scales_;
  Tensor low_rank_{0, {0}, {1}};  // of the last product
};

}  // namespace mlx_fused::metal
