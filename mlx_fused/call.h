#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "mlx/array.h"
#include "mlx_fused/quantization.h"

// A projection as plain data: what it computes, and in which order its arrays are a primitive's inputs.
namespace mlx_fused {

namespace mx = mlx::core;

using Arrays = std::vector<mx::array>;

// One linear layer of a call, y = x W^T + bias + scale (x A) B.
struct Segment {
  int features;
  int heads = 0;  // its output is [B, heads, S, features / heads], or with 0 heads [B, S, features]
  std::optional<float> adapter_scale = std::nullopt;  // if it has an adapter

  bool operator==(const Segment&) const = default;
};

// out = residual + alpha y.
struct Epilogue {
  bool has_residual = false;
  float alpha = 1;
  bool exact = false;  // round where mlx-lm's modules do, and not once

  bool operator==(const Epilogue&) const = default;
};

// Several linear layers of one input, all with a bias or none, quantized alike or not at all.
struct Call {
  std::string operation;  // for messages
  std::string node;       // its name in graphs
  std::vector<Segment> segments;
  bool has_bias = false;
  std::optional<Quantization> quantization = std::nullopt;
  Epilogue epilogue = {};

  bool operator==(const Call&) const = default;

  bool has_adapters() const;
};

enum class Role { cotangent, input, weight, group_scales, group_biases, bias, lora_a, lora_b, residual };

// One array of a call. Those that all segments share are of segment 0.
struct Slot {
  Role role;
  int segment = 0;

  bool operator==(const Slot&) const = default;
};

using Slots = std::vector<Slot>;

bool contains(const Slots& slots, const Slot& slot);

// The gradients of some of a call's arrays, each of which is an output.
struct GradCall {
  Call forward;
  Slots wanted;  // never quantized weights, nor the residual, whose gradient is the cotangent

  bool operator==(const GradCall&) const = default;

  bool wants(Role role, int segment = 0) const {
    return contains(wanted, {role, segment});
  }

  // What a segment's low-rank products are multiplied by on the way back, 0 without an adapter.
  float adapter_scale(int segment) const {
    return forward.segments[segment].adapter_scale.value_or(0) * forward.epilogue.alpha;
  }
};

// The order of a primitive's inputs. A gradient has only those that it reads.
Slots input_slots(const Call& call);
Slots input_slots(const GradCall& call);

// A primitive's arrays, or what stands for them, by what they are.
template <typename T>
class BySlot {
 public:
  BySlot(const std::vector<T>& values, Slots slots) : values_(values), slots_(std::move(slots)) {}

  const T* find(Role role, int segment = 0) const {
    auto it = std::find(slots_.begin(), slots_.end(), Slot{role, segment});
    return it == slots_.end() ? nullptr : &values_[it - slots_.begin()];
  }

  // Of an array that is there.
  const T& get(Role role, int segment = 0) const {
    return *find(role, segment);
  }

 private:
  const std::vector<T>& values_;
  const Slots slots_;
};

using Operands = BySlot<mx::array>;

}  // namespace mlx_fused
