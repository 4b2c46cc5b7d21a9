"""The fused operations."""

from __future__ import annotations

from functools import partial
from operator import index
from typing import Literal, TypeAlias, overload

import mlx.core as mx
import mlx.nn as nn

from mlx_fused import _ext
from mlx_fused.linear import LinearOperands

Route: TypeAlias = Literal["composed", "fused"] | None
Stream: TypeAlias = mx.Stream | mx.Device | mx.DeviceType | None
Three: TypeAlias = tuple[mx.array, mx.array, mx.array]
QKVWeight: TypeAlias = mx.array | LinearOperands | tuple[mx.array | LinearOperands, ...]


@overload
def fused_qkv_projection(
    input: mx.array,
    weight: QKVWeight,
    bias: mx.array | Three | None = None,
    *,
    split_heads: Literal[False],
    exact: bool = False,
    route: Route = None,
    stream: Stream = None,
) -> Three: ...
@overload
def fused_qkv_projection(
    input: mx.array,
    weight: QKVWeight,
    bias: mx.array | Three | None = None,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    split_heads: bool = True,
    exact: bool = False,
    route: Route = None,
    stream: Stream = None,
) -> Three: ...
@overload
def fused_qkv_projection(
    input: mx.array,
    weight: QKVWeight,
    bias: mx.array | Three | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    v_head_dim: int | None = None,
    split_heads: bool = True,
    exact: bool = False,
    route: Route = None,
    stream: Stream = None,
) -> Three: ...
def fused_qkv_projection(
    input,
    weight,
    bias=None,
    num_heads=None,
    num_kv_heads=None,
    head_dim=None,
    *,
    v_head_dim=None,
    split_heads=True,
    exact=False,
    route=None,
    stream=None,
):
    """Project hidden states to queries, keys and values in one operation.

    Equivalent to ``input @ weight.T + bias`` split into three segments, each reshaped to
    ``[B, S, heads, head_dim]`` and transposed to put its heads before its tokens. Accumulates in float32 and
    rounds once. Quantized weights are decoded on the fly. With LoRA (Hu et al., "LoRA: Low-Rank Adaptation of
    Large Language Models", 2021, arXiv:2106.09685) one product computes ``input @ A`` for all A, and the
    low-rank part is added before the single rounding.

    The gradients are one operation too, which needs only ``input``, the weights and the adapters. Quantized
    weights have no gradient; the scales and biases of mode ``"affine"`` have that of ``mx.quantized_matmul``.

    With ``Hq = num_heads * head_dim``, ``Hk = num_kv_heads * head_dim`` and
    ``Hv = num_kv_heads * v_head_dim``:

    Args:
        input (array): Hidden states of shape ``[B, S, H]``, float32, float16 or bfloat16. Any strides.
        weight (array, LinearOperands or tuple): Packed weights of shape ``[Hq + Hk + Hv, H]``, or a tuple
            ``(wq, wk, wv)`` of shapes ``[Hq, H]``, ``[Hk, H]`` and ``[Hv, H]``, which are neither copied nor
            concatenated. Each may be a :class:`LinearOperands` instead of an array.
        bias (array or tuple, optional): ``[Hq + Hk + Hv]``, or a tuple of ``[Hq]``, ``[Hk]`` and ``[Hv]`` if
            ``weight`` is a tuple. Left out with :class:`LinearOperands`. Default: ``None``.
        num_heads (int, optional): Query heads, a multiple of ``num_kv_heads``. This and the next two may be
            left out if ``split_heads`` is false and ``weight`` is a tuple, which says where the segments end.
        num_kv_heads (int, optional): Key and value heads.
        head_dim (int, optional): Features per head, at least 1.
        v_head_dim (int, optional): Features per value head. Default: ``None``, ``head_dim``.
        split_heads (bool): Whether heads are an axis of their own, before the tokens. If not, the outputs are
            ``[B, S, Hq]``, ``[B, S, Hk]`` and ``[B, S, Hv]``. Default: ``True``.
        exact (bool): Round where the modules of MLX and mlx-lm do: after a quantized product, after the bias,
            after the scaled low-rank product, and after their sum. Default: ``False``.
        route (str, optional): ``"composed"`` for MLX's own operations, which can be exported; ``"fused"`` for
            our kernel, an error if there is none. Default: ``None``, the one expected to be faster, unless
            the environment variable ``MLX_FUSED_ROUTE`` names one. The gradient of our kernel's results is
            routed by itself, always as by ``None``.
        stream (Stream or Device, optional): Where to run. Default: ``None``, the default stream of the
            default device.

    Returns:
        tuple: ``q`` of shape ``[B, num_heads, S, head_dim]``, ``k`` of shape ``[B, num_kv_heads, S,
        head_dim]`` and ``v`` of shape ``[B, num_kv_heads, S, v_head_dim]``, unless ``split_heads`` is false.
        Their dtype is the one MLX promotes the arguments to; adapters do not count.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a rank, shape, dtype, head count or quantization is wrong; if the three layers differ
            in quantization, or only some have a bias; if ``route`` is ``"fused"`` and we have no kernel, or
            has an unknown value. The message names the argument, what it must be and what it is. Also if the
            gradient of a quantized weight is asked for.
    """
    operation = "fused_qkv_projection"
    layers = _layers(operation, weight, bias)
    heads = num_heads, num_kv_heads, head_dim, v_head_dim
    if split_heads or len(layers) == 1 or heads != (None,) * 4:
        segments = _segments(operation, *heads, split_heads)
    else:
        segments = [_OF_LAYER] * 3
    return tuple(
        _project(operation, "FusedQKVProjection", "input", input, layers, segments, exact, route, stream)
    )


