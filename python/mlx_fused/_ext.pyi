"""The C++ operations of mlx_fused."""



from typing import Literal, TypeAlias, overload

from mlx.core import Device, DeviceType, Stream, array

StreamOrDevice: TypeAlias = Stream | Device | DeviceType | None

@overload
def fused_qkv_projection(input: array, weight: array | tuple[array, array, array], bias: array | tuple[array, array, array] | None, num_heads: int, num_kv_heads: int, head_dim: int, *, v_head_dim: int | None = None, split_heads: bool = True, route: Literal['composed', 'fused'] | None = None, stream: StreamOrDevice = None) -> tuple[array, array, array]: ...

@overload
def fused_qkv_projection(input: array, weight: array | tuple[array, array, array], bias: array | tuple[array, array, array] | None = None, *, num_heads: int, num_kv_heads: int, head_dim: int, v_head_dim: int | None = None, split_heads: bool = True, route: Literal['composed', 'fused'] | None = None, stream: StreamOrDevice = None) -> tuple[array, array, array]:
    """
    Project hidden states to queries, keys and values in one operation.

    Equivalent to ``input @ weight.T + bias`` split into three segments, each
    reshaped to ``[B, S, heads, head_dim]`` and transposed to put its heads
    before its tokens. Accumulates in float32 and rounds once.

    With ``Hq = num_heads * head_dim``, ``Hk = num_kv_heads * head_dim`` and
    ``Hv = num_kv_heads * v_head_dim``:

    Args:
      input (array): Hidden states of shape ``[B, S, H]``, float32, float16 or
        bfloat16. Any strides.
      weight (array or tuple): Packed weights of shape ``[Hq + Hk + Hv, H]``, or
        a tuple ``(wq, wk, wv)`` of shapes ``[Hq, H]``, ``[Hk, H]`` and
        ``[Hv, H]``, which are neither copied nor concatenated.
      bias (array or tuple, optional): ``[Hq + Hk + Hv]``, or a tuple of
        ``[Hq]``, ``[Hk]`` and ``[Hv]`` if ``weight`` is a tuple. Default: ``None``.
      num_heads (int): Query heads, a multiple of ``num_kv_heads``.
      num_kv_heads (int): Key and value heads.
      head_dim (int): Features per head, at least 1.
      v_head_dim (int, optional): Those of a value head. Default: ``None``, ``head_dim``.
      split_heads (bool): Whether heads are an axis of their own, before the tokens. If not, the
        outputs are ``[B, S, Hq]``, ``[B, S, Hk]`` and ``[B, S, Hv]``. Default: ``True``.
      route (str, optional): ``"composed"`` for MLX's own operations, which can be exported,
        ``"fused"`` for ours, where there are any. Default: ``None``, whichever is expected to be faster
        (or what the environment variable ``MLX_FUSED_ROUTE`` says).
      stream (Stream or Device, optional): Where to run. Default: ``None``, the
        default stream of the default device.

    Returns:
      tuple: ``q`` of shape ``[B, num_heads, S, head_dim]``, ``k`` of shape
      ``[B, num_kv_heads, S, head_dim]`` and ``v`` of shape
      ``[B, num_kv_heads, S, v_head_dim]``, or as ``split_heads`` says, of the dtype
      that MLX promotes the arguments to.

    Raises:
      ValueError: If a rank, shape, dtype or head count is wrong; the message
        names the argument, what was expected and what came.
    """

@overload
def fused_output_projection_residual(attn_out: array, weight: array, bias: array | None, residual: array, *, alpha: float = 1.0, exact: bool = False, route: Literal['composed', 'fused'] | None = None, stream: StreamOrDevice = None) -> array: ...

