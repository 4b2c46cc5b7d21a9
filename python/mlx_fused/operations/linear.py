"""Linear layers with an activation: any one, and the gated half of an MLP."""

from __future__ import annotations

from math import inf
from typing import Literal, TypeAlias, get_args

import mlx.core as mx

from mlx_fused._ext import Operation
from mlx_fused.linear import LinearOperands
from mlx_fused.operations.call import (
    OF_LAYER,
    Norm,
    Route,
    Stream,
    batched,
    layer_of,
    layers_of,
    operation_of,
    project,
    unbatched,
)

Activation: TypeAlias = Literal["silu", "gelu", "gelu_approx", "relu", "relu2"]


def fused_linear(
    x: mx.array,
    weight: mx.array | LinearOperands,
    bias: mx.array | None = None,
    *,
    norm: Norm = None,
    activation: Activation | None = None,
    exact: bool = False,
    route: Route = None,
    stream: Stream = None,
) -> mx.array:
    """A linear layer, with an activation in the same operation if one is named.

    Equivalent to ``activation(x @ weight.T + bias)``, accumulated in float32 and rounded once. Quantized
    weights, LoRA and gradients work as in :func:`fused_qkv_projection`. With an activation the backward pass
    keeps ``x @ weight.T + bias`` and not the activation, which it makes again where it needs it; nothing is
    kept if no gradient is asked for. What is kept is in the result's dtype: in float16 it overflows beyond
    65504, as in separate layers, though the result may be finite.

    Args:
        x (array): ``[..., K]``, float32, float16 or bfloat16. Any strides.
        weight (array or LinearOperands): ``[N, K]``, such as a head's; of a tied embedding, dense or
            quantized, ``LinearOperands.of_base(embedding)``.
        bias (array, optional): ``[N]``. Left out with :class:`LinearOperands`. Default: ``None``.
        norm (tuple, optional): Of ``x``, as in :func:`fused_qkv_projection`. Default: ``None``.
        activation (str, optional): ``"silu"``, ``"gelu"`` (with the error function), ``"gelu_approx"`` (with
            tanh), ``"relu"`` or ``"relu2"`` (its square), as in ``mlx.nn``. Default: ``None``.
        exact (bool): Round after a quantized product, after the bias, after the scaled low-rank product,
            after their sum and after the activation, whose own steps are in float32. Default: ``False``.
        route (str, optional): As in :func:`fused_qkv_projection`.
        stream (Stream or Device, optional): Where to run. Default: ``None``, the default stream of the
            default device.

    Returns:
        array: ``[..., N]``, of the dtype that MLX promotes the arguments to; adapters do not count.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a rank, shape, dtype, quantization, ``activation`` or ``route`` is wrong. The message
            names the argument, what it must be and what it is. Also if the gradient of a quantized weight is
            asked for.
    """
    operation = linear_operation(activation, exact, route)
    layers = [layer_of(operation.name, weight, bias)]
    x, leading = batched(operation.name, x)
    (y,) = project(operation, x, layers, stream, norm=norm)
    return y if leading is None else unbatched(y, leading)


def linear_operation(
    activation: Activation | None = None, exact: bool = False, route: Route = None
) -> Operation:
    name = "fused_linear"
    of = None if activation is None else _activation(name, activation, _ACTIVATIONS)
    return operation_of(name, "FusedLinear", "x", [OF_LAYER], exact, route, of)