def fused_qkv_projection_bwd(
    dq: mx.array,
    dk: mx.array,
    dv: mx.array,
    input: mx.array,
    weight: mx.array | Three,
    has_bias: bool,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    v_head_dim: int | None = None,
    route: Route = None,
    stream: Stream = None,
) -> tuple[mx.array, mx.array | Three, mx.array | Three | None]:
    """All gradients of :func:`fused_qkv_projection` with dense weights.

    This is the backward pass to call by hand. ``mx.grad`` and ``mx.vjp`` compute only the gradients they are
    asked for, and work with every kind of weight.

    Args:
        dq (array): Gradient of ``q``, ``[B, num_heads, S, head_dim]``.
        dk (array): Gradient of ``k``, ``[B, num_kv_heads, S, head_dim]``.
        dv (array): Gradient of ``v``, ``[B, num_kv_heads, S, v_head_dim]``.
        input (array): The forward's input, ``[B, S, H]``.
        weight (array or tuple): The forward's weight, packed ``[Hq + Hk + Hv, H]`` or a tuple.
        has_bias (bool): Whether the forward had a bias.
        num_heads (int): Query heads.
        num_kv_heads (int): Key and value heads.
        head_dim (int): Features per head.
        v_head_dim (int, optional): Features per value head. Default: ``None``, ``head_dim``.
        route (str, optional): As in the forward.
        stream (Stream or Device, optional): As in the forward.

    Returns:
        tuple: ``d_input`` of shape ``[B, S, H]``, ``d_weight`` (packed or a tuple, as ``weight`` is), and
        ``d_bias`` likewise, in the weight's dtype, or ``None`` if ``has_bias`` is false.

    Raises:
        TypeError: If an argument is of a wrong type, such as a :class:`LinearOperands`.
        ValueError: If a rank, shape, dtype, head count or ``route`` is wrong.
    """
    operation = "fused_qkv_projection_bwd"
    layers = _dense_layers(operation, weight)
    d_input, *of_segments = _all_gradients(
        operation,
        "FusedQKVProjection",
        ["dq", "dk", "dv"],
        [dq, dk, dv],
        "input",
        input,
        layers,
        _segments(operation, num_heads, num_kv_heads, head_dim, v_head_dim, True),
        has_bias,
        route,
        stream,
    )
    d_weight, d_bias = of_segments[:3], of_segments[3:]
    form = partial(mx.concatenate, stream=stream) if len(layers) == 1 else tuple
    return d_input, form(d_weight), form(d_bias) if has_bias else None


