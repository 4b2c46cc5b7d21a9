#pragma once

#include <utility>
#include <vector>

#include "mlx_fused/backend/metal/bindings.h"
#include "mlx_fused/backend/metal/plan.h"

// Makes the launches of one call's plan, part by part.
namespace mlx_fused::metal {

// Activations and their gradients are [B, heads, S, head_dim] here.
class Planner {
 public:
  // `scales` are what the segments' low-rank products are multiplied by.
  Planner(const Call& call, DType dtype, int cores, const Tensors& inputs, std::vector<float> scales);

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

  Kernel kernel_on_weights(Function function) const;

  // Adds a launch of a kernel for the plan's dtype.
  void launch(Launch launch);

  // The same of tiles, which split their depth if they are too few, and then of what adds up the splits.
  // `depth` counts whole blocks. The last buffer is that of partial sums.
  void launch_tiles(Launch launch, Function splits, int64_t depth);

  // A temporary of float32.
  Tensor add_temporary(int64_t rows, int64_t columns);

  const Call& call_;
  const DType dtype_;
  const int cores_;
  Format format_;
  const Tensors& inputs_;
  const std::vector<float> scales_;
  Tensor low_rank_{0, {0}, {1}};  // the latest low-rank product
};

}  // namespace mlx_fused::metal