def fused_gated_projection(
    x: mx.array,
    weight: mx.array | LinearOperands | tuple[mx.array | LinearOperands, mx.array | LinearOperands],
    bias: mx.array | tuple[mx.array, mx.array] | None = None,
    *,
    norm: Norm = None,
    activation: Literal["silu", "gelu", "gelu_approx", "relu", "relu2", "clipped_swiglu"] = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    packing: Literal["gate_up", "up_gate", "interleaved"] = "gate_up",
    exact: bool = False,
    route: Route = None,
    stream: Stream = None,
) -> mx.array:
    """The gated half of an MLP in one operation: ``activation(gate) * up``.

    ``gate = x @ weight[0].T + bias[0]`` and ``up = x @ weight[1].T + bias[1]`` (Shazeer, "GLU Variants
    Improve Transformer", 2020, arXiv:2002.05202). Accumulates in float32 and rounds once. Quantized weights,
    LoRA and gradients work as in :func:`fused_qkv_projection`. The backward pass keeps ``x``, ``gate`` and
    ``up``; the result is made again where the projection after it needs it. Nothing is kept if no gradient is
    asked for. What is kept is in the result's dtype: in float16 it overflows beyond 65504, as in separate
    layers, though the result may be finite.

    Args:
        x (array): ``[..., K]``, float32, float16 or bfloat16. Any strides.
        weight (tuple, array or LinearOperands): ``(gate, up)``, each an array ``[N, K]`` or a
            :class:`LinearOperands`; or one of these that packs the rows of both, ``[2 * N, K]``.
        bias (tuple or array, optional): ``(gate, up)``, each ``[N]``; or one ``[2 * N]`` if ``weight`` is
            packed. Left out with :class:`LinearOperands`. Default: ``None``.
        norm (tuple, optional): Of ``x``, as in :func:`fused_qkv_projection`. Default: ``None``.
        activation (str): ``"silu"``, ``"gelu"`` (with the error function), ``"gelu_approx"`` (with tanh),
            ``"relu"`` or ``"relu2"`` (its square), as in ``mlx.nn``; or gpt-oss's ``"clipped_swiglu"``,
            ``g * sigmoid(alpha * g) * (u + 1)`` with ``g = min(gate, limit)`` and ``u = clip(up, -limit,
            limit)``. Default: ``"silu"``.
        alpha (float): Of ``"clipped_swiglu"``. Default: ``1.702``.
        limit (float): Of ``"clipped_swiglu"``, at least 0. Default: ``7.0``.
        packing (str): The rows of a packed weight, and of no other: ``"gate_up"`` the gate's before up's,
            ``"up_gate"`` after them, ``"interleaved"`` in turns, a row of the gate first.
            Default: ``"gate_up"``.
        exact (bool): Round gate, up, the activation and the result, as separate modules do; the activation's
            own steps are in float32. Default: ``False``.
        route (str, optional): As in :func:`fused_qkv_projection`.
        stream (Stream or Device, optional): Where to run. Default: ``None``, the default stream of the
            default device.

    Returns:
        array: ``[..., N]``, of the dtype that MLX promotes the arguments to; adapters do not count.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a rank, shape, dtype, quantization, ``activation``, ``packing`` or ``route`` is wrong;
            if the two layers differ in quantization, or only one has a bias. The message names the argument,
            what it must be and what it is. Also if the gradient of a quantized weight is asked for.
    """
    operation = gated_operation(activation, alpha, limit, packing, exact, route)
    layers = layers_of(operation.name, weight, bias, ("gate", "up"))
    if len(layers) == 2 and packing != "gate_up":
        raise ValueError(
            f"[{operation.name}] packing must be left out where weight is a tuple but got {packing!r}."
        )
    if len(layers) == 1:
        packed = layers[0].weight
        rows = packed.shape[0] if isinstance(packed, mx.array) and packed.ndim else 0
        if rows % 2:
            must = "weight must have an even number of rows, gate's and up's,"
            raise ValueError(f"[{operation.name}] {must} but got {rows}.")
    x, leading = batched(operation.name, x)
    (y,) = project(operation, x, layers, stream, norm=norm)
    return y if leading is None else unbatched(y, leading)


def gated_operation(
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    packing: str = "gate_up",
    exact: bool = False,
    route: Route = None,
) -> Operation:
    name = "fused_gated_projection"
    kind, *_ = _activation(name, activation, (*_ACTIVATIONS, "clipped_swiglu"))
    if packing not in tuple(_PACKINGS):
        expected = ", ".join(map(repr, _PACKINGS))
        raise ValueError(f"[{name}] packing must be one of {expected} but got {packing!r}.")
    if isinstance(limit, (int, float)) and not limit >= 0:
        raise ValueError(f"[{name}] limit must be at least 0 but got {limit}.")
    of = (kind, True, alpha, limit) if kind == "clipped_swiglu" else (kind, True, 1.0, inf)
    return operation_of(
        name, "FusedGatedProjection", "x", [OF_LAYER] * 2, exact, route, of, _PACKINGS[packing]
    )


_ACTIVATIONS = get_args(Activation)
_PACKINGS = {
    "gate_up": "in_order",
    "up_gate": "reversed",
    "interleaved": "interleaved",
}


def _activation(operation: str, name: str, names: tuple[str, ...]) -> tuple[str, bool, float, float]:
    if name not in names:
        expected = ", ".join(map(repr, names))
        raise ValueError(f"[{operation}] activation must be one of {expected} but got {name!r}.")
    return name, False, 1.0, inf
