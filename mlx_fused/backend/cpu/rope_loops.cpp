// Compiled once per instruction set; the compiler makes vectors of these loops by itself.
#include "mlx_fused/backend/cpu/rope_loops.h"

namespace mlx_fused::cpu::MLX_FUSED_ISA {

namespace {

// sin(x) and cos(x) for x from -pi/4 to pi/4: Taylor's series, whose first terms left out are below 1e-9.
float sine(float x, float square) {
  float sum = 1.0f / 362880.0f;
  sum = sum * square - 1.0f / 5040.0f;
  sum = sum * square + 1.0f / 120.0f;
  sum = sum * square - 1.0f / 6.0f;
  return x + x * square * sum;
}

float cosine(float square) {
  float sum = -1.0f / 3628800.0f;
  sum = sum * square + 1.0f / 40320.0f;
  sum = sum * square - 1.0f / 720.0f;
  sum = sum * square + 1.0f / 24.0f;
  return 1.0f + square * (sum * square - 0.5f);
}

// To the nearest integer: adding this leaves no digits behind the point, and rint() would be a call.
double nearest(double x) {
  constexpr double shift = 0x1.8p52;
  return (x + shift) - shift;
}

}  // namespace

void circle(
    const double* turns, double place, int64_t n, float* __restrict cosines, float* __restrict sines) {
  for (int64_t i = 0; i < n; ++i) {
    double turn = turns[i] * place, rest = turn - nearest(turn), quarters = nearest(4 * rest);
    float x = float(6.283185307179586 * (rest - 0.25 * quarters)), square = x * x;
    float s = sine(x, square), c = cosine(square);
    // An even number of quarters, from -2 to 2, keeps sine and cosine or negates both; an odd one swaps them.
    float q = float(quarters), size = q < 0 ? -q : q, even = 1 - size, odd = q * (2 - size);
    cosines[i] = even * c - odd * s;
    sines[i] = even * s + odd * c;
  }
}

void rotate(
    float* __restrict x,
    int64_t pairs,
    bool neighbours,
    const float* __restrict cosines,
    const float* __restrict sines) {
  if (neighbours) {
    for (int64_t i = 0; i < pairs; ++i) {
      float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cosines[i] - b * sines[i];
      x[2 * i + 1] = a * sines[i] + b * cosines[i];
    }
    return;
  }
  float* __restrict second = x + pairs;
  for (int64_t i = 0; i < pairs; ++i) {
    float a = x[i], b = second[i];
    x[i] = a * cosines[i] - b * sines[i];
    second[i] = a * sines[i] + b * cosines[i];
  }
}

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
