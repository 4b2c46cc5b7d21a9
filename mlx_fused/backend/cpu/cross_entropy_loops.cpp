// Compiled once per instruction set; see vectors.h.
#include "mlx_fused/backend/cpu/cross_entropy_loops.h"

#include "mlx_fused/backend/cpu/exponential.h"

namespace mlx_fused::cpu::MLX_FUSED_ISA {

namespace {

// By its exponential or, near 0, where that would cancel, a polynomial (Cephes' tanhf).
Float tanh(Float x) {
  Float square = x * x;
  Float p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  Float near = p * square * x + x;
  Float far = 1.0f - 2.0f / (exp(2.0f * x) + 1.0f);
  return square < 0.390625f ? near : far;
}

// x = f(x) for every vector of x, whose last may be filled up with zeros.
template <typename F>
void replace(float* x, int64_t n, F f) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    Float32::store(x + i, f(Float32::load(x + i)));
  }
  if (i < n) {
    Float part = {};
    __builtin_memcpy(&part, x + i, (n - i) * sizeof(float));
    part = f(part);
    __builtin_memcpy(x + i, &part, (n - i) * sizeof(float));
  }
}

}  // namespace

void softcap(float* x, int64_t n, float cap) {
  float inverse = 1.0f / cap;
  replace(x, n, [=](Float v) { return cap * tanh(v * inverse); });
}

void cross_entropy_grad(float* x, int64_t n, float factor, float log_sum, float shift, float cap) {
  auto of_capped = [=](Float v) { return factor * (exp(v - log_sum) - shift); };
  if (cap == 0.0f) {
    return replace(x, n, of_capped);
  }
  float inverse = 1.0f / cap;
  replace(x, n, [=](Float v) { return of_capped(v) * (1.0f - (v * inverse) * (v * inverse)); });
}

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
