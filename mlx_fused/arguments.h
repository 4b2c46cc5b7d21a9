#pragma once

#include <optional>
#include <string>
#include <vector>

#include "mlx_fused/call.h"
#include "mlx_fused/check.h"
#include "mlx_fused/products.h"

// The arguments of a projection as callers pass them, and their validation.
namespace mlx_fused {

// The operands of a linear layer, the C++ side of Python's LinearOperands: y = x weight^T + bias, plus
// lora_scale (x lora_a) lora_b if there is an adapter. A quantized weight comes with scales; scales, biases,
// group_size, bits and mode then mean what they mean to mx.quantize.
struct Linear {
  mx::array weight;
  std::optional<mx::array> bias = std::nullopt, scales = std::nullopt, biases = std::nullopt;
  std::optional<int> group_size = std::nullopt, bits = std::nullopt;
  std::string mode = "affine";
  std::optional<mx::array> lora_a = std::nullopt, lora_b = std::nullopt;
  float lora_scale = 1;
};

using Linears = std::vector<Linear>;

// How its weight is quantized; nullopt if it is not.
std::optional<Quantization> quantization(const Linear& layer);

// Why these layers, which read the same input, cannot be computed by one operation; nullopt if they can.
std::optional<std::string> difference(const Linears& layers);

// How a packed layer has its segments' rows: one segment's after the other's, the last one's first, or in
// turns.
enum class Packing { in_order, reversed, interleaved };

// The RMS norm of an input as callers give it: its weight, if it has one, and eps.
using NormOperands = std::pair<std::optional<mx::array>, float>;

// Checks the arguments and completes the call: norm, bias, quantization, adapters, residual, and where a
// segment has 0 features those of its layer. Returns the call's inputs in the order of input_slots(call).
// Takes one layer per segment, or a single layer that packs the rows of all segments and is split into views.
// Messages call the input by its name.
Arrays check_arguments(
    const Check& check,
    const std::string& input_name,
    const mx::array& input,
    const std::optional<NormOperands>& norm,
    const Linears& layers,
    const std::optional<mx::array>& residual,
    Call& call,
    const Products& products,
    Packing packing = Packing::in_order);

// Checks a table, a layer's weight without anything else, and lists its arrays: the weight, scales, biases.
Arrays check_table(const Check& check, const Linear& table);

}  // namespace mlx_fused
