// MLX's own kernels, as they are.
#include "mlx/backend/metal/kernels/utils.h"
//
#include "mlx/backend/metal/kernels/gemv.h"
#include "mlx/backend/metal/kernels/steel/gemm/gemm.h"
#include "mlx/backend/metal/kernels/steel/gemm/kernels/steel_gemm_fused.h"

#define INSTANTIATE(suffix, T)                                                                  \
  instantiate_kernel("gemm_nn" suffix, gemm, T, 32, 32, 16, 2, 2, false, false, float)          \
  instantiate_kernel("gemm_nt" suffix, gemm, T, 64, 32, 32, 2, 2, false, true, float)           \
  instantiate_kernel("gemv" suffix, gemv, T, 4, 1, 1, 32, 4, 4, 0, 0)

INSTANTIATE("_float32", float)
INSTANTIATE("_float16", half)
INSTANTIATE("_bfloat16", bfloat16_t)
instantiate_kernel("gemv_across_simdgroups", gemv, float, 1, 8, 1, 32, 4, 4, 0, 0)
instantiate_kernel("gemv_t", gemv_t, float, 1, 2, 8, 4, 4, 4, 0, 0)