@overload
def fused_output_projection_residual(attn_out: array, weight: array, bias: array | None = None, *, residual: array, alpha: float = 1.0, exact: bool = False, route: Literal['composed', 'fused'] | None = None, stream: StreamOrDevice = None) -> array:
    """
    Project attention's output and add the residual in one operation.

    Equivalent to ``residual + alpha * (attn_out @ weight.T + bias)``, accumulated in
    float32 and rounded once.

    Args:
      attn_out (array): Attention output of shape ``[B, S, Hq]``, heads side by
        side, float32, float16 or bfloat16. Any strides.
      weight (array): Output projection of shape ``[H, Hq]``.
      bias (array, optional): ``[H]``. Default: ``None``.
      residual (array): What the attention block was given, ``[B, S, H]``.
      alpha (float): What the projection is multiplied by. Default: ``1.0``.
      exact (bool): Round where separate operations do: after the projection, after
        ``alpha`` and after the sum. Default: ``False``.
      route (str, optional): ``"composed"`` for MLX's own operations, which can be exported,
        ``"fused"`` for ours, where there are any. Default: ``None``, whichever is expected to be faster
        (or what the environment variable ``MLX_FUSED_ROUTE`` says).
      stream (Stream or Device, optional): Where to run. Default: ``None``, the
        default stream of the default device.

    Returns:
      array: ``[B, S, H]``, of the dtype that MLX promotes the arguments to.

    Raises:
      ValueError: If a rank, shape or dtype is wrong; the message names the
        argument, what was expected and what came.
    """

def fused_qkv_projection_bwd(dq: array, dk: array, dv: array, input: array, weight: array | tuple[array, array, array], has_bias: bool, num_heads: int, num_kv_heads: int, head_dim: int, *, v_head_dim: int | None = None, route: Literal['composed', 'fused'] | None = None, stream: StreamOrDevice = None) -> tuple[array, array | tuple[array, array, array], array | tuple[array, array, array] | None]:
    """
    All gradients of :func:`fused_qkv_projection`.

    ``mx.grad`` and ``mx.vjp`` compute only those they are asked for; this is the
    backward pass by hand.

    Args:
      dq (array): Gradient of ``q``, ``[B, num_heads, S, head_dim]``.
      dk (array): Gradient of ``k``, ``[B, num_kv_heads, S, head_dim]``.
      dv (array): Gradient of ``v``, ``[B, num_kv_heads, S, v_head_dim]``.
      input (array): The forward's input, ``[B, S, H]``.
      weight (array or tuple): The forward's weight, packed or a tuple.
      has_bias (bool): Whether the forward had a bias.
      num_heads (int): Query heads.
      num_kv_heads (int): Key and value heads.
      head_dim (int): Features per head.
      v_head_dim (int, optional): Those of a value head. Default: ``None``, ``head_dim``.
      route (str, optional): ``"composed"`` for MLX's own operations, which can be exported,
        ``"fused"`` for ours, where there are any. Default: ``None``, whichever is expected to be faster
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
      route (str, optional): ``"composed"`` for MLX's own operations, which can be exported,
        ``"fused"`` for ours, where there are any. Default: ``None``, whichever is expected to be faster
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

@overload
def composed_qkv_projection(input: array, weight: array | tuple[array, array, array], bias: array | tuple[array, array, array] | None, num_heads: int, num_kv_heads: int, head_dim: int, *, v_head_dim: int | None = None, split_heads: bool = True, stream: StreamOrDevice = None) -> tuple[array, array, array]: ...

@overload
def composed_qkv_projection(input: array, weight: array | tuple[array, array, array], bias: array | tuple[array, array, array] | None = None, *, num_heads: int, num_kv_heads: int, head_dim: int, v_head_dim: int | None = None, split_heads: bool = True, stream: StreamOrDevice = None) -> tuple[array, array, array]:
    """``fused_qkv_projection`` written in MLX's own operations."""

@overload
def composed_output_projection_residual(attn_out: array, weight: array, bias: array | None, residual: array, *, alpha: float = 1.0, stream: StreamOrDevice = None) -> array: ...

@overload
def composed_output_projection_residual(attn_out: array, weight: array, bias: array | None = None, *, residual: array, alpha: float = 1.0, stream: StreamOrDevice = None) -> array:
    """``fused_output_projection_residual`` written in MLX's own operations."""

