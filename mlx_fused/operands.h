#pragma once

#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "mlx_fused/check.h"
#include "mlx_fused/fused_primitive.h"
#include "mlx_fused/layout.h"

// What a projection multiplies by, as callers give it and as primitives take it.
namespace mlx_fused {

namespace mx = mlx::core;

// Weights or biases: one packed array of q's, k's and v's rows, or these three apart.
using Parts = std::variant<mx::array, Arrays>;

// What belongs to a quantized weight, as mx.quantize made it. The defaults of group_size and bits are the
// mode's.
struct QuantizedParts {
  Parts scales;
  std::optional<Parts> biases;
  std::optional<int> group_size, bits;
  std::string mode;
};

// A [in_features, rank] and B [rank, features] of every segment that has an adapter, and the products'
// scales.
struct Adapters {
  std::vector<std::optional<mx::array>> a, b;
  std::vector<float> scale;
};

struct Weights {
  const Parts& weight;
  const std::optional<QuantizedParts>& quantized;
  const std::optional<Parts>& bias;
  const std::optional<Adapters>& adapters;
};

// The activations and, once they are right, the weights as a flat list; says in `operands` where they are.
Arrays check_operands(
    const Check& check,
    const mx::array& input,
    const Weights& weights,
    const std::vector<int>& segment_features,
    Operands& operands);

// What MLX promotes each part's product to.
std::vector<mx::Dtype> promoted_types(const Arrays& inputs, const Operands& operands);

// Everything to one dtype, but for adapters, which are float32, and integers.
Arrays cast_operands(Arrays inputs, const Operands& operands, mx::Dtype dtype, mx::Stream stream);

// Keeps alive only what the gradients asked for will read.
template <typename Forward>
Arrays grad_inputs(Arrays cotangents, const Arrays& primals, const GradLayout<Forward>& layout) {
  auto inputs = std::move(cotangents);
  auto& forward = layout.forward;
  auto keep = [&](int first, int last) {
    inputs.insert(inputs.end(), primals.begin() + first, primals.begin() + last);
  };
  if (layout.reads_input()) {
    keep(Operands::input, Operands::input + 1);
  }
  if (layout.reads_weight()) {
    keep(forward.weight(0), forward.bias(0));
  }
  if (layout.reads_adapters()) {
    keep(forward.lora_a(0), forward.num_operands());
  }
  return inputs;
}

// The activations' features, as far as the gradients asked for can tell.
template <typename Forward>
int in_features(const Arrays& inputs, const GradLayout<Forward>& layout) {
  if (layout.reads_input()) {
    return inputs[layout.input].shape(2);
  }
  auto& q = layout.forward.quantization;
  return q ? inputs[layout.scales(0)].shape(1) * q->group_size : inputs[layout.weight(0)].shape(1);
}

// The dtypes of a gradient primitive's outputs.
template <typename Forward>
std::vector<mx::Dtype> grad_types(const Arrays& inputs, const GradLayout<Forward>& layout) {
  std::vector<mx::Dtype> dtypes;
  for (int argnum : layout.argnums) {
    dtypes.push_back(layout.forward.is_adapter(argnum) ? mx::float32 : inputs[0].dtype());
  }
  return dtypes;
}

// Whether the gradients asked for include those of scales or groups' biases. Refuses those of the codes.
bool wants_quantization_grad(const Check& check, const Operands& operands, const std::vector<int>& argnums);

}  // namespace mlx_fused
