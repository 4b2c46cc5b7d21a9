"""The C++ operations of mlx_fused."""



from typing import Literal, TypeAlias

from mlx.core import Device, DeviceType, Stream, array

StreamOrDevice: TypeAlias = Stream | Device | DeviceType | None

def fused_qkv_projection(input: array, weight: array | tuple[array, array, array], bias: array | tuple[array, array, array] | None, num_heads: int, num_kv_heads: int, head_dim: int, *, route: Literal['composed', 'fused'] | None = None, stream: StreamOrDevice = None) -> tuple[array, array, array]:
    """
    Project hidden states to queries, keys and values in one operation.

    Equivalent to ``input @ weight.T + bias`` split into three segments, each
    reshaped to ``[B, S, heads, head_dim]`` and transposed to put its heads
    before its tokens. Accumulates in float32 and rounds once.

    With ``Hq = num_heads * head_dim`` and ``Hkv = num_kv_heads * head_dim``:

    Args:
      input (array): Hidden states of shape ``[B, S, H]``, float32, float16 or
        bfloat16. Any strides.
      weight (array or tuple): Packed weights of shape ``[Hq + 2 * Hkv, H]``, or
        a tuple ``(wq, wk, wv)`` of shapes ``[Hq, H]``, ``[Hkv, H]`` and
        ``[Hkv, H]``, which are neither copied nor concatenated.
      bias (array or tuple, optional): ``[Hq + 2 * Hkv]``, or a tuple of
        ``[Hq]``, ``[Hkv]`` and ``[Hkv]`` if ``weight`` is a tuple, or ``None``.
      num_heads (int): Query heads, a multiple of ``num_kv_heads``.
      num_kv_heads (int): Key and value heads.
      head_dim (int): Features per head, at least 1.
      route (str, optional): ``"composed"`` for MLX's own operations, ``"fused"`` for
        ours, where there are any. Default: ``None``, whichever is expected to be faster
        (or what the environment variable ``MLX_FUSED_ROUTE`` says).
      stream (Stream or Device, optional): Where to run. Default: ``None``, the
        default stream of the default device.

    Returns:
      tuple: ``q`` of shape ``[B, num_heads, S, head_dim]``, ``k`` and ``v`` of
      shape ``[B, num_kv_heads, S, head_dim]``, of the dtype that MLX promotes
      the arguments to.

    Raises:
      ValueError: If a rank, shape, dtype or head count is wrong; the message
        names the argument, what was expected and what came.
    """

def fused_output_projection_residual(attn_out: array, weight: array, bias: array | None, residual: array, *, route: Literal['composed', 'fused'] | None = None, stream: StreamOrDevice = None) -> array:
    """
    Project attention's output and add the residual in one operation.

    Equivalent to ``attn_out @ weight.T + bias + residual``, accumulated in
    float32 and rounded once.

    Args:
      attn_out (array): Attention output of shape ``[B, S, Hq]``, heads side by
        side, float32, float16 or bfloat16. Any strides.
      weight (array): Output projection of shape ``[H, Hq]``.
      bias (array, optional): ``[H]``, or ``None``.
      residual (array): What the attention block was given, ``[B, S, H]``.
      route (str, optional): ``"composed"`` for MLX's own operations, ``"fused"`` for
        ours, where there are any. Default: ``None``, whichever is expected to be faster
        (or what the environment variable ``MLX_FUSED_ROUTE`` says).
      stream (Stream or Device, optional): Where to run. Default: ``None``, the
        default stream of the default device.

    Returns:
      array: ``[B, S, H]``, of the dtype that MLX promotes the arguments to.

    Raises:
      ValueError: If a rank, shape or dtype is wrong; the message names the
        argument, what was expected and what came.
    """

def fused_qkv_projection_bwd(dq: array, dk: array, dv: array, input: array, weight: array | tuple[array, array, array], has_bias: bool, num_heads: int, num_kv_heads: int, head_dim: int, *, route: Literal['composed', 'fused'] | None = None, stream: StreamOrDevice = None) -> tuple[array, array | tuple[array, array, array], array | tuple[array, array, array] | None]:
    """
    All gradients of :func:`fused_qkv_projection`.

    ``mx.grad`` and ``mx.vjp`` compute only those they are asked for; this is the
    backward pass by hand.

    Args:
      dq (array): Gradient of ``q``, ``[B, num_heads, S, head_dim]``.
      dk (array): Gradient of ``k``, ``[B, num_kv_heads, S, head_dim]``.
      dv (array): Gradient of ``v``, ``[B, num_kv_heads, S, head_dim]``.
      input (array): The forward's input, ``[B, S, H]``.
      weight (array or tuple): The forward's weight, packed or a tuple.
      has_bias (bool): Whether the forward had a bias.
      num_heads (int): Query heads.
      num_kv_heads (int): Key and value heads.
      head_dim (int): Features per head.
      route (str, optional): ``"composed"`` for MLX's own operations, ``"fused"`` for
        ours, where there are any. Default: ``None``, whichever is expected to be faster
        (or what the environment variable ``MLX_FUSED_ROUTE`` says).
      stream (Stream or Device, optional): Where to run. Default: ``None``, the
        default stream of the default device.

    Returns:
      tuple: ``d_input`` of shape ``[B, S, H]``, ``d_weight`` as ``weight`` came,
      and ``d_bias`` likewise (in the weight's dtype), or ``None`` if
      ``has_bias`` is false.

    Raises:
      ValueError: If a rank, shape, dtype or head count is wrong.
    """

def fused_output_projection_residual_bwd(d_output: array, attn_out: array, weight: array, has_bias: bool, *, route: Literal['composed', 'fused'] | None = None, stream: StreamOrDevice = None) -> tuple[array, array, array | None, array]:
    """
    All gradients of :func:`fused_output_projection_residual`.

    Args:
      d_output (array): Gradient of the output, ``[B, S, H]``.
      attn_out (array): The forward's ``attn_out``, ``[B, S, Hq]``.
      weight (array): The forward's weight, ``[H, Hq]``.
      has_bias (bool): Whether the forward had a bias.
      route (str, optional): ``"composed"`` for MLX's own operations, ``"fused"`` for
        ours, where there are any. Default: ``None``, whichever is expected to be faster
        (or what the environment variable ``MLX_FUSED_ROUTE`` says).
      stream (Stream or Device, optional): Where to run. Default: ``None``, the
        default stream of the default device.

    Returns:
      tuple: ``d_attn_out`` of shape ``[B, S, Hq]``, ``d_weight`` of shape
      ``[H, Hq]``, ``d_bias`` of shape ``[H]`` (in the weight's dtype) or
      ``None``, and ``d_residual``, which is ``d_output`` itself.

    Raises:
      ValueError: If a rank, shape or dtype is wrong.
    """

def composed_qkv_projection(input: array, weight: array | tuple[array, array, array], bias: array | tuple[array, array, array] | None, num_heads: int, num_kv_heads: int, head_dim: int, *, stream: StreamOrDevice = None) -> tuple[array, array, array]:
    """``fused_qkv_projection`` written in MLX's own operations."""

def composed_output_projection_residual(attn_out: array, weight: array, bias: array | None, residual: array, *, stream: StreamOrDevice = None) -> array:
    """``fused_output_projection_residual`` written in MLX's own operations."""
