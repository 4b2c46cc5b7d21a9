"""The dense operations written in MLX's own ones, with the same checks.

They are what the fused operations mean, and what runs where there is no kernel; `route="composed"` gives
them too, as it does for quantized weights and adapters. Call them for `mx.export_function`, which knows
MLX's own primitives only:

    def qkv(x):
        return mlx_fused.composed.fused_qkv_projection(x, weight, num_heads=32, num_kv_heads=8, head_dim=64)

    mx.export_function("qkv.mlxfn", qkv, x)
"""

from mlx_fused._ext import composed_output_projection_residual as fused_output_projection_residual
from mlx_fused._ext import composed_qkv_projection as fused_qkv_projection

__all__ = ["fused_output_projection_residual", "fused_qkv_projection"]
