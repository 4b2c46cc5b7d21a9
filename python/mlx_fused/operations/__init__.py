"""The fused operations."""

from mlx_fused.operations.attention import fused_attention
from mlx_fused.operations.cross_entropy import fused_linear_cross_entropy
from mlx_fused.operations.embedding import fused_embedding
from mlx_fused.operations.linear import fused_gated_projection, fused_linear
from mlx_fused.operations.norm import fused_rms_norm
from mlx_fused.operations.qkv import fused_qkv_projection, fused_qkv_projection_bwd
from mlx_fused.operations.residual import (
    fused_output_projection_residual,
    fused_output_projection_residual_bwd,
)
from mlx_fused.operations.rope import fused_rope

__all__ = [
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
]
