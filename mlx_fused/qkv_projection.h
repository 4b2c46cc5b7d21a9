#pragma once

#include <optional>
#include <string>

#include "mlx/utils.h"
#include "mlx_fused/arguments.h"

namespace mlx_fused {

// The heads that a projection's features belong to.
struct Heads {
  int num_heads, num_kv_heads, head_dim;
  std::optional<int> v_head_dim = std::nullopt;  // if not head_dim
  bool split = true;                             // whether they are an axis of the outputs
};

// q, k, v of shape [B, heads, S, head_dim], or [B, S, heads head_dim] if they are not split, from input
// [B, S, H] and weights [features, H]. `operation` is what messages call it, `wish` routing's: "composed",
// "fused" or nothing.
Arrays qkv_projection(
    const std::string& operation,
    const mx::array& input,
    const Weights& weights,
    const Heads& heads,
    bool exact,
    const std::optional<std::string>& wish,
    mx::StreamOrDevice s);

// The gradients of input, of weight and, if has_bias, of bias, the last two in one array or three as weight
// is.
Arrays qkv_projection_bwd(
    const mx::array& dq,
    const mx::array& dk,
    const mx::array& dv,
    const mx::array& input,
    const Parts& weight,
    bool has_bias,
    const Heads& heads,
    const std::optional<std::string>& wish,
    mx::StreamOrDevice s);

}  // namespace mlx_fused