def has_quantized_kernels(group_size: int, bits: int, mode: str) -> bool:
    """
    Whether weights of this format have kernels of ours; all others run on MLX's own operation.
    """

def is_same(a: array, b: array) -> bool:
    """Whether two arrays are one value."""

def alias(a: array) -> array:
    """
    The same value as another object, which keeps it when ``a`` is changed in place.
    """

@overload
def fused_quantized_qkv_projection(input: array, weight: array | tuple[array, array, array], scales: array | tuple[array, array, array], biases: array | tuple[array, array, array] | None, bias: array | tuple[array, array, array] | None, num_heads: int, num_kv_heads: int, head_dim: int, *, v_head_dim: int | None = None, group_size: int | None = None, bits: int | None = None, mode: str = 'affine', split_heads: bool = True, route: Literal['composed', 'fused'] | None = None, stream: StreamOrDevice = None) -> tuple[array, array, array]: ...

@overload
def fused_quantized_qkv_projection(input: array, weight: array | tuple[array, array, array], scales: array | tuple[array, array, array], biases: array | tuple[array, array, array] | None = None, bias: array | tuple[array, array, array] | None = None, *, num_heads: int, num_kv_heads: int, head_dim: int, v_head_dim: int | None = None, group_size: int | None = None, bits: int | None = None, mode: str = 'affine', split_heads: bool = True, route: Literal['composed', 'fused'] | None = None, stream: StreamOrDevice = None) -> tuple[array, array, array]:
    """
    Project hidden states to queries, keys and values with a quantized weight.

    :func:`fused_qkv_projection` with weights as ``mx.quantize`` stores them. They are
    decoded on the fly and the products accumulated in float32. Quantized weights have
    no gradient; those of the scales and biases of mode ``"affine"`` are as
    ``mx.quantized_matmul`` gives them.

    With ``Hq = num_heads * head_dim``, ``Hk = num_kv_heads * head_dim`` and
    ``Hv = num_kv_heads * v_head_dim``:

    Args:
      input (array): Hidden states of shape ``[B, S, H]``, float32, float16 or
        bfloat16. Any strides.
      weight (array or tuple): Codes, uint32, of shape ``[Hq + Hk + Hv, H * bits / 32]``, or
        a tuple for q, k and v, which are neither copied nor concatenated.
      scales (array or tuple): Of the groups, ``[Hq + Hk + Hv, H / group_size]``, packed
        or a tuple as ``weight`` is; uint8 unless ``mode`` is ``"affine"``.
      biases (array or tuple, optional): Of the groups, as ``scales``; ``None`` unless
        ``mode`` is ``"affine"``.
      bias (array or tuple, optional): Of the projection, ``[Hq + Hk + Hv]`` or a tuple.
        Default: ``None``.
      num_heads (int): Query heads, a multiple of ``num_kv_heads``.
      num_kv_heads (int): Key and value heads.
      head_dim (int): Features per head, at least 1.
      v_head_dim (int, optional): Those of a value head. Default: ``None``, ``head_dim``.
      group_size (int, optional): Of the quantization: 32, 64 or 128 for ``"affine"``. Default:
        ``None``, the mode's own (affine 64, mxfp4 and mxfp8 32, nvfp4 16).
      bits (int, optional): Of a code: 2, 3, 4, 5, 6 or 8 for ``"affine"``. Default: ``None``,
        the mode's own (4; mxfp8 8).
      mode (str): ``"affine"``, ``"mxfp4"``, ``"mxfp8"`` or ``"nvfp4"``, as in
        ``mx.quantize``; MLX computes other modes, sizes and bits that it knows. Default:
        ``"affine"``.
      split_heads (bool): Whether heads are an axis of their own, before the tokens. If not, the
        outputs are ``[B, S, Hq]``, ``[B, S, Hk]`` and ``[B, S, Hv]``. Default: ``True``.
      route (str, optional): ``"composed"`` for MLX's own operations, which can be exported,
        ``"fused"`` for ours, where there are any. Default: ``None``, whichever is expected to be faster
        (or what the environment variable ``MLX_FUSED_ROUTE`` says).
      stream (Stream or Device, optional): Where to run. Default: ``None``, the
        default stream of the default device.

    Returns:
      tuple: ``q`` of shape ``[B, num_heads, S, head_dim]``, ``k`` of shape
      ``[B, num_kv_heads, S, head_dim]`` and ``v`` of shape
      ``[B, num_kv_heads, S, v_head_dim]``, or as ``split_heads`` says, of the dtype
      that MLX promotes the arguments to.

    Raises:
      ValueError: If a rank, shape, dtype, head count or quantization is wrong, or the
        gradient of ``weight`` is asked for.
    """

