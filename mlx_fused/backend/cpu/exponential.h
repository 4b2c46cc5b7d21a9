#pragma once

// For files that are compiled once per instruction set; see vectors.h.
#include "mlx_fused/backend/cpu/vectors.h"

namespace mlx_fused::cpu::MLX_FUSED_ISA {

namespace {

// e^x to about 1 ulp: 2^n times a polynomial (Cephes' expf) of what is left, at most half of log 2. Above 88,
// where n would be too large for a float, infinity.
Float exp(Float x) {
  constexpr float lowest = -87.3f, highest = 88.3f, to_integer = 12582912.0f;  // 1.5 * 2^23
  Float all = x;
  x = x < lowest ? Float{} + lowest : x;
  x = x > highest ? Float{} + highest : x;
  Float shifted = x * 1.44269504f + to_integer;
  Float n = shifted - to_integer;
  Float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Word power = (bits<Word>(shifted) + 127) << 23;
  p = p * bits<Float>(power);
  p = all < lowest ? Float{} : p;
  return all > highest ? Float{} + __builtin_inff() : p;
}

}  // namespace

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
