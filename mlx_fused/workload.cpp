#include "mlx_fused/workload.h"

#include <algorithm>

#include "mlx/ops.h"

namespace mlx_fused {

namespace {

// The dtype MLX would promote each segment's output to and, last, that of the sum with the residual.
std::vector<mx::Dtype> promoted_types(const Arrays& inputs, const Call& call, const Slots& slots) {
  std::vector<mx::Dtype> types(call.segments.size(), norm_type(inputs, call));
  for (size_t i = 0; i < slots.size(); ++i) {
    auto [role, segment] = slots[i];
    bool is_weight = role == Role::weight || role == Role::group_scales || role == Role::group_biases;
    if ((is_weight && mx::issubdtype(inputs[i].dtype(), mx::floating)) || role == Role::bias) {
      types[segment] = mx::promote_types(types[segment], inputs[i].dtype());
    } else if (role == Role::residual) {
      types.push_back(mx::promote_types(types[0], inputs[i].dtype()));
    }
  }
  return types;
}

// The rank of each segment's adapter; 0 for those of which nothing is read.
std::vector<int> ranks(const Operands& operands, const Call& call) {
  std::vector<int> ranks;
  ranks.reserve(call.segments.size());
  for (int i = 0; i < int(call.segments.size()); ++i) {
    auto* a = operands.find(Role::lora_a, i);
    ranks.push_back(a ? a->shape(1) : 0);
  }
  return ranks;
}

// Heads that are an axis lie between the rows of one example and those of the next.
std::optional<int64_t> line_rows(const Call& call, int batch, int rows) {
  bool apart = std::any_of(
      call.segments.begin(), call.segments.end(), [](auto& segment) { return segment.heads > 1; });
  return apart && batch > 1 && rows > 1 ? std::optional<int64_t>(rows) : std::nullopt;
}

}  // namespace

mx::Dtype norm_type(const Arrays& inputs, const Call& call) {
  bool weighted = call.norm && call.norm->has_weight;
  return weighted ? mx::promote_types(inputs[0].dtype(), inputs[1].dtype()) : inputs[0].dtype();
}

std::optional<int> in_features(const Operands& operands, const Call& forward) {
  if (auto* x = operands.find(Role::input)) {
    return x->shape(2);
  }
  if (auto* scales = operands.find(Role::group_scales)) {
    return scales->shape(1) * forward.quantization->group_size;
  }
  auto* weight = operands.find(Role::weight);
  return weight ? std::optional(weight->shape(1)) : std::nullopt;
}

Workload workload(const Arrays& inputs, const Call& call, const Slots& slots) {
  auto& x = inputs[0];
  return {
      .call = call,
      .promoted = promoted_types(inputs, call, slots),
      .rows = int64_t(x.shape(0)) * x.shape(1),
      .in_features = x.shape(2),
      .line_rows = line_rows(call, x.shape(0), x.shape(1)),
      .ranks = ranks(Operands(inputs, slots), call)};
}

Workload workload(const Arrays& inputs, const GradCall& call) {
  auto& forward = call.forward;
  Operands operands(inputs, input_slots(call));
  auto& cotangent = operands.get(Role::cotangent);
  Workload work{
      .call = forward,
      .promoted = {cotangent.dtype()},
      .rows = int64_t(cotangent.shape(0)) * cotangent.shape(-2),
      .in_features = in_features(operands, forward).value_or(0),
      .wanted = &call.wanted,
      .line_rows = line_rows(forward, cotangent.shape(0), cotangent.shape(-2)),
      .ranks = ranks(operands, forward)};
  for (int i = 0; i < int(forward.segments.size()); ++i) {
    // On Metal a bias's gradient comes only with its weight's.
    work.no_metal_kernel |= call.wants(Role::bias, i) && !call.wants(Role::weight, i);
  }
  return work;
}

}  // namespace mlx_fused
