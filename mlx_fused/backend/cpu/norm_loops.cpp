// Compiled once per instruction set; see vectors.h.
#include "mlx_fused/backend/cpu/norm_loops.h"

#include "mlx_fused/backend/cpu/vectors.h"

namespace mlx_fused::cpu::MLX_FUSED_ISA {

namespace {

// The sum of f(i) over all vectors of a row of length ld, a multiple of 16: in four sums, since one would
// wait for every addition.
template <typename F>
float sum_of(int64_t ld, F f) {
  constexpr int count = 4;
  Float sums[count] = {};
  int64_t i = 0;
  for (; i + count * lanes <= ld; i += count * lanes) {
#pragma GCC unroll 4
    for (int j = 0; j < count; ++j) {
      sums[j] += f(i + j * lanes);
    }
  }
  for (; i < ld; i += lanes) {
    sums[0] += f(i);
  }
  return sum(sums[0] + sums[1] + sums[2] + sums[3]);
}

// 1 / sqrt(mean(x^2) + eps)
float reciprocal_root(const float* x, int64_t ld, int64_t n, float eps) {
  float squares = sum_of(ld, [&](int64_t i) {
    Float v = Float32::load(x + i);
    return v * v;
  });
  return 1.0f / __builtin_sqrtf(squares / n + eps);
}

template <typename T>
Float rounded(Float v) {
  typename T::Element to[lanes];
  T::store(to, v);
  return T::load(to);
}

template <>
Float rounded<Float32>(Float v) {
  return v;
}

template <typename T>
void norm_as(float* x, int64_t rows, int64_t ld, const float* w, int64_t n, float eps) {
  for (; rows > 0; --rows, x += ld) {
    float r = reciprocal_root(x, ld, n, eps);
    for (int64_t i = 0; i < ld; i += lanes) {
      Float v = rounded<T>(Float32::load(x + i) * r);
      Float32::store(x + i, w ? v * Float32::load(w + i) : v);
    }
  }
}

}  // namespace

void rms_norm(Type type, float* x, int64_t rows, int64_t ld, const float* w, int64_t n, float eps) {
  FOR_TYPE(norm_as, x, rows, ld, w, n, eps)
}

void rms_norm_grad(
    const float* x, float* g, int64_t rows, int64_t ld, const float* w, float* dw, int64_t n, float eps) {
  for (; rows > 0; --rows, x += ld, g += ld) {
    float r = reciprocal_root(x, ld, n, eps);
    // Of r x, not of x, whose products may overflow.
    float mean = sum_of(
                     ld,
                     [&](int64_t i) {
                       Float normed = r * Float32::load(x + i), v = Float32::load(g + i);
                       if (dw) {
                         Float32::store(dw + i, Float32::load(dw + i) + v * normed);
                       }
                       if (w) {
                         v *= Float32::load(w + i);
                         Float32::store(g + i, v);
                       }
                       return v * normed;
                     }) /
                 n;
    for (int64_t i = 0; i < ld; i += lanes) {
      Float normed = r * Float32::load(x + i);
      Float32::store(g + i, r * (Float32::load(g + i) - normed * mean));
    }
  }
}

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