@overload
def fused_quantized_output_projection_residual(attn_out: array, weight: array, scales: array, biases: array | None, bias: array | None, residual: array, *, group_size: int | None = None, bits: int | None = None, mode: str = 'affine', alpha: float = 1.0, exact: bool = False, route: Literal['composed', 'fused'] | None = None, stream: StreamOrDevice = None) -> array: ...

@overload
def fused_quantized_output_projection_residual(attn_out: array, weight: array, scales: array, biases: array | None = None, bias: array | None = None, *, residual: array, group_size: int | None = None, bits: int | None = None, mode: str = 'affine', alpha: float = 1.0, exact: bool = False, route: Literal['composed', 'fused'] | None = None, stream: StreamOrDevice = None) -> array:
    """
    Project attention's output with a quantized weight and add the residual.

    :func:`fused_output_projection_residual` with a weight as ``mx.quantize`` stores it.

    Args:
      attn_out (array): Attention output of shape ``[B, S, Hq]``, heads side by
        side, float32, float16 or bfloat16. Any strides.
      weight (array): Codes, uint32, of shape ``[H, Hq * bits / 32]``.
      scales (array): Of the groups, ``[H, Hq / group_size]``; uint8 unless ``mode`` is
        ``"affine"``.
      biases (array, optional): Of the groups, as ``scales``; ``None`` unless ``mode`` is
        ``"affine"``.
      bias (array, optional): Of the projection, ``[H]``. Default: ``None``.
      residual (array): What the attention block was given, ``[B, S, H]``.
      group_size (int, optional): Of the quantization: 32, 64 or 128 for ``"affine"``. Default:
        ``None``, the mode's own (affine 64, mxfp4 and mxfp8 32, nvfp4 16).
      bits (int, optional): Of a code: 2, 3, 4, 5, 6 or 8 for ``"affine"``. Default: ``None``,
        the mode's own (4; mxfp8 8).
      mode (str): ``"affine"``, ``"mxfp4"``, ``"mxfp8"`` or ``"nvfp4"``, as in
        ``mx.quantize``; MLX computes other modes, sizes and bits that it knows. Default:
        ``"affine"``.
      alpha (float): What the projection is multiplied by. Default: ``1.0``.
      exact (bool): Round where separate operations do: after the projection, after its
        bias, after ``alpha`` and after the sum. Default: ``False``.
      route (str, optional): ``"composed"`` for MLX's own operations, which can be exported,
        ``"fused"`` for ours, where there are any. Default: ``None``, whichever is expected to be faster
        (or what the environment variable ``MLX_FUSED_ROUTE`` says).
      stream (Stream or Device, optional): Where to run. Default: ``None``, the
        default stream of the default device.

    Returns:
      array: ``[B, S, H]``, of the dtype that MLX promotes the arguments to.

    Raises:
      ValueError: If a rank, shape, dtype or quantization is wrong, or the gradient of
        ``weight`` is asked for.
    """

@overload
def fused_lora_qkv_projection(input: array, weight: array | tuple[array, array, array], bias: array | tuple[array, array, array] | None, lora_a: tuple[array | None, array | None, array | None], lora_b: tuple[array | None, array | None, array | None], scale: float | tuple[float, float, float], num_heads: int, num_kv_heads: int, head_dim: int, *, v_head_dim: int | None = None, scales: array | tuple[array, array, array] | None = None, biases: array | tuple[array, array, array] | None = None, group_size: int | None = None, bits: int | None = None, mode: str = 'affine', split_heads: bool = True, exact: bool = False, route: Literal['composed', 'fused'] | None = None, stream: StreamOrDevice = None) -> tuple[array, array, array]: ...

