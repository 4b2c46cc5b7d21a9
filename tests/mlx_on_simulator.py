"""MLX's own kernels of dense products on the simulator."""

import struct
from math import ceil

from msl_sim import Library
from msl_sim.toolchain import BUILD

MLX_KERNELS = """#include "mlx/backend/metal/kernels/utils.h"
//
#include "mlx/backend/metal/kernels/gemv.h"
#include "mlx/backend/metal/kernels/steel/gemm/gemm.h"
#include "mlx/backend/metal/kernels/steel/gemm/kernels/steel_gemm_fused.h"
#include "mlx/backend/metal/kernels/steel/gemm/kernels/steel_gemm_splitk.h"
instantiate_kernel("gemv", gemv, bfloat16_t, 4, 1, 1, 32, 4, 4, 0, 1)
instantiate_kernel("gemv_wide", gemv_wide, bfloat16_t, 4, 16)
instantiate_kernel("gemm", gemm, bfloat16_t, 64, 32, 32, 2, 2, false, true, float)
instantiate_kernel("split-K", gemm_splitk, bfloat16_t, float, 16, 32, 16, 2, 2, false, true, false, true)
instantiate_kernel("split-K sum", gemm_splitk_accum_axpby, float, bfloat16_t)
"""


def library():
    path = BUILD / "ledger_mlx_kernels.metal"  # always there: the path is part of what the cache knows
    BUILD.mkdir(parents=True, exist_ok=True)
    path.write_text(MLX_KERNELS)
    return Library(path, lints=False)


def ints(*values):
    return struct.pack(f"{len(values)}i", *values)


def mlx_launch(kernel, m, n, k):
    """MLX's launch for x W^T + c, with two parts for split-K."""
    one, stride = struct.pack("f", 1), struct.pack("q", 0)
    vector = {"w": 0, "x": 1, "c": 2, "out": 3}
    constants, tiles_n = {}, ceil(n / 32)
    if kernel == "gemv":
        slots, grid, threads = vector, (ceil(n / 16), 1, 1), (32, 1, 4)
        values = [ints(k), ints(n), ints(k), one, one, ints(1), ints(1), stride, stride, stride, ints(1)]
    elif kernel == "gemv_wide":
        slots, grid, threads = vector, (ceil(m / 5), ceil(n / 4), 1), (32, 2, 1)
        constants = {0: False, 1: True}
        values = [ints(v) for v in (k, n, m, k, k)] + [one, one, ints(1), ints(1)]
        values += [stride, stride, stride, ints(0), ints(1)]
    elif kernel == "gemm":
        tiles_m = ceil(m / 64)
        slots, grid, threads = {"x": 0, "w": 1, "c": 2, "out": 3}, (tiles_n, tiles_m, 1), (32, 2, 2)
        constants = {10: False, 100: True, 110: False, 200: m % 64 == 0, 201: n % 32 == 0, 202: k % 32 == 0}
        sizes = ints(m, n, k, k, k, n, tiles_n, tiles_m)
        values = [sizes + struct.pack("3q3i4x", 0, 0, 0, 0, k // 32, 1), struct.pack("2iq2f", 0, 1, 0, 1, 1)]
    elif kernel == "split-K":
        tiles_m = ceil(m / 16)
        slots, grid, threads = {"x": 0, "w": 1, "partial": 2}, (tiles_n, tiles_m, 2), (32, 2, 2)
        values = [ints(m, n, k, k, k, n, tiles_n, tiles_m, 2, m * n, k // 2, 0, k // 32)]
    else:
        slots, grid, threads = {"partial": 0, "out": 1, "c": 5}, (tiles_n, m, 1), (32, 1, 1)
        values = [ints(v) for v in (2, m * n, n, 0, 1)] + [one, one]
    free = (i for i in range(32) if i not in slots.values())
    return {
        "kernel": kernel,
        "constants": constants,
        "buffers": [(slot, name, 0) for name, slot in slots.items()],
        "bytes": list(zip(free, values, strict=False)),
        "grid": grid,
        "threadgroup": threads,
    }
