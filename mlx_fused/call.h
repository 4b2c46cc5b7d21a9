#pragma once

#include <optional>
#include <string>
#include <vector>

#include "mlx/array.h"
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

// out = residual + alpha y.
struct Epilogue {
  bool has_residual = false;
  float alpha = 1;
  bool exact = false;  // round after every step, as mlx-lm's modules do, instead of once at the end

  bool operator==(const Epilogue&) const = default;
};

// Several linear layers of one input. Either all have a bias or none has, and all share one quantization.
struct Call {
  std::string operation;  // the Python function's name, for error messages
  std::string node;       // the primitive's name in graphs
  std::vector<Segment> segments;
  bool has_bias = false;
  std::optional<Quantization> quantization = std::nullopt;
  Epilogue epilogue = {};

  bool operator==(const Call&) const = default;

  bool has_adapters() const;
};

enum class Role { cotangent, input, weight, group_scales, group_biases, bias, lora_a, lora_b, residual };

// Names one array of a call. Arrays that all segments share (input, residual) have segment 0.
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
};

// The slots of a primitive's inputs, in order. A gradient primitive takes only the arrays that it reads.
Slots input_slots(const Call& call);
Slots input_slots(const GradCall& call);

// Looks up a primitive's arrays by slot.
class Operands {
 public:
  Operands(const Arrays& arrays, Slots slots) : arrays_(arrays), slots_(std::move(slots)) {}

  // Null if there is no such array.
  const mx::array* find(Role role, int segment = 0) const;

  // The array must be there.
  const mx::array& get(Role role, int segment = 0) const {
    return *find(role, segment);
  }

 private:
  const Arrays& arrays_;
  const Slots slots_;
};

}  // namespace mlx_fused