@overload
def fused_lora_qkv_projection(input: array, weight: array | tuple[array, array, array], bias: array | tuple[array, array, array] | None = None, *, lora_a: tuple[array | None, array | None, array | None], lora_b: tuple[array | None, array | None, array | None], scale: float | tuple[float, float, float], num_heads: int, num_kv_heads: int, head_dim: int, v_head_dim: int | None = None, scales: array | tuple[array, array, array] | None = None, biases: array | tuple[array, array, array] | None = None, group_size: int | None = None, bits: int | None = None, mode: str = 'affine', split_heads: bool = True, exact: bool = False, route: Literal['composed', 'fused'] | None = None, stream: StreamOrDevice = None) -> tuple[array, array, array]:
    """
    Project hidden states to queries, keys and values with low-rank adapters (LoRA).

    :func:`fused_qkv_projection`, or :func:`fused_quantized_qkv_projection` if ``scales``
    are given, plus ``scale * (input @ A) @ B`` in every segment that has an adapter. The
    products with all A are one; the low-rank part is added in float32 before the one
    rounding. The gradients are one operation too, which keeps only ``input``, the weights and
    the adapters. After Hu et al., "LoRA: Low-Rank Adaptation of Large Language
    Models", 2021 (arXiv:2106.09685).

    With ``Hq = num_heads * head_dim``, ``Hk = num_kv_heads * head_dim`` and
    ``Hv = num_kv_heads * v_head_dim``:

    Args:
      input (array): Hidden states of shape ``[B, S, H]``, float32, float16 or
        bfloat16. Any strides.
      weight (array or tuple): Packed, or a tuple ``(wq, wk, wv)``, dense or codes.
      bias (array or tuple, optional): Of the projection, packed or a tuple. Default: ``None``.
      lora_a (tuple): For q, k and v an array ``[H, rank]`` or ``None``; ranks may differ.
        Computed with in float32.
      lora_b (tuple): For q, k and v an array ``[rank, Hq]``, ``[rank, Hk]`` and ``[rank, Hv]``, ``None``
        where ``lora_a`` is.
      scale (float or tuple): Of the low-rank products, one for all or three.
      num_heads (int): Query heads, a multiple of ``num_kv_heads``.
      num_kv_heads (int): Key and value heads.
      head_dim (int): Features per head, at least 1.
      v_head_dim (int, optional): Those of a value head. Default: ``None``, ``head_dim``.
      scales (array or tuple, optional): Of a quantized ``weight``, see
        :func:`fused_quantized_qkv_projection`. Default: ``None``, a dense weight.
      biases (array or tuple, optional): Of the groups of a quantized ``weight``.
      group_size (int, optional): Of the quantization: 32, 64 or 128 for ``"affine"``. Default:
        ``None``, the mode's own (affine 64, mxfp4 and mxfp8 32, nvfp4 16).
      bits (int, optional): Of a code: 2, 3, 4, 5, 6 or 8 for ``"affine"``. Default: ``None``,
        the mode's own (4; mxfp8 8).
      mode (str): ``"affine"``, ``"mxfp4"``, ``"mxfp8"`` or ``"nvfp4"``, as in
        ``mx.quantize``; MLX computes other modes, sizes and bits that it knows. Default:
        ``"affine"``.
      split_heads (bool): Whether heads are an axis of their own, before the tokens. If not, the
        outputs are ``[B, S, Hq]``, ``[B, S, Hk]`` and ``[B, S, Hv]``. Default: ``True``.
      exact (bool): Round where mlx-lm's modules do: after the base product (and its bias),
        after the scaled low-rank product, and after their sum. Default: ``False``.
      route (str, optional): ``"composed"`` for MLX's own operations, which can be exported,
        ``"fused"`` for ours, where there are any. Default: ``None``, whichever is expected to be faster
        (or what the environment variable ``MLX_FUSED_ROUTE`` says).
      stream (Stream or Device, optional): Where to run. Default: ``None``, the
        default stream of the default device.

    Returns:
      tuple: ``q`` of shape ``[B, num_heads, S, head_dim]``, ``k`` of shape
      ``[B, num_kv_heads, S, head_dim]`` and ``v`` of shape
      ``[B, num_kv_heads, S, v_head_dim]``, or as ``split_heads`` says, of the dtype that
      MLX promotes ``input``, ``weight`` and ``bias`` to.

    Raises:
      ValueError: If a rank, shape, dtype, head count or quantization is wrong, or the
        gradient of a quantized ``weight`` is asked for.
    """

