// MLX's own kernels, as they are.
#include "mlx/backend/metal/kernels/utils.h"
//
#include "mlx/backend/metal/kernels/gemv.h"
#include "mlx/backend/metal/kernels/steel/gemm/gemm.h"
#include "mlx/backend/metal/kernels/steel/gemm/kernels/steel_gemm_fused.h"
#include "mlx/backend/metal/kernels/steel/gemm/kernels/steel_gemm_splitk.h"
