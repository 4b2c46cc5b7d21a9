#ifdef __linux__
#include <sched.h>  // cblas.h uses its cpu_set_t
#endif
#include <cblas.h>

#include <limits>

#include "mlx_fused/backend/cpu/sgemm.h"

namespace mlx_fused::cpu {

// Never: OpenBLAS packs the weights anew in every call. On the "Zen 5" of product.cpp it took 1.0 to 2.1
// times as long as panels_product for 32 to 2048 rows.
const int64_t sgemm_min_rows = std::numeric_limits<int64_t>::max();

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
  // Our own pool calls this from several threads. The setting is global, so it is made once.
  static const bool single = (scipy_openblas_set_num_threads(1), true);
  (void)single;
  scipy_cblas_sgemm(
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
