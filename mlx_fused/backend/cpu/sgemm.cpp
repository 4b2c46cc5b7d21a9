#include "mlx_fused/backend/cpu/sgemm.h"

#include <algorithm>
#include <limits>

#ifdef __APPLE__
#include <Accelerate/Accelerate.h>
#else
#ifdef __linux__
#include <sched.h>  // cblas.h uses its cpu_set_t
#endif
#include <cblas.h>
#endif

namespace mlx_fused::cpu {

// docs/design/thresholds.md: Accelerate always, OpenBLAS never.
#ifdef __APPLE__
int64_t sgemm_min_rows = 0;
#else
int64_t sgemm_min_rows = std::numeric_limits<int64_t>::max();
#endif

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
#ifdef __APPLE__
  auto gemm = cblas_sgemm;
#else
  auto gemm = scipy_cblas_sgemm;
  // Our own pool calls this from several threads. The setting is global, so it is made once.
  [[maybe_unused]] static const bool single = (scipy_openblas_set_num_threads(1), true);
  if (m == 1) {  // an adapter's products of one row take less than half as long so
    if (!accumulate) {
      std::fill_n(c, n, 0.0f);
    }
    auto op = transpose_b ? CblasNoTrans : CblasTrans;
    int rows = transpose_b ? n : k, cols = transpose_b ? k : n;
    return scipy_cblas_sgemv(
        CblasRowMajor, op, rows, cols, 1.0f, b, ldb, a, transpose_a ? lda : 1, 1.0f, c, 1);
  }
#endif
  auto op_a = transpose_a ? CblasTrans : CblasNoTrans, op_b = transpose_b ? CblasTrans : CblasNoTrans;
  gemm(CblasRowMajor, op_a, op_b, m, n, k, 1.0f, a, lda, b, ldb, accumulate ? 1.0f : 0.0f, c, ldc);
}

}  // namespace mlx_fused::cpu
