#pragma once

#include <optional>
#include <string>

#include "mlx/utils.h"
#include "mlx_fused/arguments.h"

namespace mlx_fused {

// How the features of q, k and v divide into heads. If nothing is set, each segment has as many features as
// its weight has rows.
struct Heads {
  std::optional<int> num_heads, num_kv_heads, head_dim;
  std::optional<int> v_head_dim = std::nullopt;  // head_dim if unset
  bool split = true;                             // whether heads are an axis of the outputs
};

// q, k and v from input [B, S, H] and three layers, or one layer that packs their rows. Their shape is [B,
// heads, S, head_dim], or [B, S, features] if heads are not split. `route` is "composed", "fused" or unset,
// as in choose_route.
Arrays qkv_projection(
    const mx::array& input,
    const Linears& layers,
    const Heads& heads,
    bool exact,
    const std::optional<std::string>& route,
    mx::StreamOrDevice s);

// The gradients of input, of the three weights and, if has_bias, of the three biases. `weights` are three, or
// one that packs their rows.
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
