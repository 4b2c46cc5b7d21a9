#include "mlx_fused/call.h"

namespace mlx_fused {

namespace {

void add_weight(Slots& slots, const Call& call, int segment) {
  slots.push_back({Role::weight, segment});
  if (call.quantization) {
    slots.push_back({Role::group_scales, segment});
    if (call.quantization->has_biases) {
      slots.push_back({Role::group_biases, segment});
    }
  }
}

void add_adapter(Slots& slots, const Call& call, int segment) {
  if (call.segments[segment].adapter_scale) {
    slots.push_back({Role::lora_a, segment});
    slots.push_back({Role::lora_b, segment});
  }
}

}  // namespace

bool Call::has_adapters() const {
  return std::any_of(segments.begin(), segments.end(), [](auto& s) { return s.adapter_scale.has_value(); });
}

Call Call::linear() const {
  auto call = *this;
  call.epilogue.activation = {};
  return call;
}

bool contains(const Slots& slots, const Slot& slot) {
  return std::find(slots.begin(), slots.end(), slot) != slots.end();
}

Slots input_slots(const Call& call) {
  Slots slots;
  slots.reserve(3 + 6 * call.segments.size());
  slots.push_back({Role::input});
  if (call.norm && call.norm->has_weight) {
    slots.push_back({Role::norm_weight});
  }
  for (int i = 0; i < int(call.segments.size()); ++i) {
    add_weight(slots, call, i);
    if (call.has_bias) {
      slots.push_back({Role::bias, i});
    }
    add_adapter(slots, call, i);
  }
  if (call.epilogue.has_residual) {
    slots.push_back({Role::residual});
  }
  return slots;
}

Slots input_slots(const GradCall& call) {
  auto& forward = call.forward;
  auto reads_input = [](const Slot& s) {
    return s.role == Role::weight || s.role == Role::lora_a || s.role == Role::lora_b;
  };
  Slots slots;
  if (std::any_of(call.wanted.begin(), call.wanted.end(), reads_input)) {
    slots.push_back({Role::input});
  }
  for (int i = 0; i < int(forward.segments.size()); ++i) {
    slots.push_back({Role::cotangent, i});
    if (call.wants(Role::input)) {
      add_weight(slots, forward, i);
    }
    if (call.wants(Role::input) || call.wants(Role::lora_a, i) || call.wants(Role::lora_b, i)) {
      add_adapter(slots, forward, i);
    }
  }
  return slots;
}

}  // namespace mlx_fused
