#pragma once

// Activations, elementwise, in float32, and their derivatives. Factors are written as a sigmoid or as erfc,
// so that nothing cancels.
#include "common.h"

namespace mlx_fused {

// The kind is fixed when a pipeline is made.
METAL_FUNC int activation_kind() {
  return int(mlx_fused_activation_low) + 2 * int(mlx_fused_activation_mid) +
         4 * int(mlx_fused_activation_high);
}

// A function's value and derivative.
struct Derived {
  float y, dy;
};

// x s and its derivative, where s is sigmoid(z) and dz the derivative of z. Far from 0 dz may be infinite.
METAL_FUNC Derived gated_by(float x, float z, float dz) {
  const float power = metal::precise::exp(-z);
  const float s = 1.0f / (1.0f + power);
  const float slope = s == 0.0f ? 0.0f : s * (power * s);
  return {x * s, s + (slope == 0.0f ? 0.0f : x * slope * dz)};
}

// t p(t) e^(-x^2) with t = 1 / (1 + |x| / 2), log p by a polynomial of least error on [0, 10.2]. It is off by
// about 4 ulp, and far from 0 by what the rounding of x is worth.
METAL_FUNC float erfc(float x) {
  const float z = x < 0.0f ? -x : x;
  const float t = 1.0f / (1.0f + 0.5f * z);
  float log_p = 0.146537169f;
  log_p = log_p * t - 0.689589178f;
  log_p = log_p * t + 1.1773763f;
  log_p = log_p * t - 0.723754114f;
  log_p = log_p * t - 0.057514881f;
  log_p = log_p * t - 0.0108340806f;
  log_p = log_p * t + 0.0387195127f;
  log_p = log_p * t + 0.385779274f;
  log_p = log_p * t + 0.998732965f;
  log_p = log_p * t - 1.26545292f;
  const float y = t * metal::precise::exp(log_p - z * z);
  return x < 0.0f ? 2.0f - y : y;
}

// Of y or, gated, of the gate.
METAL_FUNC Derived derived(float x, float alpha, float limit) {
  switch (activation_kind()) {
    case activation_silu:
      return gated_by(x, x, 1.0f);
    case activation_gelu: {
      const float cdf = 0.5f * erfc(-0.707106781f * x);
      const float pdf = 0.398942280f * metal::precise::exp(-0.5f * x * x);
      return {x * cdf, cdf + (pdf == 0.0f ? 0.0f : x * pdf)};
    }
    case activation_gelu_approx: {                           // x (1 + tanh u) / 2 is x sigmoid(2 u)
      const float slope = 1.5957691216f, cubic = 0.044715f;  // 2 sqrt(2 / pi)
      const float square = x * x;
      return gated_by(x, slope * x * (1.0f + cubic * square), slope * (1.0f + 3.0f * cubic * square));
    }
    case activation_relu:
    case activation_relu2: {
      const float y = x < 0.0f ? 0.0f : x;
      const bool squared = activation_kind() == activation_relu2;
      return {squared ? y * y : y, squared ? 2.0f * y : x > 0.0f ? 1.0f : 0.0f};
    }
    case activation_clipped_swiglu: {
      const float g = x > limit ? limit : x;
      const Derived of_g = gated_by(g, alpha * g, alpha);
      return {of_g.y, x >= limit ? 0.0f : of_g.dy};
    }
    default:
      return {x, 1.0f};
  }
}

// What a gate is multiplied with.
METAL_FUNC float up_factor(float up, float limit) {
  if (activation_kind() != activation_clipped_swiglu) {
    return up;
  }
  return (up > limit ? limit : up < -limit ? -limit : up) + 1.0f;
}

// Where up is clipped, or just not, its gradient is 0, as that of MLX's clip.
METAL_FUNC bool is_clipped(float up, float limit) {
  return activation_kind() == activation_clipped_swiglu && (up >= limit || up <= -limit);
}

}  // namespace mlx_fused
