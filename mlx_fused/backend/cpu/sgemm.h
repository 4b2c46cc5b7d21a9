#pragma once

#include <cstdint>

namespace mlx_fused::cpu {

// c[m, n] = op(a)[m, k] op(b)[k, n] (+ c where accumulate), row-major, on the calling thread alone.
// The one thing asked of a BLAS library: one file per library implements it.
void sgemm(
    bool transpose_a,
    bool transpose_b,
    int m,
    int n,
    int k,
    const float* a,
    int lda,
    const float* b,
    int ldb,
    bool accumulate,
    float* c,
    int ldc);

// From this many rows on the library beats our own loops even where those need not pack the weights.
extern const int64_t sgemm_min_rows;

}  // namespace mlx_fused::cpu
