"""
The C++ functions that mlx_fused.operations and mlx_fused.patching call.
"""

from collections.abc import Sequence

import mlx.core


def fused_qkv_projection(input: mlx.core.array, weight: Sequence[tuple[mlx.core.array, mlx.core.array | None, mlx.core.array | None, mlx.core.array | None, int | None, int | None, str, mlx.core.array | None, mlx.core.array | None, float]], num_heads: int | None, num_kv_heads: int | None, head_dim: int | None, v_head_dim: int | None, split_heads: bool, exact: bool, route: str | None, stream: mlx.core.Stream | mlx.core.ThreadLocalStream | mlx.core.Device | mlx.core.DeviceType | None) -> list[mlx.core.array]: ...

def fused_qkv_projection_bwd(dq: mlx.core.array, dk: mlx.core.array, dv: mlx.core.array, input: mlx.core.array, weight: Sequence[mlx.core.array], has_bias: bool, num_heads: int | None, num_kv_heads: int | None, head_dim: int | None, v_head_dim: int | None, route: str | None, stream: mlx.core.Stream | mlx.core.ThreadLocalStream | mlx.core.Device | mlx.core.DeviceType | None) -> list[mlx.core.array]: ...

def fused_output_projection_residual(attn_out: mlx.core.array, weight: tuple[mlx.core.array, mlx.core.array | None, mlx.core.array | None, mlx.core.array | None, int | None, int | None, str, mlx.core.array | None, mlx.core.array | None, float], residual: mlx.core.array, alpha: float, exact: bool, route: str | None, stream: mlx.core.Stream | mlx.core.ThreadLocalStream | mlx.core.Device | mlx.core.DeviceType | None) -> mlx.core.array: ...

def fused_output_projection_residual_bwd(d_output: mlx.core.array, attn_out: mlx.core.array, weight: mlx.core.array, has_bias: bool, route: str | None, stream: mlx.core.Stream | mlx.core.ThreadLocalStream | mlx.core.Device | mlx.core.DeviceType | None) -> list[mlx.core.array]: ...

def difference(layers: Sequence[tuple[mlx.core.array, mlx.core.array | None, mlx.core.array | None, mlx.core.array | None, int | None, int | None, str, mlx.core.array | None, mlx.core.array | None, float]]) -> str | None:
    """
    Why one operation cannot compute these layers of the same input; None if it can.
    """

def has_quantized_kernels(group_size: int, bits: int, mode: str) -> bool:
    """
    Whether we have kernels for weights of this format; other formats run on MLX's own operation.
    """

def is_same(a: mlx.core.array, b: mlx.core.array) -> bool:
    """Whether two Python arrays are the same MLX array."""

def alias(a: mlx.core.array) -> mlx.core.array:
    """
    A second Python object for the same MLX array. It keeps its value when ``a`` is changed in place.
    """
