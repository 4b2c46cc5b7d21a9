#include <algorithm>

#include "mlx_fused/backend/metal/grid.h"
#include "mlx_fused/backend/metal/planner.h"

namespace mlx_fused::metal {

void Planner::add_projection(const Parts& outputs) {
  auto& x = inputs_.get(Role::input);
  auto* residual = inputs_.find(Role::residual);
  auto& activation = call_.epilogue.activation;
  auto of_segments = activation ? Parts(call_.segments.size(), outputs[0]) : outputs;
  Rows rows(of_segments, {&x, residual});
  auto params = call_params(rows, of_segments);
  int64_t tokens = rows.batch * rows.rows;
  bool few = reads_few_rows(call_, inputs_), gated = activation.gated, normed = call_.norm.has_value();
  params.activation_alpha = activation.alpha;
  params.activation_limit = activation.limit;
  params.norm_eps = normed ? call_.norm->eps : 0;
  params.input = rows.strides[of_segments.size()];
  if (residual) {
    params.residual = rows.strides.back();
  }
  params.in_features = x.shape[3];
  uint32_t tiles = 0;
  for (int i = 0; i < params.segments; ++i) {
    auto& s = params.segment[i];
    s.first_tile = tiles;
    if (!gated || i == 0) {  // up's are the gate's
      tiles += ceil_div(s.features, few ? features_per_threadgroup(gated, normed) : features_per_tile(gated));
    }
  }
  auto lora_b = parts(inputs_, Role::lora_b);
  set_adapters(params, Role::lora_b, lora_b);

  Bindings bindings(*outputs[0]);
  bindings.add(buffer_input, &x);
  if (few) {
    bindings.add(buffer_norm, inputs_.find(Role::norm_weight));
  }
  bind_weights(params, bindings);
  bindings.add_segments(buffer_bias, parts(inputs_, Role::bias));
  bindings.add(buffer_residual, residual);
  bindings.add(buffer_low_rank, &low_rank_);
  bindings.add_segments(buffer_lora, lora_b);
  bindings.add_segments(buffer_output, outputs, true);

  auto of_rows = normed ? Function::projection_rows_normed : Function::projection_rows;
  auto kernel = kernel_on_weights(few ? of_rows : Function::projection);
  auto& constants = kernel.constants;
  constants.set(constant_has_bias, call_.has_bias);
  constants.set(constant_has_residual, residual != nullptr);
  constants.set(constant_has_adapter, has_adapters());
  constants.set(constant_is_quantized, call_.quantization.has_value());
  constants.set(constant_exact, call_.epilogue.exact);
  set_activation(constants, activation);
  constants.set(constant_keeps, activation && outputs.size() > 1);
  if (few) {
    constants.set(constant_has_norm_weight, normed && call_.norm->has_weight);
    auto passes = passes_of(tokens);
    kernel.rows = ceil_div(tokens, passes);
    launch(
        {.kernel = kernel,
         .buffers = std::move(bindings.buffers),
         .params = params,
         .grid = {tiles, passes, 1},
         .threadgroup = {32u * (normed ? norm_simdgroups : projection_simdgroups), 1, 1}});
  } else {
    kernel.rows = tile_rows(rows.rows);
    bindings.add(buffer_partial, nullptr);
    launch_tiles(
        {.kernel = kernel,
         .buffers = std::move(bindings.buffers),
         .params = params,
         .grid = {tiles, ceil_div(rows.rows, kernel.rows), static_cast<uint32_t>(rows.batch)},
         .threadgroup = {tile_threads, 1, 1}},
        Function::projection_splits,
        params.in_features);
  }
}

Plan plan_projection(
    const Call& call,
    DType dtype,
    int cores,
    const std::vector<Tensor>& inputs,
    const std::vector<Tensor>& outputs) {
  if (is_empty(outputs[0])) {
    return {};
  }
  auto in = by_heads(inputs), out = by_heads(outputs);
  std::vector<float> scales;
  for (auto& s : call.segments) {
    scales.push_back(s.adapter_scale.value_or(0));
  }
  Tensors tensors(in, input_slots(call));
  Planner planner(call, dtype, cores, tensors, scales);
  if (planner.has_adapters()) {
    planner.add_low_rank_product(Role::lora_a);
  }
  Parts parts;
  for (auto& t : out) {
    parts.push_back(&t);
  }
  planner.add_projection(parts);
  return planner.plan;
}

}  // namespace mlx_fused::metal
