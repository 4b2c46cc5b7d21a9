"""Fused projections of transformer layers for MLX, of attention, MLPs and heads: forward and backward."""

from importlib.metadata import version

import mlx.core  # noqa: F401 - must be imported before the extension, which uses its types

from mlx_fused._version import __version__, check_mlx

check_mlx(version("mlx"))

from mlx_fused import losses, nn  # noqa: E402
from mlx_fused.linear import LinearOperands  # noqa: E402
from mlx_fused.operations import (  # noqa: E402
    fused_attention,
    fused_embedding,
    fused_gated_projection,
    fused_linear,
    fused_linear_cross_entropy,
    fused_output_projection_residual,
    fused_output_projection_residual_bwd,
    fused_qkv_projection,
    fused_qkv_projection_bwd,
    fused_rms_norm,
    fused_rope,
)
from mlx_fused.patching import patch, patched, unpatch  # noqa: E402
from mlx_fused.tuning import use_table  # noqa: E402

use_table()

__all__ = [
    "LinearOperands",
    "__version__",
    "fused_attention",
    "fused_embedding",
    "fused_gated_projection",
    "fused_linear",
    "fused_linear_cross_entropy",
    "fused_output_projection_residual",
    "fused_output_projection_residual_bwd",
    "fused_qkv_projection",
    "fused_qkv_projection_bwd",
    "fused_rms_norm",
    "fused_rope",
    "losses",
    "nn",
    "patch",
    "patched",
    "unpatch",
]
