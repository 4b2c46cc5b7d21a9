#include "mlx_fused/backend/metal/grid.h"
#include "mlx_fused/backend/metal/planner.h"

namespace mlx_fused::metal {

void Planner::add_input_grad(const Tensor& dx) {
  auto grads = parts(inputs_, Role::cotangent), lora_a = parts(inputs_, Role::lora_a);
  Rows rows(grads, {&dx});
  auto params = call_params(rows, grads);
  params.input_grad = rows.strides.back();
  params.in_features = dx.shape[3];
  set_adapters(params, Role::lora_a, lora_a);

  Bindings bindings(dx);
  bindings.add_segments(buffer_gradient, grads);
  bind_weights(params, bindings);
  bindings.add(buffer_low_rank, &low_rank_);
  bindings.add_segments(buffer_lora, lora_a);
  bindings.add(buffer_output, &dx, true);
  bindings.add(buffer_partial, nullptr);

  auto kernel = kernel_on_weights(Function::input_grad);
  kernel.rows = tile_rows(rows.rows, call_.quantization.has_value());
  kernel.constants.set(constant_has_adapter, has_adapters());
  auto tiles = ceil_div(params.in_features, tile_cols);
  int64_t depth = 0;  // every head begins with a block
  for (int i = 0; i < params.segments; ++i) {
    auto& s = params.segment[i];
    depth += s.features / s.head_dim * ceil_div(s.head_dim, tile_depth) * tile_depth;
  }
  launch_tiles(
      {.kernel = kernel,
       .buffers = std::move(bindings.buffers),
       .params = params,
       .grid = {tiles, ceil_div(rows.rows, kernel.rows), static_cast<uint32_t>(rows.batch)},
       .threadgroup = {tile_threads, 1, 1}},
      Function::input_grad_splits,
      depth);
}

void Planner::add_weight_grad(const Tensors& grads) {
  Parts cotangents, weights, biases;  // of the segments whose weight gradient is wanted
  for (size_t i = 0; i < call_.segments.size(); ++i) {
    if (auto* dw = grads.find(Role::weight, i)) {
      cotangents.push_back(&inputs_.get(Role::cotangent, i));
      weights.push_back(dw);
      biases.push_back(grads.find(Role::bias, i));
    }
  }
  if (weights.empty() || is_empty(*weights[0])) {
    return;
  }
  auto& x = inputs_.get(Role::input);
  Rows rows(cotangents, {&x});
  auto params = call_params(rows, cotangents);
  params.input = rows.strides.back();
  params.in_features = x.shape[3];
  uint32_t tiles = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    auto& s = params.segment[i];
    s.weight_row_stride = weights[i]->strides[0];
    s.has_bias_grad = biases[i] != nullptr;
    s.first_tile = tiles;
    tiles += s.features / s.head_dim * ceil_div(s.head_dim, weight_grad_rows);
  }

  Bindings bindings(*weights[0]);
  bindings.add(buffer_input, &x);
  bindings.add_segments(buffer_gradient, cotangents);
  bindings.add_segments(buffer_output, weights, true);
  bindings.add_segments(buffer_bias, biases, true);
  launch(
      {.kernel = {.function = Function::weight_grad},
       .buffers = std::move(bindings.buffers),
       .params = params,
       .grid = {ceil_div(params.in_features, tile_cols), tiles, 1},
       .threadgroup = {tile_threads, 1, 1}});
}

Plan plan_gradients(
    const GradCall& call,
    DType dtype,
    int cores,
    const std::vector<Tensor>& inputs,
    const std::vector<Tensor>& outputs) {
  auto in = by_heads(inputs), out = by_heads(outputs);
  int segments = call.forward.segments.size();
  std::vector<float> scales;
  for (int i = 0; i < segments; ++i) {
    scales.push_back(call.adapter_scale(i));
  }
  Tensors tensors(in, input_slots(call)), grads(out, call.wanted);
  Planner planner(call.forward, dtype, cores, tensors, scales);
  auto wants = [&](Role factor) {
    for (int i = 0; i < segments; ++i) {
      if (call.wants(factor, i) && planner.rank(i) > 0) {
        return true;
      }
    }
    return false;
  };
  auto* dx = grads.find(Role::input);
  bool wants_dx = dx && !is_empty(*dx);

  if (wants(Role::lora_a) || (wants_dx && planner.has_adapters())) {
    planner.add_low_rank_product(Role::lora_b);
  }
  if (wants_dx) {
    planner.add_input_grad(*dx);
  }
  if (wants(Role::lora_a)) {
    planner.add_adapter_grad(Role::lora_a, grads);
  }
  if (wants(Role::lora_b)) {
    planner.add_low_rank_product(Role::lora_a);
    planner.add_adapter_grad(Role::lora_b, grads);
  }
  planner.add_weight_grad(grads);
  return planner.plan;
}

}  // namespace mlx_fused::metal
