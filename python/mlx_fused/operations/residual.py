"""A projection with the residual added to it."""

from __future__ import annotations

from typing import overload

import mlx.core as mx

from mlx_fused._ext import Operation
from mlx_fused.linear import LinearOperands
from mlx_fused.operations.call import (
    OF_LAYER,
    Route,
    Stream,
    all_gradients,
    batched,
    dense_layers,
    layer_of,
    operation_of,
    project,
    unbatched,
)


@overload
def fused_output_projection_residual(
    x: mx.array,
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
    x: mx.array,
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
    x, weight, bias=None, residual=None, *, alpha=1.0, exact=False, route=None, stream=None
):
    """A projection and the residual that is added to it in one operation.

    The last projection of a block: of what attention gives, or down in an MLP. Equivalent to ``residual +
    alpha * (x @ weight.T + bias)``, accumulated in float32 and rounded once. With LoRA the low-rank part is
    added before multiplying by ``alpha``. Quantized weights, LoRA and gradients work as in
    :func:`fused_qkv_projection`.

    Args:
        x (array): ``[..., K]``, such as heads side by side, float32, float16 or bfloat16. Any strides.
        weight (array or LinearOperands): ``[H, K]``.
        bias (array, optional): ``[H]``. Left out with :class:`LinearOperands`. Default: ``None``.
        residual (array): The array to add, usually the block's input, ``[..., H]``.
        alpha (float): The factor of the projection. Default: ``1.0``.
        exact (bool): Round where separate operations do: after a quantized product, after the bias, after the
            scaled low-rank product, after their sum, after ``alpha`` and after the residual's sum.
            Default: ``False``.
        route (str, optional): As in :func:`fused_qkv_projection`.
        stream (Stream or Device, optional): Where to run. Default: ``None``, the default stream of the
            default device.

    Returns:
        array: ``[..., H]``, of the dtype that MLX promotes the arguments to; adapters do not count.

    Raises:
        TypeError: If ``residual`` is left out, or an argument is of a wrong type.
        ValueError: If a rank, shape, dtype, quantization or ``route`` is wrong. The message names the
            argument, what it must be and what it is. Also if the gradient of a quantized weight is asked for.
    """
    operation = residual_operation(exact, route)
    name = operation.name
    if residual is None:
        raise TypeError(f"[{name}] residual must be an array but got None.")
    layers = [layer_of(name, weight, bias)]
    x, leading = batched(name, x)
    if leading is not None and isinstance(residual, mx.array) and isinstance(layers[0].weight, mx.array):
        expected = (*leading, *layers[0].weight.shape[:1])
        if residual.shape != expected:
            raise ValueError(f"[{name}] residual must have shape {expected} but got {residual.shape}.")
        residual, _ = batched(name, residual)
    (y,) = project(operation, x, layers, stream, residual, alpha)
    return y if leading is None else unbatched(y, leading)


def residual_operation(exact: bool = False, route: Route = None) -> Operation:
    name = "fused_output_projection_residual"
    return operation_of(name, "FusedOutputProjection", "x", [OF_LAYER], exact, route)


def fused_output_projection_residual_bwd(
    d_output: mx.array,
    x: mx.array,
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
        x (array): The forward's ``x``, ``[B, S, K]``.
        weight (array): The forward's weight, ``[H, K]``.
        has_bias (bool): Whether the forward had a bias.
        route (str, optional): As in the forward.
        stream (Stream or Device, optional): As in the forward.

    Returns:
        tuple: ``d_x`` of shape ``[B, S, K]``, ``d_weight`` of shape ``[H, K]``, ``d_bias`` of shape
        ``[H]`` (in the weight's dtype) or ``None``, and ``d_residual``, which is ``d_output`` itself.

    Raises:
        TypeError: If an argument is of a wrong type, such as a :class:`LinearOperands`.
        ValueError: If a rank, shape, dtype or ``route`` is wrong.
    """
    name = "fused_output_projection_residual_bwd"
    operation = operation_of(name, "FusedOutputProjection", "x", [OF_LAYER], False, route)
    layers = dense_layers(name, [weight])
    d_x, d_weight, *d_bias = all_gradients(operation, ["d_output"], [d_output], x, layers, has_bias, stream)
    return d_x, d_weight, *(d_bias or (None,)), d_output
