#pragma once

// What softmaxes of columns share, for files that are compiled once per instruction set; see vectors.h.
#include "mlx_fused/backend/cpu/exponential.h"

namespace mlx_fused::cpu::MLX_FUSED_ISA {

namespace {

Float larger(Float a, Float b) {
  return a > b ? a : b;
}

// Of `vectors` vectors of columns of scores: the largest, and what it is given as begins the sum of powers,
// of score - shift.
template <int vectors>
void start_softmax(
    const float* scores,
    int64_t n,
    int64_t ld,
    float* largest,
    Float (&shift)[vectors],
    Float (&sum)[vectors]) {
  Float best[vectors], given[vectors];
  for (int v = 0; v < vectors; ++v) {
    best[v] = given[v] = Float32::load(largest + v * lanes);
  }
  for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      best[v] = larger(Float32::load(scores + i * ld + v * lanes), best[v]);
    }
  }
  for (int v = 0; v < vectors; ++v) {
    // Of nothing but -inf every power is 0, of nothing but NaN it is NaN.
    shift[v] = best[v] == -__builtin_inff() ? Float{} : best[v];
    sum[v] = exp(given[v] - shift[v]);
    Float32::store(largest + v * lanes, best[v]);
  }
}

// p of a vector of scores, of the columns from `col` on.
Float share(Float scores, const Shares& shares, int64_t col) {
  return exp(scores - Float32::load(shares.shifts + col)) * Float32::load(shares.factors + col);
}

}  // namespace

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
