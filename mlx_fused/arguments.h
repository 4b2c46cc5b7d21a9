#pragma once

#include <optional>
#include <string>
#include <vector>

#include "mlx_fused/call.h"
#include "mlx_fused/check.h"
#include "mlx_fused/products.h"

// What callers give a projection, and its validation.
namespace mlx_fused {

// The operands of a linear layer, as Python's LinearOperands has them: y = x weight^T + bias, and with an
// adapter + lora_scale (x lora_a) lora_b. A quantized weight has scales, and what belongs to them is as
// mx.quantize has it.
struct Linear {
  mx::array weight;
  std::optional<mx::array> bias = std::nullopt, scales = std::nullopt, biases = std::nullopt;
  std::optional<int> group_size = std::nullopt, bits = std::nullopt;
  std::string mode = "affine";
  std::optional<mx::array> lora_a = std::nullopt, lora_b = std::nullopt;
  float lora_scale = 1;
};

using Linears = std::vector<Linear>;

// Why layers of one input cannot be one operation, if they cannot.
std::optional<std::string> difference(const Linears& layers);

// The arrays of a call in its order; completes the call, whose segments' features are right already. Layers
// are one for each segment, or a single one that packs the rows of all, which are views of it then.
Arrays check_arguments(
    const Check& check,
    const mx::array& input,
    const Linears& layers,
    const std::optional<mx::array>& residual,
    Call& call,
    const Products& products);

}  // namespace mlx_fused
