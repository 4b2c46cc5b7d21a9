#pragma once

#include <optional>
#include <string>

#include "mlx/utils.h"
#include "mlx_fused/arguments.h"

namespace mlx_fused {

// The heads that a projection's features belong to. Without any, the segments are as large as their weights.
struct Heads {
  std::optional<int> num_heads, num_kv_heads, head_dim;
  std::optional<int> v_head_dim = std::nullopt;  // if not head_dim
  bool split = true;                             // whether they are an axis of the outputs
};

// q, k, v of shape [B, heads, S, head_dim], or [B, S, features] if heads are not split, from input [B, S, H]
// and three layers, or one that packs them. `route` is routing's: "composed", "fused" or nothing.
Arrays qkv_projection(
    const mx::array& input,
    const Linears& layers,
    const Heads& heads,
    bool exact,
    const std::optional<std::string>& route,
    mx::StreamOrDevice s);

// The gradients of input, of every weight and, if has_bias, of every bias. Weights are three, or one that
// packs them.
Arrays qkv_projection_bwd(
    const mx::array& dq,
    const mx::array& dk,
    const mx::array& dv,
    const mx::array& input,
    const Arrays& weights,
    bool has_bias,
    const Heads& heads,
    const std::optional<std::string>& route,
    mx::StreamOrDevice s);

}  // namespace mlx_fused