@overload
def fused_lora_output_projection_residual(attn_out: array, weight: array, bias: array | None, residual: array, lora_a: array, lora_b: array, scale: float, *, scales: array | None = None, biases: array | None = None, group_size: int | None = None, bits: int | None = None, mode: str = 'affine', alpha: float = 1.0, exact: bool = False, route: Literal['composed', 'fused'] | None = None, stream: StreamOrDevice = None) -> array: ...

@overload
def fused_lora_output_projection_residual(attn_out: array, weight: array, bias: array | None = None, *, residual: array, lora_a: array, lora_b: array, scale: float, scales: array | None = None, biases: array | None = None, group_size: int | None = None, bits: int | None = None, mode: str = 'affine', alpha: float = 1.0, exact: bool = False, route: Literal['composed', 'fused'] | None = None, stream: StreamOrDevice = None) -> array:
    """
    Project attention's output with a low-rank adapter (LoRA) and add the residual.

    ``residual + alpha * (attn_out @ weight.T + bias + scale * (attn_out @ A) @ B)``,
    accumulated in float32 and rounded once; the weight dense or, if ``scales`` are given,
    quantized.

    Args:
      attn_out (array): Attention output of shape ``[B, S, Hq]``, heads side by
        side, float32, float16 or bfloat16. Any strides.
      weight (array): ``[H, Hq]``, or codes.
      bias (array, optional): Of the projection, ``[H]``. Default: ``None``.
      residual (array): What the attention block was given, ``[B, S, H]``.
      lora_a (array): ``[Hq, rank]``. Computed with in float32.
      lora_b (array): ``[rank, H]``.
      scale (float): Of the low-rank product.
      scales (array, optional): Of a quantized ``weight``, see
        :func:`fused_quantized_output_projection_residual`. Default: ``None``, a dense weight.
      biases (array, optional): Of the groups of a quantized ``weight``.
      group_size (int, optional): Of the quantization: 32, 64 or 128 for ``"affine"``. Default:
        ``None``, the mode's own (affine 64, mxfp4 and mxfp8 32, nvfp4 16).
      bits (int, optional): Of a code: 2, 3, 4, 5, 6 or 8 for ``"affine"``. Default: ``None``,
        the mode's own (4; mxfp8 8).
      mode (str): ``"affine"``, ``"mxfp4"``, ``"mxfp8"`` or ``"nvfp4"``, as in
        ``mx.quantize``; MLX computes other modes, sizes and bits that it knows. Default:
        ``"affine"``.
      alpha (float): What the projection is multiplied by. Default: ``1.0``.
      exact (bool): Round where mlx-lm's modules do: after the base product (and its bias),
        after the scaled low-rank product, after their sum, after ``alpha`` and after the
        residual's sum. Default: ``False``.
      route (str, optional): ``"composed"`` for MLX's own operations, which can be exported,
        ``"fused"`` for ours, where there are any. Default: ``None``, whichever is expected to be faster
        (or what the environment variable ``MLX_FUSED_ROUTE`` says).
      stream (Stream or Device, optional): Where to run. Default: ``None``, the
        default stream of the default device.

    Returns:
      array: ``[B, S, H]``, of the dtype that MLX promotes ``attn_out``, ``weight``,
      ``bias`` and ``residual`` to.

    Raises:
      ValueError: If a rank, shape, dtype or quantization is wrong, or the gradient of a
        quantized ``weight`` is asked for.
    """
