#include <Accelerate/Accelerate.h>

#include "mlx_fused/backend/cpu/sgemm.h"

namespace mlx_fused::cpu {

// Always. Reasoned, not measured: Accelerate uses matrix units that our loops cannot reach.
const int64_t sgemm_min_rows = 0;

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
    int ldc) {
  cblas_sgemm(
      CblasRowMajor,
      transpose_a ? CblasTrans : CblasNoTrans,
      transpose_b ? CblasTrans : CblasNoTrans,
      m,
      n,
      k,
      1.0f,
      a,
      lda,
      b,
      ldb,
      accumulate ? 1.0f : 0.0f,
      c,
      ldc);
}

}  // namespace mlx_fused::cpu
