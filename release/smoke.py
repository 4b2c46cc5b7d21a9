"""Checks an installed wheel, outside the source tree: `python -I release/smoke.py`."""

import ctypes
import subprocess
import sys
from importlib.metadata import files, version
from pathlib import Path

# First of all, for it must find libmlx and OpenBLAS by itself.
(extension,) = [
    file.locate() for file in files("mlx-fused") if file.name.startswith("_ext.") and file.suffix == ".so"
]
ctypes.CDLL(str(extension))

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

import mlx_fused  # noqa: E402


def check(name: str, result: mx.array, factors: tuple[np.ndarray, np.ndarray], terms: int) -> None:
    """Compares with a product in float64, up to float32's rounding of sums of that many terms."""
    left, right = (factor.astype(np.float64) for factor in factors)
    error = np.abs(np.array(result, np.float64) - left @ right)
    bound = (terms + 2) * 2.0**-24 * (np.abs(left) @ np.abs(right))
    if not (error <= bound).all():
        raise SystemExit(f"{name} is off by {error.max():.1e}")


assert mlx_fused.__version__ == version("mlx-fused")
random = np.random.default_rng(0)
x, weight, *cotangents = (
    random.standard_normal(shape, np.float32)
    for shape in [(1, 5, 64), (96, 64), (1, 5, 64), (1, 5, 16), (1, 5, 16)]
)
outputs, gradients = mx.vjp(
    lambda x, weight: mlx_fused.fused_qkv_projection(x, weight, num_heads=4, num_kv_heads=1, head_dim=16),
    [mx.array(x), mx.array(weight)],
    [mx.array(part).reshape(1, 5, -1, 16).swapaxes(1, 2) for part in cotangents],
)
rows, packed = x[0], np.concatenate(cotangents, -1)[0]
tokens = [output.swapaxes(1, 2).reshape(5, -1) for output in outputs]
check("The projection", mx.concatenate(tokens, -1), (rows, weight.T), 64)
check("The gradient of x", gradients[0][0], (packed, weight), 96)
check("The gradient of the weight", gradients[1], (packed.T, rows), 5)

subprocess.run([Path(sys.executable).with_name("mlx-fused"), "info"], check=True)
