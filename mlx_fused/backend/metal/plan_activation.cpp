// Activations of arrays that are there already, and their gradients: a launch each.
#include "mlx_fused/backend/metal/bindings.h"
#include "mlx_fused/backend/metal/grid.h"
#include "mlx_fused/backend/metal/plan.h"

namespace mlx_fused::metal {

namespace {

Plan plan(
    Function function,
    const Activation& activation,
    DType dtype,
    const Tensor* cotangent,
    const Parts& pre,
    const Parts& outputs) {
  Parts others = {outputs[0], cotangent};
  Rows rows(pre, others);
  ProjectionParams params{};
  params.batch = rows.batch;
  params.rows = rows.rows;
  params.in_features = outputs[0]->shape[3];
  params.activation_alpha = activation.alpha;
  params.activation_limit = activation.limit;
  for (size_t i = 0; i < pre.size(); ++i) {
    params.segment[i] = segment_params(*pre[i], rows.strides[i]);
  }
  params.output = rows.strides[pre.size()];
  params.input = rows.strides.back();

  Bindings bindings(*outputs[0]);
  bindings.add_segments(buffer_left, pre);
  if (cotangent) {
    bindings.add_segments(buffer_gradient, {cotangent});
  }
  bindings.add_segments(buffer_output, outputs, true);
  Kernel kernel{.function = function, .dtype = dtype};
  set_activation(kernel.constants, activation);
  auto tiles = ceil_div(params.in_features, tile_threads * elements_per_thread);
  return {
      {{.kernel = kernel,
        .buffers = std::move(bindings.buffers),
        .params = params,
        .grid = {tiles, static_cast<uint32_t>(rows.rows), static_cast<uint32_t>(rows.batch)},
        .threadgroup = {tile_threads, 1, 1}}}};
}

Parts pointers(const std::vector<Tensor>& tensors) {
  Parts parts;
  for (auto& t : tensors) {
    parts.push_back(&t);
  }
  return parts;
}

}  // namespace

void set_activation(Constants& constants, const Activation& activation) {
  constants.set(constant_activation_low, activation.kind & 1);
  constants.set(constant_activation_mid, activation.kind & 2);
  constants.set(constant_activation_high, activation.kind & 4);
  constants.set(constant_is_gated, activation.gated);
}

Plan plan_activation(
    const Activation& activation, DType dtype, const std::vector<Tensor>& pre, const Tensor& output) {
  if (is_empty(output)) {
    return {};
  }
  auto in = by_heads(pre), out = by_heads({output});
  return plan(Function::activation, activation, dtype, nullptr, pointers(in), pointers(out));
}

Plan plan_activation_grad(
    const Activation& activation,
    DType dtype,
    const Tensor& cotangent,
    const std::vector<Tensor>& pre,
    const std::vector<Tensor>& outputs) {
  if (is_empty(cotangent)) {
    return {};
  }
  auto in = by_heads(pre), out = by_heads(outputs), g = by_heads({cotangent});
  return plan(Function::activation_grad, activation, dtype, &g[0], pointers(in), pointers(out));
}

}  // namespace mlx_fused::metal
