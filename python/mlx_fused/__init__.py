"""Fused attention projections for MLX: QKV, and output projection with residual, forward and backward."""

from importlib.metadata import version

import mlx.core  # noqa: F401 - the extension's types are those of mlx.core, which must be there first

from mlx_fused._version import __version__, check_mlx

check_mlx(version("mlx"))

from mlx_fused import composed, nn  # noqa: E402
from mlx_fused._ext import (  # noqa: E402
    fused_lora_output_projection_residual,
    fused_lora_qkv_projection,
    fused_output_projection_residual,
    fused_output_projection_residual_bwd,
    fused_qkv_projection,
    fused_qkv_projection_bwd,
    fused_quantized_output_projection_residual,
    fused_quantized_qkv_projection,
)
from mlx_fused.patching import patch, patched, unpatch  # noqa: E402

__all__ = [
    "__version__",
    "composed",
    "fused_lora_output_projection_residual",
    "fused_lora_qkv_projection",
    "fused_output_projection_residual",
    "fused_output_projection_residual_bwd",
    "fused_qkv_projection",
    "fused_qkv_projection_bwd",
    "fused_quantized_output_projection_residual",
    "fused_quantized_qkv_projection",
    "nn",
    "patch",
    "patched",
    "unpatch",
]
