// Compiled once per instruction set; see vectors.h.
#include "mlx_fused/backend/cpu/activation_loops.h"

#include <math.h>

#include "mlx_fused/backend/cpu/exponential.h"

namespace mlx_fused::cpu::MLX_FUSED_ISA {

namespace {

// A function's value and derivative.
struct Value {
  Float y, dy;
};

// x s and its derivative, where s is sigmoid(z) and dz the derivative of z. Far from 0 dz may be infinite.
Value gate(Float x, Float z, Float dz) {
  Float power = exp(-z);
  Float s = 1.0f / (1.0f + power);
  Float slope = s == 0.0f ? Float{} : s * (power * s);  // 1 - s would cancel
  return {x * s, s + (slope == 0.0f ? Float{} : x * slope * dz)};
}

Value silu(const Activation&, Float x) {
  return gate(x, x, Float{} + 1.0f);
}

Value clipped_swiglu(const Activation& a, Float x) {
  Float g = x > a.limit ? Float{} + a.limit : x;
  Value v = gate(g, a.alpha * g, Float{} + a.alpha);
  return {v.y, x >= a.limit ? Float{} : v.dy};
}

// x (1 + tanh u) / 2 is x sigmoid(2 u), where nothing cancels.
Value gelu_approx(const Activation&, Float x) {
  constexpr float slope = 1.5957691216f, cubic = 0.044715f;  // 2 sqrt(2 / pi)
  Float square = x * x;
  return gate(x, slope * x * (1.0f + cubic * square), slope * (1.0f + 3 * cubic * square));
}

Value gelu(const Activation&, Float x) {
  Float cdf;
  for (int i = 0; i < lanes; ++i) {
    cdf[i] = 0.5f * ::erfcf(-0.707106781f * x[i]);
  }
  Float pdf = 0.398942280f * exp(-0.5f * x * x);
  return {x * cdf, cdf + (pdf == 0.0f ? Float{} : x * pdf)};
}

Value relu(const Activation&, Float x) {
  return {x < 0.0f ? Float{} : x, x > 0.0f ? Float{} + 1.0f : Float{}};
}

Value relu2(const Activation& a, Float x) {
  Float y = relu(a, x).y;
  return {y * y, 2.0f * y};
}

// Calls f(i, x) with every vector of x, whose last may be filled up with zeros, and stores as many of the
// results as there are elements.
template <Value (*f)(const Activation&, Float), bool derives>
void for_each(const Activation& a, const float* x, float* y, float* dy, int64_t n) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    Value v = f(a, Float32::load(x + i));
    Float32::store(y + i, v.y);
    if (derives) {
      Float32::store(dy + i, v.dy);
    }
  }
  if (int64_t rest = n - i) {
    Float part = {};
    __builtin_memcpy(&part, x + i, rest * sizeof(float));
    Value v = f(a, part);
    __builtin_memcpy(y + i, &v.y, rest * sizeof(float));
    if (derives) {
      __builtin_memcpy(dy + i, &v.dy, rest * sizeof(float));
    }
  }
}

template <bool derives>
void apply(const Activation& a, const float* x, float* y, float* dy, int64_t n) {
  switch (a.kind) {
    case activation_silu:
      return for_each<silu, derives>(a, x, y, dy, n);
    case activation_gelu:
      return for_each<gelu, derives>(a, x, y, dy, n);
    case activation_gelu_approx:
      return for_each<gelu_approx, derives>(a, x, y, dy, n);
    case activation_relu:
      return for_each<relu, derives>(a, x, y, dy, n);
    case activation_relu2:
      return for_each<relu2, derives>(a, x, y, dy, n);
    case activation_clipped_swiglu:
      return for_each<clipped_swiglu, derives>(a, x, y, dy, n);
    case activation_none:
      return;
  }
}

}  // namespace

void activate(const Activation& a, float* x, int64_t n) {
  apply<false>(a, x, x, nullptr, n);
}

void derive(const Activation& a, const float* x, float* y, float* dy, int64_t n) {
  apply<true>(a, x, y, dy, n);
}

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
