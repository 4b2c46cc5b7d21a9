#pragma once

#include <limits>

#include "metal/params.h"

namespace mlx_fused {

// f(y) of one segment's y or, gated, f(gate) * up of two. f of clipped_swiglu is g sigmoid(alpha g) with
// g = min(gate, limit), and up is clipped to +-limit there and has 1 added.
struct Activation {
  ActivationKind kind = activation_none;
  bool gated = false;
  float alpha = 1;
  float limit = std::numeric_limits<float>::infinity();

  bool operator==(const Activation&) const = default;

  // Whether there is one.
  explicit operator bool() const {
    return kind != activation_none;
  }
};

}  // namespace mlx_fused