@overload
def fused_output_projection_residual(
    attn_out: mx.array,
    weight: mx.array | LinearOperands,
    bias: mx.array | None = None,
    *,
    residual: mx.array,
    alpha: float = 1.0,
    exact: bool = False,
    route: Route = None,
    stream: Stream = None,
) -> mx.array: ...
@overload
def fused_output_projection_residual(
    attn_out: mx.array,
    weight: mx.array | LinearOperands,
    bias: mx.array | None,
    residual: mx.array,
    *,
    alpha: float = 1.0,
    exact: bool = False,
    route: Route = None,
    stream: Stream = None,
) -> mx.array: ...
def fused_output_projection_residual(
    attn_out, weight, bias=None, residual=None, *, alpha=1.0, exact=False, route=None, stream=None
):
    """Project attention's output and add the residual in one operation.

    Equivalent to ``residual + alpha * (attn_out @ weight.T + bias)``, accumulated in float32 and rounded
    once. With LoRA the low-rank part is added before multiplying by ``alpha``. Quantized weights, LoRA and
    gradients work as in :func:`fused_qkv_projection`.

    Args:
        attn_out (array): Attention output of shape ``[B, S, Hq]``, heads side by side, float32, float16 or
            bfloat16. Any strides.
        weight (array or LinearOperands): Output projection of shape ``[H, Hq]``.
        bias (array, optional): ``[H]``. Left out with :class:`LinearOperands`. Default: ``None``.
        residual (array): The array to add, usually the attention block's input, ``[B, S, H]``.
        alpha (float): The factor of the projection. Default: ``1.0``.
        exact (bool): Round where separate operations do: after a quantized product, after the bias, after the
            scaled low-rank product, after their sum, after ``alpha`` and after the residual's sum.
            Default: ``False``.
        route (str, optional): As in :func:`fused_qkv_projection`.
        stream (Stream or Device, optional): Where to run. Default: ``None``, the default stream of the
            default device.

    Returns:
        array: ``[B, S, H]``, of the dtype that MLX promotes the arguments to; adapters do not count.

    Raises:
        TypeError: If ``residual`` is left out, or an argument is of a wrong type.
        ValueError: If a rank, shape, dtype, quantization or ``route`` is wrong. The message names the
            argument, what it must be and what it is. Also if the gradient of a quantized weight is asked for.
    """
    operation = "fused_output_projection_residual"
    if residual is None:
        raise TypeError(f"[{operation}] residual must be an array but got None.")
    layers, node = [_layer(operation, weight, bias)], "FusedOutputProjection"
    (out,) = _project(
        operation, node, "attn_out", attn_out, layers, [_OF_LAYER], exact, route, stream, residual, alpha
    )
    return out


def fused_output_projection_residual_bwd(
    d_output: mx.array,
    attn_out: mx.array,
    weight: mx.array,
    has_bias: bool,
    *,
    route: Route = None,
    stream: Stream = None,
) -> tuple[mx.array, mx.array, mx.array | None, mx.array]:
    """All gradients of :func:`fused_output_projection_residual` with a dense weight and an ``alpha`` of 1.

    This is the backward pass to call by hand. ``mx.grad`` and ``mx.vjp`` compute only the gradients they are
    asked for, and work with every kind of weight and with ``alpha``.

    Args:
        d_output (array): Gradient of the output, ``[B, S, H]``.
        attn_out (array): The forward's ``attn_out``, ``[B, S, Hq]``.
        weight (array): The forward's weight, ``[H, Hq]``.
        has_bias (bool): Whether the forward had a bias.
        route (str, optional): As in the forward.
        stream (Stream or Device, optional): As in the forward.

    Returns:
        tuple: ``d_attn_out`` of shape ``[B, S, Hq]``, ``d_weight`` of shape ``[H, Hq]``, ``d_bias`` of shape
        ``[H]`` (in the weight's dtype) or ``None``, and ``d_residual``, which is ``d_output`` itself.

    Raises:
        TypeError: If an argument is of a wrong type, such as a :class:`LinearOperands`.
        ValueError: If a rank, shape, dtype or ``route`` is wrong.
    """
    operation = "fused_output_projection_residual_bwd"
    d_attn_out, d_weight, *d_bias = _all_gradients(
        operation,
        "FusedOutputProjection",
        ["d_output"],
        [d_output],
        "attn_out",
        attn_out,
        _dense_layers(operation, [weight]),
        [_OF_LAYER],
        has_bias,
        route,
        stream,
    )
    return d_attn_out, d_weight, *(d_bias or (None,)), d_output


def _project(
    operation, node, name, x, layers, segments, exact, route, stream, residual=None, alpha=1.0
) -> list[mx.array]:
    try:
        return _ext.project(operation, node, name, x, layers, segments, residual, alpha, exact, route, stream)
    except TypeError:
        given = {
            name: x,
            "residual": residual,
            "alpha": alpha,
            "exact": exact,
            "route": route,
            "stream": stream,
        }
        _check_kinds(operation, given, layers)
        raise


def _all_gradients(operation, node, names, cotangents, name, x, layers, segments, has_bias, route, stream):
    try:
        return _ext.all_gradients(
            operation, node, names, cotangents, name, x, layers, segments, has_bias, route, stream
        )
    except TypeError:
        given = dict(zip(names, cotangents, strict=True))
        _check_kinds(
            operation, given | {name: x, "has_bias": has_bias, "route": route, "stream": stream}, layers
        )
        raise


_KINDS = {
    **dict.fromkeys(("weight", "bias", "scales", "biases", "lora_a", "lora_b", "residual"), mx.array),
    **dict.fromkeys(("group_size", "bits"), int),
    **dict.fromkeys(("alpha", "lora_scale"), (float, int)),
    **dict.fromkeys(("exact", "has_bias"), bool),
    **dict.fromkeys(("mode", "route"), str),
    "stream": (mx.Stream, mx.Device, mx.DeviceType),
}
_OPTIONAL = {
    "bias",
    "scales",
    "biases",
    "lora_a",
    "lora_b",
    "group_size",
    "bits",
    "residual",
    "route",
    "stream",
}


