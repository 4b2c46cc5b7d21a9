#include "mlx_fused/backend/metal/plan.h"

#include "mlx_fused/backend/metal/planner.h"

namespace mlx_fused::metal {

namespace {

// [B, S, features] as one head.
std::vector<Tensor> by_heads(std::vector<Tensor> tensors) {
  for (auto& t : tensors) {
    if (t.shape.size() == 3) {
      t.shape.insert(t.shape.begin() + 1, 1);
      t.strides.insert(t.strides.begin() + 1, 0);
    }
  }
  return tensors;
}

}  // namespace

Plan plan_projection(
    const Call& call,
    const std::string& dtype,
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
  Planner planner(call, dtype, tensors, scales);
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

Plan plan_gradients(
    const GradCall& call,
    const std::string& dtype,
    const std::vector<Tensor>& inputs,
    const std::vector<Tensor>& outputs) {
  auto in = by_heads(inputs), out = by_heads(outputs);
  int segments = call.forward.segments.size();
  std::vector<float> scales;
  for (int i = 0; i < segments; ++i) {
    scales.push_back(call.adapter_scale(i));
  }
  Tensors tensors(in, input_slots(call)), grads(out, call.wanted);
  Planner planner(call.forward, dtype, tensors, scales);
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
