#pragma once

#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "mlx_fused/call.h"
#include "mlx_fused/check.h"
#include "mlx_fused/products.h"

// What callers give a projection, and its validation.
namespace mlx_fused {

// One array for each segment, or their rows packed in one array.
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
// scales, one for all or one for each.
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

// The arrays of a call in its order, packed ones as views of their segments' rows; completes the call. The
// input, the residual and the segments' features are right already.
Arrays check_arguments(
    const Check& check,
    const mx::array& input,
    const Weights& weights,
    const mx::array* residual,
    Call& call,
    const Products& products);

}  // namespace mlx_fused
