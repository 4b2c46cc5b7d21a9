#pragma once

#include <cstdint>

namespace mlx_fused::cpu {

// c[m, n] = op(a)[m, k] op(b)[k, n], plus the old c if accumulate; row-major, on the calling thread alone.
// By Accelerate on macOS, else by OpenBLAS.
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

// From this many rows of the left operand on, the library is faster than panels_product: never on Linux,
// where only tests change this, and always on macOS.
extern int64_t sgemm_min_rows;

}  // namespace mlx_fused::cpu
