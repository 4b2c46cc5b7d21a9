#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "mlx/array.h"
#include "mlx_fused/activation.h"
#include "mlx_fused/quantization.h"

// A projection as plain data: what it computes, and the order of its arrays among a primitive's inputs.
namespace mlx_fused {

namespace mx = mlx::core;

using Arrays = std::vector<mx::array>;

// One linear layer of a call, y = x W^T + bias + scale (x A) B.
struct Segment {
  int features;
  int heads = 0;  // the output is [B, heads, S, features / heads], or [B, S, features] if heads is 0
  std::optional<float> adapter_scale = std::nullopt;  // unset if the segment has no adapter

  bool operator==(const Segment&) const = default;
};

// out = residual + alpha y, or an activation of y.
struct Epilogue {
  bool has_residual = false;
  float alpha = 1;
  bool exact = false;  // round after every step, as mlx-lm's modules do, instead of once at the end
  Activation activation = {};

  bool operator==(const Epilogue&) const = default;
};

// The RMS norm of a call's input: x / sqrt(mean(x^2) + eps), times a weight if there is one.
struct Norm {
  float eps;
  bool has_weight;

  bool operator==(const Norm&) const = default;
};

// Several linear layers of one input. Either all have a bias or none has, and all share one quantization.
struct Call {
  std::string operation;  // the Python function's name, for error messages
  std::string node;       // the primitive's name in graphs
  std::vector<Segment> segments;
  bool has_bias = false;
  std::optional<Quantization> quantization = std::nullopt;
  Epilogue epilogue = {};
  std::optional<Norm> norm = std::nullopt;  // if the input is still to be normed

  bool operator==(const Call&) const = default;

  bool has_adapters() const;

  // The same without its activation, whose outputs are what the activation is of.
  Call linear() const;

  // Whether its layers have dense weights, no bias and no adapter; says nothing of the epilogue.
  bool is_plain() const {
    return !quantization && !has_bias && !has_adapters();
  }
};

enum class Role {
  cotangent,
  input,
  norm_weight,
  weight,
  group_scales,
  group_biases,
  bias,
  lora_a,
  lora_b,
  residual
};

// Names one array of a call. Arrays that all segments share (input, norm's weight, residual) have
// segment 0.
struct Slot {
  Role role;
  int segment = 0;

  bool operator==(const Slot&) const = default;
};

using Slots = std::vector<Slot>;

bool contains(const Slots& slots, const Slot& slot);

// The gradients of some of a call's arrays; each wanted slot is one output.
struct GradCall {
  Call forward;
  // Never a quantized weight, which has no gradient, nor the residual, whose gradient is the cotangent.
  Slots wanted;

  bool operator==(const GradCall&) const = default;

  bool wants(Role role, int segment = 0) const {
    return contains(wanted, {role, segment});
  }

  // The factor of a segment's low-rank products in the gradients; 0 if the segment has no adapter.
  float adapter_scale(int segment) const {
    return forward.segments[segment].adapter_scale.value_or(0) * forward.epilogue.alpha;
  }
};

// The slots of a primitive's inputs, in order. A gradient primitive takes only the arrays that it reads.
Slots input_slots(const Call& call);
Slots input_slots(const GradCall& call);

// Looks up values by slot: a primitive's arrays, or what describes them.
template <typename T>
class BySlot {
 public:
  BySlot(const std::vector<T>& values, Slots slots) : values_(values), slots_(std::move(slots)) {}

  // Null if there is no value for the slot.
  const T* find(Role role, int segment = 0) const {
    auto it = std::find(slots_.begin(), slots_.end(), Slot{role, segment});
    return it == slots_.end() ? nullptr : &values_[it - slots_.begin()];
  }

  // The slot must have a value.
  const T& get(Role role, int segment = 0) const {
    return *find(role, segment);
  }

 private:
  const std::vector<T>& values_;
  const Slots slots_;
};

using Operands = BySlot<mx::array>;

}  // namespace mlx_fused