def _check_kinds(operation: str, given: dict[str, object], layers: list[LinearOperands]) -> None:
    """Say which argument is of the wrong type, if one is."""
    of_layers = [item for layer in layers for item in layer._asdict().items()]
    for name, value in [*of_layers, *given.items()]:
        kinds = _KINDS.get(name, mx.array)
        if not isinstance(value, kinds) and not (value is None and name in _OPTIONAL):
            expected = " or ".join(k.__name__ for k in (kinds if isinstance(kinds, tuple) else (kinds,)))
            raise TypeError(
                f"[{operation}] {name} must be {expected} but got {type(value).__name__}."
            ) from None


def _dense_layers(operation: str, weight: mx.array | Three) -> list[LinearOperands]:
    weights = weight if type(weight) in (list, tuple) else [weight]
    for w in weights:
        if not isinstance(w, mx.array):
            got = type(w).__name__
            raise TypeError(f"[{operation}] weight must be an array or a tuple of arrays but got {got}.")
    return [LinearOperands(w) for w in weights]


def _layer(operation: str, weight: mx.array | LinearOperands, bias: mx.array | None) -> LinearOperands:
    if isinstance(weight, LinearOperands):
        if bias is None:
            return weight
        raise ValueError(f"[{operation}] bias must be left out where weight is LinearOperands but was given.")
    if isinstance(weight, mx.array):
        return LinearOperands(weight, bias)
    got = type(weight).__name__
    hint = " LinearOperands.of makes one of a layer." if isinstance(weight, nn.Module) else ""
    raise TypeError(f"[{operation}] weight must be an array, LinearOperands or a tuple but got {got}.{hint}")


def _layers(operation: str, weight: QKVWeight, bias: mx.array | Three | None) -> list[LinearOperands]:
    """The layers of a call: one that packs all segments, or one for each."""
    packed = isinstance(weight, LinearOperands) or not isinstance(weight, (list, tuple))
    if not packed and len(weight) != 3:
        raise ValueError(f"[{operation}] weight must be one layer or a tuple of 3 but got {len(weight)}.")
    if bias is None:
        return [_layer(operation, w, None) for w in ([weight] if packed else weight)]
    if isinstance(bias, (list, tuple)) == packed or (not packed and len(bias) != len(weight)):
        expected = "one array" if packed else "a tuple of three arrays (q, k, v)"
        got = f"a tuple of {len(bias)}" if isinstance(bias, (list, tuple)) else "one array"
        raise ValueError(f"[{operation}] bias must be {expected} as weight is but got {got}.")
    if packed:
        return [_layer(operation, weight, bias)]
    return [_layer(operation, w, b) for w, b in zip(weight, bias, strict=True)]


# The features and heads of a segment that is as wide as its layer, and not split into heads.
_OF_LAYER = (0, 0)


def _segments(
    operation: str,
    num_heads: int | None,
    num_kv_heads: int | None,
    head_dim: int | None,
    v_head_dim: int | None,
    split_heads: bool,
) -> list[tuple[int, int]]:
    """The features and heads of q, k and v."""
    given = num_heads, num_kv_heads, head_dim, head_dim if v_head_dim is None else v_head_dim
    if None in given:
        raise ValueError(
            f"[{operation}] {_HEADS[given.index(None)]} must be given but got None; heads may be left out, "
            "all of them, with split_heads=False and a tuple of three weights."
        )
    num_heads, num_kv_heads, head_dim, v_head_dim = heads = tuple(map(index, given))
    if min(heads) < 1:
        name, value = next((n, v) for n, v in zip(_HEADS, heads, strict=True) if v < 1)
        raise ValueError(f"[{operation}] {name} must be at least 1 but got {value}.")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"[{operation}] num_heads must be a multiple of num_kv_heads "
            f"but got {num_heads} and {num_kv_heads}."
        )
    q, k, v = num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * v_head_dim
    if q + k + v >= 2**31:
        got = ", ".join(f"{name} {value}" for name, value in zip(_HEADS, heads, strict=True))
        raise ValueError(f"[{operation}] the features of all heads must be below 2^31 but got {got}.")
    if not split_heads:
        return [(q, 0), (k, 0), (v, 0)]
    return [(q, num_heads), (k, num_kv_heads), (v, num_kv_heads)]


_HEADS = ("num_heads", "num_kv_heads", "head_dim", "v_head_dim")
