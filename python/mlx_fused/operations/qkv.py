"""The projection to queries, keys and values."""

from __future__ import annotations

from functools import partial
from operator import index
from typing import Literal, TypeAlias, overload

import mlx.core as mx

from mlx_fused._ext import Operation
from mlx_fused.linear import LinearOperands
from mlx_fused.operations.call import (
    OF_LAYER,
    Norm,
    Route,
    Stream,
    all_gradients,
    check_sizes,
    dense_layers,
    layers_of,
    operation_of,
    project,
)

Three: TypeAlias = tuple[mx.array, mx.array, mx.array]
QKVWeight: TypeAlias = mx.array | LinearOperands | tuple[mx.array | LinearOperands, ...]


@overload
def fused_qkv_projection(
    input: mx.array,
    weight: QKVWeight,
    bias: mx.array | Three | None = None,
    *,
    split_heads: Literal[False],
    norm: Norm = None,
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
    norm: Norm = None,
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
    norm: Norm = None,
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
    norm=None,
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
        norm (tuple, optional): ``(weight, eps)`` of an RMS norm of ``input`` (Zhang and Sennrich, "Root Mean
            Square Layer Normalization", 2019, arXiv:1910.07467) that comes first: ``[H]`` or ``None``, and a
            number. The result is that of :func:`fused_rms_norm` before; a GPU may do it for few tokens in the
            same kernel. Default: ``None``.
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
    name = "fused_qkv_projection"
    layers = layers_of(name, weight, bias, ("q", "k", "v"))
    heads = num_heads, num_kv_heads, head_dim, v_head_dim
    if split_heads or len(layers) == 1 or heads != (None,) * 4:
        segments = _segments(name, *heads, split_heads)
    else:
        segments = [OF_LAYER] * 3
    return tuple(project(_operation(name, segments, exact, route), input, layers, stream, norm=norm))


def qkv_operation(exact: bool = False, route: Route = None) -> Operation:
    """Of three layers, whose outputs are not split into heads."""
    return _operation("fused_qkv_projection", [OF_LAYER] * 3, exact, route)


def _operation(name: str, segments, exact: bool, route: Route) -> Operation:
    return operation_of(name, "FusedQKVProjection", "input", segments, exact, route)


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
    name = "fused_qkv_projection_bwd"
    layers = dense_layers(name, weight)
    segments = _segments(name, num_heads, num_kv_heads, head_dim, v_head_dim, True)
    operation = _operation(name, segments, False, route)
    d_input, *of_segments = all_gradients(
        operation, ["dq", "dk", "dv"], [dq, dk, dv], input, layers, has_bias, stream
    )
    d_weight, d_bias = of_segments[:3], of_segments[3:]
    form = partial(mx.concatenate, stream=stream) if len(layers) == 1 else tuple
    return d_input, form(d_weight), form(d_bias) if has_bias else None


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
    try:
        num_heads, num_kv_heads, head_dim, v_head_dim = heads = tuple(map(index, given))
    except TypeError:
        check_sizes(operation, dict(zip(_HEADS, given, strict=True)))
        raise
    if min(heads) < 1:
        check_sizes(operation, dict(zip(_HEADS, heads, strict=True)))
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
