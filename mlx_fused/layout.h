#pragma once

#include <algorithm>
#include <vector>

// Where each argument of a call stands in its primitive's flat list of inputs.
namespace mlx_fused {

// The place of an argument's gradient among the outputs, or -1.
inline int find_output(const std::vector<int>& argnums, int argnum) {
  auto it = std::find(argnums.begin(), argnums.end(), argnum);
  return it == argnums.end() ? -1 : static_cast<int>(it - argnums.begin());
}

// Forward inputs: input, weights, biases. Weights are one packed array or q, k, v; biases none or as many.
struct QKVLayout {
  int num_heads;
  int num_kv_heads;
  int head_dim;
  bool packed;
  bool has_bias;

  static constexpr int input = 0;
  static constexpr int segments = 3;

  bool operator==(const QKVLayout&) const = default;

  int parts() const {
    return packed ? 1 : segments;
  }
  int weight(int part) const {
    return 1 + part;
  }
  int bias(int part) const {
    return 1 + parts() + part;
  }
  int num_inputs() const {
    return 1 + parts() * (has_bias ? 2 : 1);
  }
  int heads(int segment) const {
    return segment == 0 ? num_heads : num_kv_heads;
  }
  // Output features of one segment: Hq or Hkv.
  int features(int segment) const {
    return heads(segment) * head_dim;
  }
  // Where a segment's rows start in the packed weight.
  int row(int segment) const {
    return segment == 0 ? 0 : features(0) + (segment - 1) * features(1);
  }
  int part_features(int part) const {
    return packed ? row(segments) : features(part);
  }
};

// Gradient inputs: dq, dk, dv, then the forward's input if a weight gradient is asked for,
// then its weights if the input's gradient is. Outputs: one per argnum, in order.
struct QKVGradLayout {
  QKVLayout forward;
  std::vector<int> argnums;  // positions in the forward's inputs, ascending

  static constexpr int cotangent = 0;
  static constexpr int input = QKVLayout::segments;

  bool operator==(const QKVGradLayout&) const = default;

  bool reads_input() const {
    return std::any_of(
        argnums.begin(), argnums.end(), [&](int n) { return n >= forward.weight(0) && n < forward.bias(0); });
  }
  bool reads_weight() const {
    return output(QKVLayout::input) >= 0;
  }
  int weight(int part) const {
    return input + (reads_input() ? 1 : 0) + part;
  }
  int output(int argnum) const {
    return find_output(argnums, argnum);
  }
};

// Forward inputs: attn_out, weight, bias if there is one, residual.
struct OutputLayout {
  bool has_bias;

  static constexpr int attn_out = 0;
  static constexpr int weight = 1;
  static constexpr int bias = 2;

  bool operator==(const OutputLayout&) const = default;

  int residual() const {
    return has_bias ? 3 : 2;
  }
};

// Gradient inputs: d_output, then attn_out if the weight's gradient is asked for, then the weight
// if attn_out's is. Outputs: one per argnum. The residual's gradient is d_output itself.
struct OutputGradLayout {
  std::vector<int> argnums;  // of OutputLayout's attn_out, weight, bias, ascending

  static constexpr int cotangent = 0;
  static constexpr int attn_out = 1;

  bool operator==(const OutputGradLayout&) const = default;

  int output(int argnum) const {
    return find_output(argnums, argnum);
  }
  bool reads_attn_out() const {
    return output(OutputLayout::weight) >= 0;
  }
  bool reads_weight() const {
    return output(OutputLayout::attn_out) >= 0;
  }
  int weight() const {
    return attn_out + (reads_attn_out() ? 1 : 0);
  }
};

}  // namespace mlx_fused
