#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "mlx_fused/quantization.h"

// Where each argument of a call stands in its primitive's flat list of inputs.
namespace mlx_fused {

// Of each segment that has a low-rank adapter, what its product is scaled by.
using AdapterScales = std::array<std::optional<float>, 3>;

// Forward inputs: the activations, weights, if those are quantized their scales and (affine) groups' biases,
// biases if there are any, and A and B of every segment that has an adapter.
struct Operands {
  int parts;  // into which weights and biases come
  bool has_bias;
  std::optional<Quantization> quantization;
  AdapterScales adapters;

  static constexpr int input = 0;

  bool operator==(const Operands&) const = default;

  int part_of(int segment) const {
    return parts == 1 ? 0 : segment;
  }
  // The arrays that hold one part of the weight.
  int arrays_per_weight() const {
    return !quantization ? 1 : quantization->has_biases ? 3 : 2;
  }
  int weight(int part) const {
    return 1 + part;
  }
  int scales(int part) const {
    return 1 + parts + part;
  }
  int group_biases(int part) const {
    return 1 + 2 * parts + part;
  }
  int bias(int part) const {
    return 1 + arrays_per_weight() * parts + part;
  }
  int lora_a(int segment) const {
    int before = std::count_if(adapters.begin(), adapters.begin() + segment, [](auto& a) { return a; });
    return bias(0) + (has_bias ? parts : 0) + 2 * before;
  }
  int lora_b(int segment) const {
    return lora_a(segment) + 1;
  }
  bool has_adapters() const {
    return lora_a(int(adapters.size())) > lora_a(0);
  }
  int num_operands() const {
    return lora_a(int(adapters.size()));
  }
  bool is_weight(int argnum) const {
    return argnum >= weight(0) && argnum < weight(parts);
  }
  // Scales and groups' biases.
  bool is_quantization(int argnum) const {
    return argnum >= weight(parts) && argnum < bias(0);
  }
  bool is_bias(int argnum) const {
    return argnum >= bias(0) && argnum < lora_a(0);
  }
  bool is_adapter(int argnum) const {
    return argnum >= lora_a(0) && argnum < num_operands();
  }
};

// Weights are one packed array or q, k, v; biases none or as many.
struct QKVLayout : Operands {
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int v_head_dim;
  bool split_heads;  // outputs are [B, heads, S, dims], not [B, S, features]
  bool exact;

  static constexpr int segments = 3;

  bool operator==(const QKVLayout&) const = default;

  bool packed() const {
    return parts == 1;
  }
  int heads(int segment) const {
    return segment == 0 ? num_heads : num_kv_heads;
  }
  // Output features of one of a segment's heads, and of all.
  int dims(int segment) const {
    return segment == 2 ? v_head_dim : head_dim;
  }
  int features(int segment) const {
    return heads(segment) * dims(segment);
  }
  // Where a segment's rows start in the packed weight.
  int row(int segment) const {
    return segment == 0 ? 0 : row(segment - 1) + features(segment - 1);
  }
  int part_features(int part) const {
    return packed() ? row(segments) : features(part);
  }
};

// The activations are attention's output; the residual is the last input.
struct OutputLayout : Operands {
  float alpha;
  bool exact;

  static constexpr int segments = 1;

  bool operator==(const OutputLayout&) const = default;

  int residual() const {
    return num_operands();
  }
};

// Gradient inputs: the outputs' cotangents, then what of the forward's inputs the gradients asked for read:
// the activations, the weights (with scales and groups' biases), all adapters. Outputs: one per argnum, in
// order.
template <typename Forward>
struct GradLayout {
  Forward forward;
  std::vector<int> argnums;  // positions in the forward's inputs, ascending; never of quantized weights

  static constexpr int cotangent = 0;
  static constexpr int input = Forward::segments;

  bool operator==(const GradLayout&) const = default;

  bool reads_input() const {
    return std::any_of(
        argnums.begin(), argnums.end(), [&](int n) { return forward.is_weight(n) || forward.is_adapter(n); });
  }
  bool reads_weight() const {
    return output(Operands::input) >= 0;
  }
  bool reads_adapters() const {
    bool wanted = std::any_of(argnums.begin(), argnums.end(), [&](int n) { return forward.is_adapter(n); });
    return forward.has_adapters() && (reads_weight() || wanted);
  }
  // From here on, as in the forward's inputs.
  int weight(int part) const {
    return input + (reads_input() ? 1 : 0) + part;
  }
  int scales(int part) const {
    return weight(0) + forward.parts + part;
  }
  int group_biases(int part) const {
    return weight(0) + 2 * forward.parts + part;
  }
  int adapter(int argnum) const {
    int first = weight(0) + (reads_weight() ? forward.arrays_per_weight() * forward.parts : 0);
    return first + argnum - forward.lora_a(0);
  }
  // The place of an argument's gradient among the outputs, or -1.
  int output(int argnum) const {
    auto it = std::find(argnums.begin(), argnums.end(), argnum);
    return it == argnums.end() ? -1 : static_cast<int>(it - argnums.begin());
  }
};

using QKVGradLayout = GradLayout<QKVLayout>;
using OutputGradLayout = GradLayout<OutputLayout>;

}  // namespace mlx_fused
